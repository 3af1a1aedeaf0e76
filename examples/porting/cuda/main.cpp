// Runs the cubins of a bundle on its golden vectors: mhc_golden_cuda BUNDLE. No tilelang, no Python, no compiler.
//
//   nvcc -std=c++17 -DMHC_ARCH='"sm_90a"' -I.. -Ibundle/sm_90a main.cpp ../golden.c -o mhc_golden_cuda -ldl
//
// Exit status: 0 when all agree, 1 when one does not, 2 when the bundle cannot be read or a call fails, 3 where there is
// no driver or no GPU.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "golden.h"
#include "mhc_kernels.h"

// The driver is opened when the program runs, so that it can be built where there is none. cuda.h gives some functions
// a versioned name by macro, which the two steps of SYMBOL expand.
#define TEXT(name) #name
#define SYMBOL(name) TEXT(name)
#define FUNCTIONS(X)                                                                                          \
  X(cuInit) X(cuGetErrorName) X(cuDeviceGet) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain)              \
  X(cuCtxSetCurrent) X(cuCtxSynchronize) X(cuModuleLoadData) X(cuModuleUnload) X(cuModuleGetFunction)         \
  X(cuFuncSetAttribute) X(cuMemAlloc) X(cuMemFree) X(cuMemcpyHtoD) X(cuMemcpyDtoH) X(cuMemsetD8) X(cuLaunchKernel)

struct Driver {
#define MEMBER(name) decltype(&::name) name##_ = nullptr;
  FUNCTIONS(MEMBER)
#undef MEMBER
};

static bool open(Driver &driver) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) {
    std::fprintf(stderr, "expected the CUDA driver, got %s\n", dlerror());
    return false;
  }
  bool whole = true;
#define FIND(name)                                                                  \
  driver.name##_ = reinterpret_cast<decltype(&::name)>(dlsym(library, SYMBOL(name))); \
  whole = whole && driver.name##_;
  FUNCTIONS(FIND)
#undef FIND
  if (!whole) std::fprintf(stderr, "expected every function of cuda.h in libcuda.so.1, got an older one\n");
  return whole;
}

struct Failure {};

static void check(const Driver &driver, CUresult result, const std::string &what) {
  if (result == CUDA_SUCCESS) return;
  const char *name = nullptr;
  driver.cuGetErrorName_(result, &name);
  std::fprintf(stderr, "%s: expected CUDA_SUCCESS, got %s\n", what.c_str(), name ? name : "an unknown error");
  throw Failure();
}

static const mhc_kernel *find(const char *name) {
  for (size_t k = 0; k < mhc_num_kernels; ++k)
    if (std::strcmp(mhc_kernels[k].name, name) == 0) return &mhc_kernels[k];
  return nullptr;
}

static std::string word(const char *words, int k) {
  char found[GOLDEN_NAME];
  golden_word(words, k, found);
  return found;
}

