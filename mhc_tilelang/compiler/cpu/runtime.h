// What the generated CPU kernels call: 16-bit floats, exp, and the matrix product of a tile.
//
// Everything here is written so that a C++ compiler turns loops over it into vector code, and so that the
// bits do not depend on the vector width of the machine's registers: sums run over LANES partial sums in a
// fixed order, in as many registers as that takes. Needs C++17 and the vector extensions of GCC or clang.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>  // 0.6 s of every kernel's compilation: nothing else may need it
#endif

#define MHC_INLINE inline __attribute__((always_inline))

// Before a loop whose iterations do not depend on each other.
#ifdef __clang__
#define MHC_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define MHC_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace mhc {

template <typename To, typename From>
MHC_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// bfloat16 and float16 in memory; arithmetic is float. Stores round to nearest, ties to even; NaN stays NaN.
struct bfloat16 {
  uint16_t bits;
  bfloat16() = default;
  MHC_INLINE explicit bfloat16(float value) {
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    bits = uint16_t((word & 0x7fffffffu) > 0x7f800000u ? (word >> 16) | 0x40u : rounded);
  }
  MHC_INLINE operator float() const { return bit_cast<float>(uint32_t(bits) << 16); }
};

struct float16 {
  uint16_t bits;
  float16() = default;
  MHC_INLINE explicit float16(float value) {
    const uint32_t word = bit_cast<uint32_t>(value);
    const uint32_t sign = (word >> 16) & 0x8000u, magnitude = word & 0x7fffffffu;
    // Normal results: move the exponent's bias from 127 to 15 and round the 13 bits that fall off.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 adding 0.5 makes the float unit round to float16's fixed spacing of 2^-24.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;  // overflow, infinity
    result = magnitude > 0x7f800000u ? 0x7e00u : result;   // NaN
    bits = uint16_t(sign | result);
  }
  MHC_INLINE operator float() const {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    const float normal = bit_cast<float>((magnitude << 13) + 0x38000000u);
    const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
    const float special = bit_cast<float>((magnitude << 13) | 0x7f800000u);  // infinity, NaN
    float value = magnitude < 0x0400u ? subnormal : normal;
    value = magnitude >= 0x7c00u ? special : value;
    return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
  }
};

// Four significant bits from 2^-6 to 448; beyond it saturates, infinity too. Kernels only write it.
struct float8_e4m3fn {
  uint8_t bits;
  float8_e4m3fn() = default;
  MHC_INLINE explicit float8_e4m3fn(float value) {
    const uint32_t word = bit_cast<uint32_t>(value), magnitude = word & 0x7fffffffu;
    // Normal results: move the exponent's bias from 127 to 7 and round the 20 bits that fall off.
    const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    // Below 2^-6 adding 2^14 makes the float unit round to the fixed spacing of 2^-9.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0x1p14f) - 0x46800000u;
    uint32_t result = magnitude < 0x3c800000u ? subnormal : normal;
    result = magnitude >= 0x43e00000u ? 0x7eu : result;  // 448
    bits = uint8_t(magnitude > 0x7f800000u ? 0x7fu : ((word >> 24) & 0x80u) | result);  // NaN has no sign
  }
};

#ifdef __AVX512BF16__
// Whether a magnitude is below 2^-126 and not zero.
MHC_INLINE __mmask16 any_subnormal(__m512 v) {
  const __m512i doubled = _mm512_slli_epi32(_mm512_castps_si512(v), 1);
  return _mm512_cmplt_epu32_mask(_mm512_sub_epi32(doubled, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x00ffffff));
}
#endif

// exp to about 1 ULP: 2^k · p(r), |r| ≤ ln 2 / 2, p the Taylor polynomial of degree 7 (remainder 6e-9).
// 2^k is applied in two halves so that results down to the subnormals are reached.
MHC_INLINE float exp(float x) {
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  const float k = __builtin_floorf(clamped * 1.44269504f + 0.5f);
  float r = __builtin_fmaf(k, -0x1.62e4p-1f, clamped);  // ln 2 in two parts, the first exact in 12 bits
  r = __builtin_fmaf(k, -0x1.7f7d1cp-20f, r);
  float p = 0x1.a01a02p-13f;
  p = __builtin_fmaf(p, r, 0x1.6c16c2p-10f);
  p = __builtin_fmaf(p, r, 0x1.111112p-7f);
  p = __builtin_fmaf(p, r, 0x1.555556p-5f);
  p = __builtin_fmaf(p, r, 0x1.555556p-3f);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p, r, 1.0f);
  p = __builtin_fmaf(p, r, 1.0f);
  const int32_t whole = int32_t(k), half = whole >> 1;
  const float value = p * bit_cast<float>((half + 127) << 23) * bit_cast<float>((whole - half + 127) << 23);
  return x != x ? x : value;
}

