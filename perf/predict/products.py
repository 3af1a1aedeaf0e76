"""Tensor-core work of a kernel as its TIR asks for it: multiply-adds of every T.gemm, loops and guards as they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .listing import Instruction

TILE_GEMM = "tl.tileop.gemm"
SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}  # multiply-adds of a warp's instruction


def asked(func: Any, sizes: Mapping[str, float]) -> int:
    """Multiply-adds of all T.gemm of a launch."""
    from ...compiler.cpu.emit import scalars_of, sizes_of
    from ...compiler.cpu.types import op_name
    from ..traffic.audit.accesses import Access, Walk
    from ..traffic.audit.counting import executions
    from ..traffic.audit.values import Values

    class Products(Walk):
        """The walk of the audit, which also notes products."""

        def _Evaluate(self, stmt: Any) -> None:
            if op_name(stmt.value) == TILE_GEMM:
                m, n, k = (int(argument) for argument in stmt.value.args[5:8])
                place = Access(stmt.value.args[0].args[0].buffer, False, (), self.loops, self.guards)
                found.append((m * n * k, place))
            super()._Evaluate(stmt)

    found: list[tuple[int, Access]] = []
    variables = {var.name: var for var in (*sizes_of(func), *scalars_of(func))}
    walk = Products(Values({variables[name]: size for name, size in sizes.items()}))
    walk.statement(func.body)
    return sum(amount * executions(place, walk.values) for amount, place in found)


def of_instruction(step: Instruction) -> int:
    """Multiply-adds of one tensor instruction; 0 for a shape that is not known."""
    return next((SHAPES[name] for name in step.modifiers if name in SHAPES), 0)
