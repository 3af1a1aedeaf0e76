"""The reciprocal of `sinkhorn_thread` has the bits of a division, of every operand and whatever guess hardware makes.

Would catch: a Newton step that loses the last bit, one that is written with a product of its own, sums outside of the
range in which nvcc's division takes the same step, a compiler whose division is another.
"""

import re
from collections.abc import Iterator

import numpy as np
import pytest

from mhc_tilelang.perf.inspect.compiler import compile_source
from mhc_tilelang.spec import SMALLEST

# An operand is X · 2^k, 2^23 ≤ X < 2^24. Powers of two only shift what follows, as long as 1 / x is normal: so all
# operands of k = -23 are all there are. Their reciprocals count in units of 2^-24, and R such units are a guess.
BITS = 24
ONE = 1 << 2 * BITS - 1  # x · r = X · R · 2^-47
AT_ONCE = 1 << 15  # operands, whose arrays fit a cache


def steps_of(operands: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """fma(e, r, r) with e = fma(-x, r, 1), rounded to nearest even, in units of 2^-24."""
    errors = ONE - operands * guesses  # at most x units, so that e needs 24 bits and is exact
    assert (np.abs(errors) <= 1 << BITS).all()
    added = guesses * errors  # over ONE
    whole, rest = guesses + added // ONE, added % ONE
    return whole + ((2 * rest > ONE) | ((2 * rest == ONE) & (whole % 2 == 1)))


def quotients_of(operands: np.ndarray) -> np.ndarray:
    """1 / x rounded to nearest even, in the same units. No quotient lies halfway, but for x = 1 all need rounding."""
    whole, rest = ONE // operands, ONE % operands
    return whole + (2 * rest > operands)


def wrong(first: int, last: int) -> list[tuple[int, int]]:
    """(X, R) of operands first ≤ X < last whose step is not the quotient; guesses are the two around 1 / x."""
    found = []
    for start in range(first, last, AT_ONCE):
        operands = np.arange(start, min(start + AT_ONCE, last), dtype=np.int64)
        below, expected = ONE // operands, quotients_of(operands)
        for guesses in (below, below + (ONE % operands > 0)):
            differs = steps_of(operands, guesses) != expected
            found += zip(operands[differs].tolist(), guesses[differs].tolist(), strict=True)
    return found


def test_every_operand() -> None:
    """A guess within a unit in the last place gives the rounded quotient, but for one operand of all 2^23.

    That is 2 - 2^-23 where the guess is 0.5: the quotient is just above the middle of two numbers, and e² away from it
    is the middle itself. What the hardware guesses there decides it in nvcc's division as well, which is held below.
    """
    assert wrong(1 << 23, (1 << 24) - 1) == []
    assert set(wrong((1 << 24) - 1, 1 << 24)) == {((1 << 24) - 1, 1 << 23)}


KERNEL = """{function}
extern "C" __global__ void k(float *x) {{ x[threadIdx.x] = inverse(x[threadIdx.x]); }}
"""
DIVISION = "__device__ float inverse(float x) { return 1.0f / x; }"
STEP = r"""__device__ float inverse(float x) {
  float guess;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
  return __fmaf_rn(__fmaf_rn(-x, guess, 1.0f), guess, guess);
}"""
NORMAL = r"0x1800000 .* 0x7f800000, RZ, 0xc0, .* ISETP.GT.U32.AND (P\d), PT, R\d+, 0x1ffffff, PT .* @\1 BRA "
DIVIDES = r"MUFU.RCP (R\d+), (R\d+) .*FFMA (R\d+), \2, \1, -1 .*FADD.FTZ (R\d+), -\3, -RZ .*FFMA R\d+, \1, \4, \1 "
STEPS = r"MUFU.RCP (R\d+), (R\d+) .*FFMA (R\d+), -\2, \1, 1 .*FFMA R\d+, \1, \3, \1 "


@pytest.mark.nvcc
def test_the_division_takes_the_same_step() -> None:
    """nvcc's own division, of numbers whose exponent is below 126: the same guess, error and step.

    For all others it calls what handles them; that a Sinkhorn sum is none is held below.
    """

    def code(function: str) -> str:
        listing = compile_source(KERNEL.format(function=function), "sm_90a").listing
        lines = re.findall(r"/\*[0-9a-f]{4}\*/ +(.*?);", listing[listing.index(".text.k:") :])
        return " ".join(line.replace(".reuse", "").strip() + " " for line in lines)

    divides = code(DIVISION)
    assert re.search(NORMAL, divides)
    assert re.search(DIVIDES, divides)
    assert re.search(STEPS, code(STEP))


def sums_of(logits: np.ndarray, iters: int, eps: float) -> Iterator[np.ndarray]:
    """What `sinkhorn_token` takes the reciprocal of, of logits [T, out, in], in float32."""
    with np.errstate(under="ignore"):
        P = logits - logits.max(axis=1, keepdims=True)
        weights = np.exp(P).sum(axis=1, keepdims=True)
        yield weights
        if eps == 0:
            P = np.exp(P - P.max(axis=2, keepdims=True)) / weights
        else:
            P = np.exp(P) / weights + eps
        for k in range(2 * iters - 1):
            sums = P.sum(axis=2 - k % 2, keepdims=True) + eps
            yield sums
            P = P / sums


@pytest.mark.parametrize("eps", [0.0, SMALLEST, 1e-6, 1.0, 2.0**123])
def test_sums_are_normal(eps: float) -> None:
    """However far apart the logits are. Before a step every row, or column, adds up to 1 and has an element of 1/n; its
    column, or row, has a sum of n at most, so that 1/n² is left of it: without eps that is the smallest sum.
    """
    rng = np.random.default_rng(1)
    logits = np.float32(10.0) ** rng.integers(-3, 38, (512, 4, 4)).astype(np.float32)
    logits *= rng.choice(np.float32([-1, 0, 1]), logits.shape)
    sums = np.concatenate([each.ravel() for each in sums_of(logits, 20, np.float32(eps))])
    smallest = (1 - 1e-5) / 16 if eps == 0 else SMALLEST
    assert smallest <= sums.min() <= sums.max() < 2.0**126