MHC_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

template <typename T>
MHC_INLINE constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
MHC_INLINE constexpr T max(T a, T b) {
  return a < b ? b : a;
}

// How many of `extent` elements from `start` lie inside a dimension of `size`.
MHC_INLINE int64_t inside(int64_t start, int64_t size, int64_t extent) {
  return max<int64_t>(0, min<int64_t>(extent, size - start));
}

// A row of a tile: moved as it is, or converted. Sixteen-bit stores are most of the work of the apply kernels,
// so they use the processor's own conversion where it has one.
template <typename To, typename From>
MHC_INLINE void copy_row(To* to, const From* from, int64_t size) {
  if constexpr (std::is_same_v<To, From>) {
    constexpr int64_t STEP = 64 / sizeof(To);  // a cache line at a time: a call of memcpy a row cost expand 20 %
    int64_t k = 0;
    for (; k + STEP <= size; k += STEP) std::memcpy(to + k, from + k, 64);
    std::memcpy(to + k, from + k, size_t(size - k) * sizeof(To));
  } else {
    int64_t k = 0;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<To, bfloat16> && std::is_same_v<From, float>) {
      for (; k + 32 <= size; k += 32) {
        const __m512 low = _mm512_loadu_ps(from + k), high = _mm512_loadu_ps(from + k + 16);
        if (any_subnormal(low) | any_subnormal(high)) {  // the instruction would flush them to zero
          for (int64_t l = k; l < k + 32; ++l) to[l] = To(from[l]);
        } else {
          _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
      }
    }
#endif
#ifdef __AVX512F__
    if constexpr (std::is_same_v<To, float16> && std::is_same_v<From, float>) {
      for (; k + 16 <= size; k += 16)
        _mm256_storeu_si256((__m256i*)(to + k), _mm512_cvtps_ph(_mm512_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; k < size; ++k) to[k] = To(from[k]);
  }
}

// Bytes of the last-level cache that a core sees; 32 MiB where Linux does not tell. (sysconf adds up those of a package.)
inline int64_t last_level_cache() {
  static const int64_t found = [] {
    long kilobytes = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
      std::fclose(file);
    }
    return int64_t(kilobytes > 0 ? kilobytes : 32 << 10) << 10;
  }();
  return found;
}

#ifdef __AVX__
typedef long long Packed32 __attribute__((vector_size(32)));

// 32 bytes from anywhere to an address that is a multiple of 32.
MHC_INLINE void write_past_caches(void* to, const void* from) {
  Packed32 packed;
  std::memcpy(&packed, from, sizeof packed);
#ifdef __clang__
  __builtin_nontemporal_store(packed, (Packed32*)to);
#else
  __builtin_ia32_movntdq256((Packed32*)to, packed);
#endif
}
#endif

// A row of a tensor of `bytes`, written as it is. One that the last-level cache does not hold is written past it: else
// its lines are read to be overwritten (expand at 20 and 40 MiB: 1.5 times the time). Small ones are left to be read.
template <typename T>
MHC_INLINE void copy_out(T* to, const T* from, int64_t size, int64_t bytes) {
#ifdef __AVX__
  if (bytes > last_level_cache()) {
    constexpr int64_t STEP = 32 / sizeof(T);
    int64_t k = 0;
    for (; k < size && uintptr_t(to + k) % 32 != 0; ++k) to[k] = from[k];
    for (; k + STEP <= size; k += STEP)
      write_past_caches(to + k, from + k);
    for (; k < size; ++k) to[k] = from[k];
    return;
  }
#endif
  copy_row(to, from, size);
}

// Behind a block that wrote so: its rows are in memory before whoever waits for the block goes on.
MHC_INLINE void finish_rows() {
#ifdef __AVX__
  __builtin_ia32_sfence();
#endif
}

template <typename To>
MHC_INLINE void clear_row(To* to, int64_t size) {
  for (int64_t k = 0; k < size; ++k) to[k] = To(0.0f);
}

// The index itself, or the end of the program if it lies outside (checked builds only).
MHC_INLINE int64_t checked(int64_t index, int64_t size, const char* buffer) {
  if (index < 0 || index >= size) {
    std::fprintf(stderr, "%s: index %lld outside its %lld elements\n", buffer, (long long)index, (long long)size);
    std::abort();
  }
  return index;
}

// LANES partial sums take PARTS registers. No vector is wider than a register: a compiler keeps such a one in memory
// and takes it apart element by element.
constexpr int LANES = 16;
#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 32;
#else
constexpr int WIDTH = 4, REGISTERS = 16;
#endif
constexpr int PARTS = LANES / WIDTH;
typedef float floats __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t indices __attribute__((vector_size(WIDTH * sizeof(int32_t))));
using each_lane = std::make_integer_sequence<int, WIDTH>;

MHC_INLINE floats load(const float* from) {
  floats to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

MHC_INLINE void store(float* to, floats v) { std::memcpy(to, &v, sizeof(v)); }

MHC_INLINE floats broadcast(float value) {
  floats to;
  for (int l = 0; l < WIDTH; ++l) to[l] = value;
  return to;
}

MHC_INLINE floats fma(floats a, floats b, floats c) {
  for (int l = 0; l < WIDTH; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
}

// HALF lanes of each run of 2·HALF lanes, from `FROM` on: of a's first run, of b's, of a's second, …
template <int HALF, int FROM, int... L>
MHC_INLINE floats interleaved(floats a, floats b, std::integer_sequence<int, L...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((L & ~HALF) + FROM + (L & HALF ? WIDTH : 0))...);
#else
  return __builtin_shuffle(a, b, indices{((L & ~HALF) + FROM + (L & HALF ? WIDTH : 0))...});
#endif
}

// The sums of l and l + HALF in each run of 2·HALF lanes, a's runs and b's in turns.
template <int HALF>
MHC_INLINE floats folded(floats a, floats b) {
  return interleaved<HALF, 0>(a, b, each_lane{}) + interleaved<HALF, HALF>(a, b, each_lane{});
}

// The sum of the lanes, pairwise: l and l + WIDTH / 2, then l + WIDTH / 4, …
template <int HALF = WIDTH / 2>
MHC_INLINE float sum(floats v) {
  if constexpr (HALF == 0)
    return v[0];
  else
    return sum<HALF / 2>(v + interleaved<HALF, HALF>(v, v, each_lane{}));  // lanes from HALF on: don't-care
}

// The same of WIDTH vectors, one a lane, in a fraction of the instructions.
template <int HALF = WIDTH / 2>
MHC_INLINE floats sums(const floats* v) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    floats half[HALF];
#pragma GCC unroll 8
    for (int k = 0; k < HALF; ++k) half[k] = folded<HALF>(v[k], v[k + HALF]);
    return sums<HALF / 2>(half);
  }
}

