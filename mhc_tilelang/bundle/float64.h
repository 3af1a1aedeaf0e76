// In place of cpu/runtime.h: a kernel's own arithmetic in float64, for golden vectors.
//
// Stored 16-bit values are rounded as the kernel rounds them; everything else is double. With an amplitude set, every
// operation's result is multiplied by 1 + amplitude · r, r uniform in [-1, 1]: the spread of results under it is what
// a kernel's rounding may do to them (Monte Carlo arithmetic). One thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define MHC_INDEPENDENT

namespace mhc {

static double amplitude = 0;
static uint64_t state = 1, operations = 0;

struct real {
  double value;
  real() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  real(T number) : value(double(number)) {}
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  explicit operator T() const {
    return T(value);
  }
};

// The result of an operation that rounds.
inline real rounded(double value) {
  ++operations;
  if (amplitude != 0) {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    value *= 1 + amplitude * (double(state * 0x2545f4914f6cdd1dull >> 11) * 0x1p-52 - 1);
  }
  return value;
}

inline real operator+(real a, real b) { return rounded(a.value + b.value); }
inline real operator-(real a, real b) { return rounded(a.value - b.value); }
inline real operator*(real a, real b) { return rounded(a.value * b.value); }
inline real operator/(real a, real b) { return rounded(a.value / b.value); }
inline real operator-(real a) { return -a.value; }
inline bool operator<(real a, real b) { return a.value < b.value; }
inline bool operator>(real a, real b) { return a.value > b.value; }
inline bool operator<=(real a, real b) { return a.value <= b.value; }
inline bool operator>=(real a, real b) { return a.value >= b.value; }
inline bool operator==(real a, real b) { return a.value == b.value; }
inline bool operator!=(real a, real b) { return a.value != b.value; }
inline real fma(real a, real b, real c) { return rounded(a.value * b.value + c.value); }
inline real exp(real a) { return rounded(std::exp(a.value)); }
inline real rsqrt(real a) { return rounded(1 / std::sqrt(a.value)); }

// A number of `DIGITS` binary digits, to nearest even, and what it was before it was rounded.
template <int DIGITS, int SMALLEST>
struct stored {
  double value, before;
  stored() = default;
  explicit stored(real number) : before(number.value) {
    int exponent;
    std::frexp(before, &exponent);
    exponent = exponent - DIGITS < SMALLEST ? SMALLEST : exponent - DIGITS;
    value = std::isfinite(before) ? std::ldexp(std::nearbyint(std::ldexp(before, -exponent)), exponent) : before;
  }
  operator real() const { return value; }
};
typedef stored<8, -133> bfloat16;
typedef stored<11, -24> float16;

template <typename To, typename From>
inline To bit_cast(From from) {
  if constexpr (std::is_same_v<From, real>) return bit_cast<To>(static_cast<decltype(1.0f)>(from.value));
  else if constexpr (std::is_same_v<To, real>) return real(bit_cast<decltype(1.0f)>(from));
  else {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
  }
}

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline int64_t inside(int64_t start, int64_t size, int64_t extent) {
  return max<int64_t>(0, min<int64_t>(extent, size - start));
}

template <typename To, typename From>
inline void copy_row(To* to, const From* from, int64_t size) {
  for (int64_t k = 0; k < size; ++k) {
    if constexpr (std::is_same_v<To, From>) to[k] = from[k];
    else to[k] = To(real(from[k]));
  }
}
template <typename T>
inline void copy_out(T* to, const T* from, int64_t size, int64_t) {
  copy_row(to, from, size);
}
inline void finish_rows() {}
template <typename To>
inline void clear_row(To* to, int64_t size) {
  for (int64_t k = 0; k < size; ++k) to[k] = To(real(0));
}

template <int SIZE>
inline real sum_row(const real* row) {
  real total = 0;
  for (int k = 0; k < SIZE; ++k) total = total + row[k];
  return total;
}

// C[M, N] += A · B with A[m, k] at a[m · am + k · ak], B[k, n] at b[k · bk + n · bn].
template <int M, int N, int K, typename A, typename B>
inline void gemm(const A* a, int am, int ak, const B* b, int bk, int bn, real* c) {
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      for (int k = 0; k < K; ++k) c[m * N + n] = fma(real(a[m * am + k * ak]), real(b[k * bk + n * bn]), c[m * N + n]);
}
template <int M, int N, int K, typename A, typename B>
inline void gemm_nt(const A* a, const B* b, real* c) {
  gemm<M, N, K>(a, K, 1, b, 1, K, c);
}
template <int M, int N, int K, typename A, typename B>
inline void gemm_nn(const A* a, const B* b, real* c) {
  gemm<M, N, K>(a, K, 1, b, N, 1, c);
}
template <int M, int N, int K, typename A, typename B>
inline void gemm_tn(const A* a, const B* b, real* c) {
  gemm<M, N, K>(a, 1, M, b, N, 1, c);
}

}  // namespace mhc

extern "C" void mhc_arithmetic(double amplitude, uint64_t seed) {
  mhc::amplitude = amplitude;
  mhc::state = seed * 2 + 1;
  mhc::operations = 0;
}
extern "C" uint64_t mhc_operations() { return mhc::operations; }

#define float mhc::real
#define __builtin_fmaf mhc::fma
