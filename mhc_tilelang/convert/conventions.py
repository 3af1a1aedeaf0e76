"""Conventions of mHC implementations: what differs, and which implementation does what.

All but the first of these raise no error and change no shape when they are taken for one another.

Read off the sources of: TileKernels (its torch references), transformers 5.23, Liger-Kernel, TransformerEngine (its
test's references), Megatron-LM (main, 2026), hyper-connections 0.4.11. Of these only transformers and
hyper-connections have been run here.
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = "rows"
COLUMNS = "columns"
OUT_IN = "[out, in]"
IN_OUT = "[in, out]"
OUTERMOST = "outermost"
INNERMOST = "innermost"


@dataclass(frozen=True)
class Convention:
    """An implementation's convention for its streams and its residual mapping.

    Attributes:
        streams: "outermost" for x [..., n, C], "innermost" for x [..., C, n].
        res: how the n·n residual logits lie, "[out, in]" or "[in, out]". Code that applies its matrix transposed
            (`comb`, x @ H) has its logits as [in, out].
        last: which sums of H_res, read as [out, in], Sinkhorn makes 1 last: "rows", those of an output stream, or
            "columns", those of an input stream. What is last is exact; the others are as close as the iterations
            brought them.
    """

    streams: str = OUTERMOST
    res: str = OUT_IN
    last: str = ROWS

    @property
    def connection(self) -> str:
        """The class here that computes the same."""
        return "HyperConnection" if self.last == ROWS else "RowsFirstConnection"

    def __str__(self) -> str:
        return f"streams {self.streams}, res logits {self.res}, {self.last} of H_res normalised last"


CONVENTIONS = {
    "mhc_tilelang": Convention(),
    "deepseek": Convention(res=IN_OUT),  # transformers' and Megatron's as well
    "liger": Convention(last=COLUMNS),  # and Megatron's before it was changed to DeepSeek's
    "transformer_engine": Convention(streams=INNERMOST, res=IN_OUT),
    "lucidrains": Convention(res=IN_OUT, last=COLUMNS),
}


def known_as(convention: Convention) -> str:
    """Return the name in `CONVENTIONS`, or "none of CONVENTIONS"."""
    return next((name for name, known in CONVENTIONS.items() if known == convention), "none of CONVENTIONS")