// LANES partial sums, added pairwise until they fit a register: l and l + LANES / 2, then l + LANES / 4, …
template <int COUNT = PARTS>
MHC_INLINE floats add_parts(const floats* parts) {
  if constexpr (COUNT == 1) {
    return parts[0];
  } else {
    floats half[COUNT / 2];
#pragma GCC unroll 2
    for (int p = 0; p < COUNT / 2; ++p) half[p] = parts[p] + parts[p + COUNT / 2];
    return add_parts<COUNT / 2>(half);
  }
}

// The sum of a row: lane l adds the elements l, l + LANES, …; then the lanes.
template <int SIZE>
MHC_INLINE float sum_row(const float* row) {
  static_assert(SIZE % LANES == 0);
  floats total[PARTS];
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) {
    total[p] = load(row + p * WIDTH);
    for (int k = p * WIDTH + LANES; k < SIZE; k += LANES) total[p] += load(row + k);
  }
  return sum(add_parts(total));
}

constexpr int largest_divisor(int size, int limit) {
  int divisor = limit;
  while (size % divisor) --divisor;
  return divisor;
}

// C[ROWS, COLUMNS] += A[ROWS, K] · B[COLUMNS, K]ᵀ for one block: STEP columns at a time, whose LANES partial sums a row
// fill half of the registers.
template <int ROWS, int COLUMNS, int K>
MHC_INLINE void gemm_block(const float* a, const float* b, float* c, int ldc) {
  constexpr int STEP = largest_divisor(COLUMNS, max(1, REGISTERS / 2 / (ROWS * PARTS)));
  floats dots[COLUMNS][ROWS];
#pragma GCC unroll 4
  for (int first = 0; first < COLUMNS; first += STEP) {
    floats acc[STEP][ROWS][PARTS] = {};
    for (int k = 0; k < K; k += LANES) {
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) {
        floats row[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) row[r] = load(a + r * K + k + p * WIDTH);
#pragma GCC unroll 4
        for (int n = 0; n < STEP; ++n) {
          const floats column = load(b + (first + n) * K + k + p * WIDTH);
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r) acc[n][r][p] = fma(row[r], column, acc[n][r][p]);
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < STEP; ++n)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) dots[first + n][r] = add_parts(acc[n][r]);
  }
  if constexpr (ROWS * COLUMNS == WIDTH) {
    const floats total = sums(dots[0]);
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < COLUMNS; ++n) c[r * ldc + n] += total[n * ROWS + r];
  } else {
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < COLUMNS; ++n) c[r * ldc + n] += sum(dots[n][r]);
  }
}

