// What the generated CPU kernels call: 16-bit floats, exp, and the matrix product of a tile.
//
// Everything here is written so that a C++ compiler turns loops over it into vector code, and so that the
// bits do not depend on the vector width of the machine's registers: sums run over LANES partial sums in a
// fixed order. Needs C++17 and the vector extensions of GCC or clang.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
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
MHC_INLINE T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
MHC_INLINE T max(T a, T b) {
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

constexpr int LANES = 16;
typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

template <typename T>
MHC_INLINE lanes load(const T* from) {
  lanes to;
  for (int l = 0; l < LANES; ++l) to[l] = float(from[l]);
  return to;
}
template <>
MHC_INLINE lanes load(const float* from) {
  lanes to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
template <>
MHC_INLINE lanes load(const bfloat16* from) {
  typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
  typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
  halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  return bit_cast<lanes>(__builtin_convertvector(bits, words) << 16);
}

MHC_INLINE lanes fma(lanes a, lanes b, lanes c) {
  for (int l = 0; l < LANES; ++l) c[l] = __builtin_fmaf(a[l], b[l], c[l]);
  return c;
}

// The lanes from `FROM` on, the rest is don't-care.
template <int FROM>
MHC_INLINE lanes shifted(lanes v) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, (FROM + 0) % 16, (FROM + 1) % 16, (FROM + 2) % 16, (FROM + 3) % 16,
                                 (FROM + 4) % 16, (FROM + 5) % 16, (FROM + 6) % 16, (FROM + 7) % 16, 8, 9, 10,
                                 11, 12, 13, 14, 15);
#else
  typedef int32_t indices __attribute__((vector_size(sizeof(lanes))));
  const indices from = {FROM, FROM + 1, FROM + 2, FROM + 3, FROM + 4, FROM + 5, FROM + 6, FROM + 7,
                        8,    9,        10,       11,       12,       13,       14,       15};
  return __builtin_shuffle(v, from);  // indices count modulo LANES
#endif
}

// The sum of the lanes, pairwise: l and l + 8, then l + 4, l + 2, l + 1.
MHC_INLINE float sum(lanes v) {
  v += shifted<8>(v);
  v += shifted<4>(v);
  v += shifted<2>(v);
  v += shifted<1>(v);
  return v[0];
}

// The sum of a row: lane l adds the elements l, l + LANES, …; then the lanes.
template <int SIZE>
MHC_INLINE float sum_row(const float* row) {
  static_assert(SIZE % LANES == 0);
  lanes total = load(row);
  for (int k = LANES; k < SIZE; k += LANES) total += load(row + k);
  return sum(total);
}

// Each run of 2·HALF lanes folded onto HALF, of a and then of b.
template <int HALF>
MHC_INLINE lanes folded(lanes a, lanes b) {
#define MHC_LANE(k) (k) / HALF * 2 * HALF + (k) % HALF
#define MHC_LANES(from)                                                                                      \
  MHC_LANE(0) + from, MHC_LANE(1) + from, MHC_LANE(2) + from, MHC_LANE(3) + from, MHC_LANE(4) + from,        \
      MHC_LANE(5) + from, MHC_LANE(6) + from, MHC_LANE(7) + from, MHC_LANE(8) + from, MHC_LANE(9) + from,    \
      MHC_LANE(10) + from, MHC_LANE(11) + from, MHC_LANE(12) + from, MHC_LANE(13) + from, MHC_LANE(14) + from, \
      MHC_LANE(15) + from
#ifdef __clang__
  return __builtin_shufflevector(a, b, MHC_LANES(0)) + __builtin_shufflevector(a, b, MHC_LANES(HALF));
#else
  typedef int32_t indices __attribute__((vector_size(sizeof(lanes))));
  return __builtin_shuffle(a, b, indices{MHC_LANES(0)}) + __builtin_shuffle(a, b, indices{MHC_LANES(HALF)});
#endif
#undef MHC_LANES
#undef MHC_LANE
}

// The sums of 16 vectors' lanes, one a lane: each with the additions of `sum`, in a quarter of the instructions.
MHC_INLINE lanes sums(const lanes* v) {
  lanes eighths[8], quarters[4];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) eighths[k] = folded<8>(v[2 * k], v[2 * k + 1]);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) quarters[k] = folded<4>(eighths[2 * k], eighths[2 * k + 1]);
  return folded<1>(folded<2>(quarters[0], quarters[1]), folded<2>(quarters[2], quarters[3]));
}

