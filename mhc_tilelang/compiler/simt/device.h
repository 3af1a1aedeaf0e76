// CUDA and tilelang's device templates, as far as the generated kernels use them, for a CPU.
//
// Stands in place of the headers that the generated source includes. Whatever it lacks fails to compile, by name: no
// construct is skipped. Threads, barriers and memory are the executor's (interface.h); types and rounding are here.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "interface.h"

#define __global__
#define __device__
#define __shared__ static __attribute__((section("simt_shared")))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define SIMT_INLINE inline __attribute__((always_inline))
#define SIMT_UNWATCHED __attribute__((no_sanitize_thread, noinline))

#define threadIdx (simt_thread_index())
#define blockIdx (simt_block_index())

using uchar = unsigned char;
using uint = unsigned int;
using ushort = unsigned short;

#define CUDART_INF_F __builtin_inff()

// ---- vectors: one access each, as wide as the type, which is what the GPU would do -----------------------------

#define SIMT_VECTOR(NAME, ELEMENT, COUNT, ...)                                       \
    struct alignas(sizeof(ELEMENT) * COUNT) NAME {                                   \
        typedef ELEMENT Whole __attribute__((vector_size(sizeof(ELEMENT) * COUNT))); \
        union {                                                                      \
            struct {                                                                 \
                ELEMENT __VA_ARGS__;                                                 \
            };                                                                       \
            Whole whole;                                                             \
        };                                                                           \
        NAME() = default;                                                            \
        SIMT_INLINE NAME(const NAME& other) : whole(other.whole) {}                  \
        SIMT_INLINE NAME& operator=(const NAME& other) {                             \
            whole = other.whole;                                                     \
            return *this;                                                            \
        }                                                                            \
    };

SIMT_VECTOR(uint1, unsigned, 1, x)
SIMT_VECTOR(uint2, unsigned, 2, x, y)
SIMT_VECTOR(uint4, unsigned, 4, x, y, z, w)
SIMT_VECTOR(float2, float, 2, x, y)
SIMT_VECTOR(float4, float, 4, x, y, z, w)

SIMT_INLINE uint1 make_uint1(unsigned x) {
    uint1 made;
    made.x = x;
    return made;
}
SIMT_INLINE float2 make_float2(float x, float y) {
    float2 made;
    made.whole = (float2::Whole){x, y};
    return made;
}
SIMT_INLINE float4 make_float4(float x, float y, float z, float w) {
    float4 made;
    made.whole = (float4::Whole){x, y, z, w};
    return made;
}
SIMT_INLINE uint2 make_uint2(unsigned x, unsigned y) {
    uint2 made;
    made.whole = (uint2::Whole){x, y};
    return made;
}
SIMT_INLINE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    uint4 made;
    made.whole = (uint4::Whole){x, y, z, w};
    return made;
}

// ---- 16-bit floats, rounded to nearest even as cvt.rn does -----------------------------------------------------

template <typename To, typename From>
SIMT_INLINE To simt_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits need the same size");
    To bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit SIMT_INLINE bfloat16_t(float value) {
        const uint32_t u = simt_bits<uint32_t>(value);
        bits = value != value ? 0x7FFF : uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    explicit SIMT_INLINE operator float() const { return simt_bits<float>(uint32_t(bits) << 16); }
};

struct half_t {
    uint16_t bits;
    half_t() = default;
    explicit SIMT_INLINE half_t(float value) : bits(of(value)) {}
    explicit operator float() const {
        const int exponent = bits >> 10 & 31, fraction = bits & 0x3FF;
        const uint32_t sign = uint32_t(bits & 0x8000) << 16;
        if (exponent == 31) return simt_bits<float>(sign | 0x7F800000 | uint32_t(fraction) << 13);
        const float size = __builtin_ldexpf(float(exponent ? fraction + 0x400 : fraction), (exponent ? exponent : 1) - 25);
        return sign ? -size : size;
    }