// One kernel on its golden vector, with outputs full of NaN before; whether every output is within its tolerance.
static bool run(const Driver &driver, const std::string &bundle, const golden_vector &vector) {
  const mhc_kernel *kernel = find(vector.kernel);
  if (!kernel) {
    std::fprintf(stderr, "%s: expected a kernel of mhc_kernels.h, got none\n", vector.kernel);
    throw Failure();
  }
  std::vector<double> numbers(size_t(kernel->num_numbers) + 1);
  for (int k = 0; k < kernel->num_numbers; ++k)
    if (golden_number(&vector, word(kernel->numbers, k).c_str(), &numbers[size_t(k)]) != 0) throw Failure();

  std::vector<CUdeviceptr> buffers(size_t(vector.num_buffers));
  for (int k = 0; k < vector.num_buffers; ++k) {
    const golden_buffer &b = vector.buffers[k];
    check(driver, driver.cuMemAlloc_(&buffers[size_t(k)], b.bytes), b.name);
    if (std::strcmp(b.role, "in") == 0)
      check(driver, driver.cuMemcpyHtoD_(buffers[size_t(k)], b.content, b.bytes), b.name);
    else
      check(driver, driver.cuMemsetD8_(buffers[size_t(k)], 0xff, b.bytes), b.name);
  }

  // The parameters of the kernel, by name: a buffer's address, or a number of its width.
  std::vector<CUdeviceptr> pointers;
  std::vector<int32_t> ints;
  std::vector<int64_t> longs;
  std::vector<float> floats;
  const size_t count = std::strlen(kernel->types);
  pointers.reserve(count), ints.reserve(count), longs.reserve(count), floats.reserve(count);
  std::vector<void *> parameters;
  for (size_t p = 0; p < count; ++p) {
    const std::string name = word(kernel->parameters, int(p));
    const size_t before = parameters.size();
    if (kernel->types[p] == 'p') {
      for (int k = 0; k < vector.num_buffers; ++k)
        if (name == vector.buffers[k].name) {
          pointers.push_back(buffers[size_t(k)]);
          parameters.push_back(&pointers.back());
        }
    } else {
      for (int k = 0; k < kernel->num_numbers; ++k)
        if (name == word(kernel->numbers, k)) {
          const char type = kernel->types[p];
          ints.push_back(int32_t(numbers[size_t(k)]));
          longs.push_back(int64_t(numbers[size_t(k)]));
          floats.push_back(float(numbers[size_t(k)]));
          parameters.push_back(type == 'i'   ? static_cast<void *>(&ints.back())
                               : type == 'f' ? static_cast<void *>(&floats.back())
                                             : static_cast<void *>(&longs.back()));
        }
    }
    if (parameters.size() != before + 1) {
      std::fprintf(stderr, "%s: expected an argument %s, got none\n", kernel->name, name.c_str());
      throw Failure();
    }
  }

  std::ifstream file(bundle + "/" MHC_ARCH "/" + kernel->cubin, std::ios::binary);
  const std::string cubin{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (cubin.empty()) {
    std::fprintf(stderr, "%s: expected a cubin in %s/" MHC_ARCH ", got none\n", kernel->cubin, bundle.c_str());
    throw Failure();
  }
  CUmodule module;
  CUfunction function;
  check(driver, driver.cuModuleLoadData_(&module, cubin.data()), kernel->cubin);
  check(driver, driver.cuModuleGetFunction_(&function, module, kernel->function), kernel->function);
  if (kernel->shared_bytes > 48 * 1024)
    check(driver,
          driver.cuFuncSetAttribute_(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                     int(kernel->shared_bytes)),
          kernel->name);
  unsigned grid[3];
  kernel->grid(numbers.data(), grid);
  const unsigned *threads = kernel->threads;
  check(driver,
        driver.cuLaunchKernel_(function, grid[0], grid[1], grid[2], threads[0], threads[1], threads[2],
                               kernel->shared_bytes, nullptr, parameters.data(), nullptr),
        kernel->name);
  check(driver, driver.cuCtxSynchronize_(), kernel->name);

  bool right = true;
  for (int k = 0; k < vector.num_buffers; ++k) {
    const golden_buffer &b = vector.buffers[k];
    if (std::strcmp(b.role, "out") == 0) {
      std::vector<char> got(b.bytes);
      check(driver, driver.cuMemcpyDtoH_(got.data(), buffers[size_t(k)], b.bytes), b.name);
      const double share = golden_share(&b, got.data());
      std::printf("%-60s %-16s %8.3f of the tolerance%s\n", kernel->name, b.name, share, share <= 1 ? "" : "  WRONG");
      right = right && share <= 1;
    }
    check(driver, driver.cuMemFree_(buffers[size_t(k)]), b.name);
  }
  check(driver, driver.cuModuleUnload_(module), kernel->name);
  return right;
}

int main(int argc, char **argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s BUNDLE\n", argv[0]);
    return 2;
  }
  std::FILE *index = nullptr;
  const int count = golden_open(argv[1], MHC_ARCH, &index);
  if (count < 0) return 2;
  Driver driver;
  CUdevice device;
  if (!open(driver) || driver.cuInit_(0) != CUDA_SUCCESS || driver.cuDeviceGet_(&device, 0) != CUDA_SUCCESS) {
    std::fprintf(stderr, "no GPU: nothing was run\n");
    return 3;
  }
  auto vector = std::make_unique<golden_vector>();
  int wrong = 0;
  try {
    int major = 0, minor = 0;
    check(driver, driver.cuDeviceGetAttribute_(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), "device");
    check(driver, driver.cuDeviceGetAttribute_(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), "device");
    std::printf("GPU of compute capability %d.%d, cubins of " MHC_ARCH "\n", major, minor);
    CUcontext context;
    check(driver, driver.cuDevicePrimaryCtxRetain_(&context, device), "context");
    check(driver, driver.cuCtxSetCurrent_(context), "context");
    for (int k = 0; k < count; ++k) {
      if (golden_next(index, argv[1], vector.get()) != 0) throw Failure();
      wrong += !run(driver, argv[1], *vector);
      golden_free(vector.get());
    }
  } catch (const Failure &) {
    return 2;
  }
  std::fclose(index);
  std::printf("%d kernels: %s\n", count, wrong ? "WRONG" : "all within their tolerance");
  return wrong ? 1 : 0;
}