// C[ROWS, COLUMNS] += A[ROWS, K] · B[COLUMNS, K]ᵀ for one block whose sums stay in registers.
template <int ROWS, int COLUMNS, int K, typename A, typename B>
MHC_INLINE void gemm_block(const A* a, const B* b, float* c, int ldc) {
  lanes acc[ROWS * COLUMNS] = {};
  for (int k = 0; k < K; k += LANES) {
    lanes row[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) row[r] = load(a + r * K + k);
#pragma GCC unroll 8
    for (int n = 0; n < COLUMNS; ++n) {
      const lanes column = load(b + n * K + k);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) acc[r * COLUMNS + n] = fma(row[r], column, acc[r * COLUMNS + n]);
    }
  }
  if constexpr (ROWS * COLUMNS == LANES) {
    const lanes total = sums(acc);
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < COLUMNS; ++n) c[r * ldc + n] += total[r * COLUMNS + n];
  } else {
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < COLUMNS; ++n) c[r * ldc + n] += sum(acc[r * COLUMNS + n]);
  }
}

#ifdef __AVX512F__
constexpr int BLOCK = 4;  // 16 sums of 16 lanes fill half of 32 registers
#else
constexpr int BLOCK = 2;
#endif

constexpr int block_of(int size) { return size % BLOCK == 0 ? BLOCK : (size % 2 == 0 ? 2 : 1); }

// C[M, N] += A[M, K] · B[N, K]ᵀ, products and sums in float.
template <int M, int N, int K, typename A, typename B>
inline void gemm_nt(const A* a, const B* b, float* c) {
  static_assert(K % LANES == 0, "the tile's inner dimension must be a multiple of LANES");
  constexpr int ROWS = block_of(M), COLUMNS = block_of(N);
  for (int m = 0; m < M; m += ROWS)
    for (int n = 0; n < N; n += COLUMNS)
      gemm_block<ROWS, COLUMNS, K>(a + m * K, b + n * K, c + m * N + n, N);
}

template <typename T>
MHC_INLINE void store(T* to, lanes v) {
  std::memcpy(to, &v, sizeof(v));
}

MHC_INLINE lanes broadcast(float value) { return lanes{} + value; }

// C[ROWS, VECTORS · LANES] += A · B for one block whose sums stay in registers: a row of B at a time, each element of
// A's column times that row. A[row, k] is a[row · row_step + k · k_step].
template <int ROWS, int VECTORS, int K, typename A, typename B>
MHC_INLINE void outer_block(const A* a, int row_step, int k_step, const B* b, int ldb, float* c, int ldc) {
  lanes acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = load(c + r * ldc + v * LANES);
  for (int k = 0; k < K; ++k) {
    lanes row[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const lanes factor = broadcast(float(a[r * row_step + k * k_step]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = fma(factor, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(c + r * ldc + v * LANES, acc[r][v]);
}

#ifdef __AVX512F__
constexpr int OUTER_VECTORS = 4, OUTER_ROWS = 6;  // 24 sums, 4 vectors of B, one of A: 29 of 32 registers
#else
constexpr int OUTER_VECTORS = 1, OUTER_ROWS = 4;
#endif

constexpr int largest_divisor(int size, int limit) {
  int divisor = limit;
  while (size % divisor) --divisor;
  return divisor;
}

// C[M, N] += A · B[K, N], with A[m, k] at a[m · row_step + k · k_step]. B's panel of a few vectors stays in the cache.
template <int M, int N, int K, typename A, typename B>
inline void gemm_outer(const A* a, int row_step, int k_step, const B* b, float* c) {
  static_assert(N % LANES == 0, "the tile's last dimension must be a multiple of LANES");
  constexpr int ROWS = largest_divisor(M, OUTER_ROWS), VECTORS = largest_divisor(N / LANES, OUTER_VECTORS);
  for (int n = 0; n < N; n += VECTORS * LANES)
    for (int m = 0; m < M; m += ROWS)
      outer_block<ROWS, VECTORS, K>(a + m * row_step, row_step, k_step, b + n, N, c + m * N + n, N);
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
