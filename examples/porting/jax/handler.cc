// Every CPU kernel of a bundle behind one XLA FFI handler: `kernel` names an entry of mhc_table.h.
//
// `roles` has a letter per buffer of the kernel, in its order: i is the next operand of the call, o the next result.
// XLA allocates both; shapes and dtypes are checked by mhc_jax.py when a call is traced.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "mhc_table.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// The hash of the bundle's manifest: kernels are found by names that other bundles have too.
extern "C" __attribute__((visibility("default"))) const char mhc_manifest[] = MHC_MANIFEST;

static const mhc_entry *find(std::string_view name) {
  for (const mhc_entry &entry : mhc_entries)
    if (name == entry.name) return &entry;
  return nullptr;
}

static ffi::Error call(std::string_view kernel, std::string_view roles, ffi::Span<const double> numbers,
                       int64_t threads, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  const mhc_entry *entry = find(kernel);
  if (!entry || static_cast<size_t>(entry->num_buffers) != roles.size() ||
      static_cast<size_t>(entry->num_numbers) != numbers.size() || operands.size() + results.size() != roles.size())
    return ffi::Error::InvalidArgument(std::string(kernel) + ": expected a kernel of the bundle that this library was " +
                                       "built from, with its buffers and numbers, got another");
  std::vector<void *> buffers;
  size_t operand = 0, result = 0;
  for (char role : roles) {
    if (role == 'o') {
      auto buffer = results.get<ffi::AnyBuffer>(result++);
      if (buffer.has_error()) return buffer.error();
      buffers.push_back((*buffer)->untyped_data());
    } else {
      auto buffer = operands.get<ffi::AnyBuffer>(operand++);
      if (buffer.has_error()) return buffer.error();
      buffers.push_back(buffer->untyped_data());
    }
  }
  entry->call(buffers.data(), numbers.begin(), static_cast<int>(threads));
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(mhc_call, call,
                              ffi::Ffi::Bind()
                                  .Attr<std::string_view>("kernel")
                                  .Attr<std::string_view>("roles")
                                  .Attr<ffi::Span<const double>>("numbers")
                                  .Attr<int64_t>("threads")
                                  .RemainingArgs()
                                  .RemainingRets());
