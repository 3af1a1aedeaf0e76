"""Thread-level code: for kernels that place every element themselves instead of leaving that to tilelang's layouts.

No layout is inferred, so such a kernel is lowered in seconds; barriers, waits and bounds are its own to set.
"""

import tilelang.language as T
from tilelang import PassConfigKey
from tvm import tirx

WARP, WARP_TOKENS, WARP_CHANNELS, VECTOR = 32, 16, 32, 8
WORDS = VECTOR // 2  # of 32 bits in a vector of 16-bit elements
# tilelang would add barriers, and guards around accesses: both are written out here.
PASS_CONFIGS = (PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC.value, PassConfigKey.TL_DISABLE_SAFE_MEMORY_ACCESS.value)
PASS_CONFIGS_ATTR = "mhc.pass_configs"  # of a function: passes that are off for it alone


def place_no_guards(func):
    """The function of a kernel that has its own barriers and guards: tilelang is told to add none."""
    return func.with_attr(PASS_CONFIGS_ATTR, list(PASS_CONFIGS))


def fma(a, b, c):
    """a · b + c, rounded once."""
    return T.ieee_fmaf(a, b, c)


def mma(a, a_at, b, b_at, c, c_at, dtype="bfloat16"):
    """c[c_at : c_at + 4] += a · b: m16n8k16 of 16-bit operands with float32 sums; places count elements."""
    operand = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    kinds = ("float32", "m16n8k16", "row", "col", operand, operand, "fp32")
    return T.ptx_mma(*kinds, a.data, a_at, b.data, b_at, c.data, c_at, T.bool(False))


def copy_async(to, source, elements=VECTOR):
    """Start to copy into shared memory; there after a wait."""
    return T.ptx_cp_async(T.access_ptr(to, "w", elements), T.access_ptr(source, "r", elements), elements)


def store_vector(to, words, at, inside):
    """Store the 16 bytes of words[at : at + 4] that are `inside`, as one instruction: inline PTX, never split."""
    address = T.access_ptr(to, "w", VECTOR)
    return tirx.call_intrin("handle", tirx.op.Op.get("tl.stg128"), address, words[T.Ramp(at, 1, WORDS)], inside)


def low_half(word, dtype="bfloat16"):
    """The first of a word's two 16-bit values, as float32."""
    if dtype == "float16":
        return T.cast(T.reinterpret(T.cast(word, T.uint16), T.float16), T.float32)
    return T.reinterpret(T.shift_left(word, T.uint32(16)), T.float32)


def high_half(word, dtype="bfloat16"):
    """The second."""
    if dtype == "float16":
        return low_half(T.shift_right(word, T.uint32(16)), dtype)
    return T.reinterpret(T.bitwise_and(word, T.uint32(0xFFFF0000)), T.float32)


def vector_at(source, inside):
    """The 16 bytes at `source` as words, zeros where they are not `inside`: inline PTX, which stays where it is."""
    return T.ldg128(source, pred=inside)


@T.macro
def pack(words, at, values, dtype="bfloat16"):
    """words[at] = the two values, rounded to 16 bits."""
    pair = T.alloc_local((2,), dtype)
    whole = T.view(pair, (1,), T.uint32)
    for e in T.vectorized(2):
        pair[e] = T.cast(values[e], dtype)
    words[at] = whole[0]


@T.macro
def clear_sums(*sums):
    """All, from zero."""
    for values in sums:
        for e in T.unroll(values.shape[0]):
            values[e] = 0.0