  private:
    static uint16_t of(float value) {
        const uint16_t sign = simt_bits<uint32_t>(value) >> 16 & 0x8000;
        const float size = __builtin_fabsf(value);
        if (value != value) return 0x7FFF;
        if (size >= 65520.0f) return sign | 0x7C00;  // halfway from 65504, the largest, to the next power
        if (size < 0x1p-14f) return sign | uint16_t(__builtin_nearbyintf(size * 0x1p24f));
        const int exponent = __builtin_ilogbf(size);
        const int units = int(__builtin_nearbyintf(__builtin_ldexpf(size, 10 - exponent)));  // 1024 to 2048: that carries
        return sign | uint16_t((exponent + 15) * 1024 + units - 1024);
    }
};

// e4m3, rounded to nearest even and saturated as cvt.rn.satfinite does; NaN is 0x7F.
using __nv_fp8x2_storage_t = uint16_t;
enum { __NV_SATFINITE, __NV_E4M3 };

struct fp8_e4_t {
    uint8_t bits;
    fp8_e4_t() = default;
    explicit SIMT_INLINE fp8_e4_t(float value) : bits(of(value)) {}
    static uint8_t of(float value) {
        const uint8_t sign = simt_bits<uint32_t>(value) >> 24 & 0x80;
        const float size = __builtin_fabsf(value);
        if (value != value) return 0x7F;
        if (size >= 448.0f) return sign | 0x7E;
        const int exponent = size < 0x1p-6f ? -6 : __builtin_ilogbf(size);
        const int units = int(__builtin_nearbyintf(__builtin_ldexpf(size, 3 - exponent)));  // 8 to 16 from 2^-6 on: that carries
        return sign | uint8_t((exponent + 6) * 8 + units);
    }
};
SIMT_VECTOR(fp8_e4_2_t, uint8_t, 2, x, y)
SIMT_VECTOR(fp8_e4_4_t, uint8_t, 4, x, y, z, w)
SIMT_VECTOR(fp8_e4_8_t, uint32_t, 2, x, y)

SIMT_INLINE uint16_t __nv_cvt_float2_to_fp8x2(float2 v, int, int) { return fp8_e4_t::of(v.x) | fp8_e4_t::of(v.y) << 8; }

// Two of them are one 32-bit register.
template <typename Half>
struct alignas(4) SimtPair {
    uint32_t whole;
    SimtPair() = default;
    SIMT_INLINE SimtPair(Half x, Half y) : whole(uint32_t(x.bits) | uint32_t(y.bits) << 16) {}
    SIMT_INLINE float2 floats() const {
        Half x, y;
        x.bits = uint16_t(whole);
        y.bits = uint16_t(whole >> 16);
        return make_float2(float(x), float(y));
    }
};
using __nv_bfloat162 = SimtPair<bfloat16_t>;
using __half2 = SimtPair<half_t>;
using half2 = __half2;

SIMT_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {bfloat16_t(v.x), bfloat16_t(v.y)}; }
SIMT_INLINE __half2 __float22half2_rn(float2 v) { return {half_t(v.x), half_t(v.y)}; }
SIMT_INLINE float2 __bfloat1622float2(__nv_bfloat162 v) { return v.floats(); }
SIMT_INLINE float2 __half22float2(__half2 v) { return v.floats(); }
SIMT_INLINE unsigned __pack_nv_bfloat162(bfloat16_t x, bfloat16_t y) { return __nv_bfloat162(x, y).whole; }
SIMT_INLINE unsigned __pack_half2(half_t x, half_t y) { return __half2(x, y).whole; }

// ---- arithmetic -------------------------------------------------------------------------------------------------

SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
extern "C" float expf(float);  // all that kernels call of <cmath>, which takes half of their compilation to read
namespace tl {
SIMT_INLINE float fast_rcp(float x) { return 1.0f / x; }
}  // namespace tl
SIMT_INLINE float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }

template <typename T>
SIMT_INLINE T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
SIMT_INLINE T max(T a, T b) {
    return a < b ? b : a;
}
SIMT_INLINE float max(float a, float b) { return __builtin_fmaxf(a, b); }  // of a number and NaN the number, as PTX
SIMT_INLINE float min(float a, float b) { return __builtin_fminf(a, b); }

// ---- what a block and a warp do together ------------------------------------------------------------------------

SIMT_INLINE void __syncthreads() { simt_barrier(0, 0); }
SIMT_INLINE void __syncwarp(unsigned = 0xFFFFFFFFu) {
    SimtLane lane{};
    simt_warp(SIMT_SYNCWARP, &lane);
}

namespace tl {

template <int id, int count>
SIMT_INLINE void __sync_thread_partial() {
    simt_barrier(id, count);
}

template <typename T>
SIMT_INLINE T shfl_xor_sync(unsigned, T value, int offset) {  // of whole warps: masks are not looked at
    static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
    SimtLane lane{};
    lane.value = simt_bits<uint32_t>(value);
    lane.exclusive_or = offset & 31;
    simt_warp(SIMT_SHUFFLE, &lane);
    return simt_bits<T>(lane.value);
}

struct SumOp {
    template <typename T>
    SIMT_INLINE T operator()(T x, T y) const {
        return x + y;
    }
};
struct MaxOp {
    template <typename T>
    SIMT_INLINE T operator()(T x, T y) const {
        return max(x, y);
    }
};

struct SyncThreadsBarrier {
    template <int id = 0>
    static SIMT_INLINE void sync() {
        simt_barrier(0, 0);
    }
};
template <int count>
struct NamedBarrier {
    template <int id = 1>
    static SIMT_INLINE void sync() {
        simt_barrier(id, count);
    }
};

// A butterfly over `threads` threads, halving: by shared memory while partners are in other warps, then by shuffles.
// `batch` values at a time, whose slices of shared memory are `stride` apart.
template <class Reducer, int threads, int scale, int first_thread = 0, class Barrier = SyncThreadsBarrier,
          int batch = 1, int stride = 0>
struct AllReduce {
    template <typename T>
    static SIMT_INLINE void run_batch(T* x, T* workspace = nullptr) {
        const int thread = int(threadIdx.x) - first_thread;
        for (int offset = threads / 2; offset >= scale; offset /= 2) {
            if (offset >= 32) {
                Barrier::template sync<1>();
                for (int k = 0; k < batch; ++k) workspace[thread + k * stride] = x[k];
                Barrier::template sync<2>();
                for (int k = 0; k < batch; ++k) x[k] = Reducer()(x[k], workspace[(thread ^ offset) + k * stride]);
            } else {
                for (int k = 0; k < batch; ++k) x[k] = Reducer()(x[k], shfl_xor_sync(0xFFFFFFFFu, x[k], offset));
            }
        }
    }
    template <typename T>
    static SIMT_INLINE T run(T x, T* workspace = nullptr) {
        run_batch(&x, workspace);
        return x;
    }
};

// ---- asynchronous copies ----------------------------------------------------------------------------------------

template <int bytes>
SIMT_INLINE void cp_async_gs(const void* to, const void* from) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    simt_copy_async(const_cast<void*>(to), from, bytes, false);
}
template <int bytes>
SIMT_INLINE void cp_async_gs_conditional(const void* to, const void* from, bool condition) {
    static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
    simt_copy_async(const_cast<void*>(to), from, bytes, !condition);
}
SIMT_INLINE void cp_async_commit() { simt_copy_commit(); }
template <int pending>
SIMT_INLINE void cp_async_wait() {
    simt_copy_wait(pending);
}

// ---- loads and stores that are one instruction -----------------------------------------------------------------------

SIMT_INLINE uint4 load_global_128(const void* from) { return *static_cast<const uint4*>(from); }
SIMT_INLINE uint4 load_global_128_conditional(const void* from, bool inside) {
    return inside ? *static_cast<const uint4*>(from) : uint4{};
}
SIMT_INLINE void store_global_128(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }
SIMT_INLINE void store_global_128_conditional(void* to, uint4 value, bool inside) {
    if (inside) *static_cast<uint4*>(to) = value;
}

}  // namespace tl