// Elements as floats: where they are, or in `copies`.
template <typename T>
MHC_INLINE const float* as_floats(const T* from, int64_t size, float* copies) {
  if constexpr (std::is_same_v<T, float>) {
    return from;
  } else {
    copy_row(copies, from, size);
    return copies;
  }
}

// C[M, N] += A[M, K] · B[N, K]ᵀ, products and sums in float, WIDTH elements at a time.
template <int M, int N, int K, typename A, typename B>
inline void gemm_nt(const A* a, const B* b, float* c) {
  static_assert(K % LANES == 0, "the tile's inner dimension must be a multiple of LANES");
  constexpr int COLUMNS = largest_divisor(N, WIDTH / 4), ROWS = largest_divisor(M, WIDTH / COLUMNS);
  alignas(64) float of_a[ROWS * K], of_b[N * K];
  const float* columns = as_floats(b, N * K, of_b);
  for (int m = 0; m < M; m += ROWS) {
    const float* rows = as_floats(a + m * K, ROWS * K, of_a);
    for (int n = 0; n < N; n += COLUMNS) gemm_block<ROWS, COLUMNS, K>(rows, columns + n * K, c + m * N + n, N);
  }
}

// C[ROWS, VECTORS · WIDTH] += A · B for one block whose sums stay in registers: a row of B at a time, each element of
// A's column times that row. A[row, k] is a[row · row_step + k · k_step].
template <int ROWS, int VECTORS, int K, typename A>
MHC_INLINE void outer_block(const A* a, int row_step, int k_step, const float* b, float* c, int ldc) {
  floats acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = load(c + r * ldc + v * WIDTH);
  for (int k = 0; k < K; ++k) {
    floats row[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + (k * VECTORS + v) * WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const floats factor = broadcast(float(a[r * row_step + k * k_step]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(factor, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(c + r * ldc + v * WIDTH, acc[r][v]);
}

// C[M, N] += A · B[K, N], with A[m, k] at a[m · row_step + k · k_step]. B goes panel by panel, copied: a tile's
// rows are a power of two apart and would meet in a few sets of the cache. 24 sums, 4 vectors of B and one of A take
// 29 of 32 registers; 12, 2 and 1 take 15 of 16.
template <int M, int N, int K, typename A, typename B>
inline void gemm_outer(const A* a, int row_step, int k_step, const B* b, float* c) {
  static_assert(N % LANES == 0, "the tile's last dimension must be a multiple of LANES");
  constexpr int ROWS = largest_divisor(M, 6), VECTORS = largest_divisor(N / WIDTH, REGISTERS / 8);
  constexpr int COLUMNS = VECTORS * WIDTH;
  alignas(64) float panel[K * COLUMNS];
  for (int n = 0; n < N; n += COLUMNS) {
    for (int k = 0; k < K; ++k) copy_row(panel + k * COLUMNS, b + k * N + n, COLUMNS);
    for (int m = 0; m < M; m += ROWS)
      outer_block<ROWS, VECTORS, K>(a + m * row_step, row_step, k_step, panel, c + m * N + n, N);
  }
}

// C[M, N] += A[M, K] · B[K, N].
template <int M, int N, int K, typename A, typename B>
inline void gemm_nn(const A* a, const B* b, float* c) {
  gemm_outer<M, N, K>(a, K, 1, b, c);
}

// C[M, N] += A[K, M]ᵀ · B[K, N].
template <int M, int N, int K, typename A, typename B>
inline void gemm_tn(const A* a, const B* b, float* c) {
  gemm_outer<M, N, K>(a, 1, M, b, c);
}

}  // namespace mhc