// ---- atomics: of integers, in global memory -----------------------------------------------------------------------------

SIMT_INLINE int AtomicAddRet(int* at, int value, int order = 0) { return simt_atomic(SIMT_ADD, at, value, order); }
SIMT_INLINE void AtomicAdd(int* at, int value, int order = 0) { simt_atomic(SIMT_ADD, at, value, order); }
SIMT_INLINE int AtomicLoad(const int* at, int order) { return simt_atomic(SIMT_LOAD, const_cast<int*>(at), 0, order); }
SIMT_INLINE void AtomicStore(int* at, int value, int order) { simt_atomic(SIMT_STORE, at, value, order); }
SIMT_INLINE void __threadfence() { simt_fence(); }

namespace tl {

// ---- tensor cores -----------------------------------------------------------------------------------------------

SIMT_INLINE void load_matrices(const void* row, void* registers, int matrices, bool transposed) {
    SimtLane lane{};
    lane.row = row;
    lane.out = static_cast<uint32_t*>(registers);
    lane.matrices = matrices;
    lane.transposed = transposed;
    simt_warp(SIMT_LDMATRIX, &lane);
}
SIMT_INLINE void ptx_ldmatrix_x1(const void* row, void* out) { load_matrices(row, out, 1, false); }
SIMT_INLINE void ptx_ldmatrix_x2(const void* row, void* out) { load_matrices(row, out, 2, false); }
SIMT_INLINE void ptx_ldmatrix_x4(const void* row, void* out) { load_matrices(row, out, 4, false); }
SIMT_INLINE void ptx_ldmatrix_x1_trans(const void* row, void* out) { load_matrices(row, out, 1, true); }
SIMT_INLINE void ptx_ldmatrix_x2_trans(const void* row, void* out) { load_matrices(row, out, 2, true); }
SIMT_INLINE void ptx_ldmatrix_x4_trans(const void* row, void* out) { load_matrices(row, out, 4, true); }

enum class DataType { kFloat16, kBFloat16, kTensorFloat32, kFloat32 };

constexpr SimtOperand operand_of(DataType type) {
    return type == DataType::kBFloat16 ? SIMT_BFLOAT16 : type == DataType::kFloat16 ? SIMT_FLOAT16 : SIMT_TFLOAT32;
}

template <DataType A, DataType B, DataType C, int M, int N, int K, bool A_TRANSPOSED, bool B_TRANSPOSED>
SIMT_INLINE void mma_sync(float* c, const unsigned* a, const unsigned* b) {
    static_assert(A == B && A != DataType::kFloat32 && C == DataType::kFloat32, "operands of one type, float32 sums");
    static_assert(M == 16 && N == 8 && K == (A == DataType::kTensorFloat32 ? 8 : 16), "m16n8k16, or m16n8k8 of TF32");
    static_assert(!A_TRANSPOSED && B_TRANSPOSED, "mma.sync has A by rows and B by columns");
    SimtLane lane{};
    lane.operand = operand_of(A);
    lane.c = c;
    lane.a = a;
    lane.b = b;
    simt_warp(SIMT_MMA, &lane);
}

}  // namespace tl

// The kernel with its arguments by address, in the order of its parameters.
template <typename... Parameters, size_t... I>
SIMT_UNWATCHED void simt_apply(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...);
}
template <typename... Parameters>
SIMT_UNWATCHED void simt_apply(void (*kernel)(Parameters...), void** arguments) {
    simt_apply(kernel, arguments, std::index_sequence_for<Parameters...>());
}

template <typename T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int offset, int = 32) {
    return tl::shfl_xor_sync(mask, value, offset);
}

#pragma GCC poison memcpy memmove memset  // which would move memory unwatched
