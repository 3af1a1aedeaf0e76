"""Values of indices and guards over the loops that they depend on.

A loop is an axis of a numpy array. An expression is evaluated over the axes it needs and no others: `first + c < C`
over the two loops that `first` and `c` come from, whatever else is around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import tirx

from ....compiler.cpu.types import op_name
from ....errors import MHCError

MAX_POINTS = 1 << 26  # of one array: 512 MB of 64-bit indices

BINARY = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
}


class AuditError(MHCError):
    """A kernel does what cannot be counted from its code alone."""


@dataclass(frozen=True)
class Loop:
    """A loop's first value and how often it runs, as expressions of loops around it."""

    first: tirx.PrimExpr
    extent: tirx.PrimExpr


@dataclass
class Values:
    """Values of a function's variables: sizes, loops, names given to expressions."""

    sizes: Mapping[tirx.Var, float]
    loops: dict[tirx.Var, Loop] = field(default_factory=dict)
    names: dict[tirx.Var, tirx.PrimExpr] = field(default_factory=dict)
    grid: tuple[tirx.Var, ...] = ()
    lengths: dict[tirx.Var, int] = field(default_factory=dict)

    def length(self, loop: tirx.Var) -> int:
        """Return the most iterations a loop has, its axis. Where it has fewer, `accesses` adds a guard."""
        if loop not in self.lengths:
            extent = self.loops[loop].extent
            self.lengths[loop] = max(0, int(self.evaluate(extent, self.loops_of(extent)).max(initial=0)))
        return self.lengths[loop]

    def loops_of(self, *expressions: tirx.PrimExpr) -> tuple[tirx.Var, ...]:
        """Return the loops that the expressions depend on."""
        found: dict[tirx.Var, None] = {}

        def visit(node) -> None:
            if not isinstance(node, tirx.Var):
                return
            if node in self.loops:
                found[node] = None
                tirx.stmt_functor.post_order_visit(self.loops[node].first, visit)
            elif node in self.names:
                tirx.stmt_functor.post_order_visit(self.names[node], visit)

        for expression in expressions:
            tirx.stmt_functor.post_order_visit(expression, visit)
        return tuple(found)

    def evaluate(self, expression: tirx.PrimExpr, axes: Sequence[tirx.Var]) -> np.ndarray:
        """Evaluate the expression over these loops: an array with an axis each, of length one where it is constant."""
        shape = [self.length(axis) for axis in axes]
        if prod(shape) > MAX_POINTS:
            raise AuditError(f"expected at most {MAX_POINTS} points of loops that depend on each other, got {shape}")

        def value(node):
            kind = type(node).__name__
            if kind == "IntImm":
                return np.int64(int(node))
            if kind == "FloatImm":
                return np.float32(node.value)
            if kind == "Var":
                return variable(node)
            if kind in BINARY:
                return BINARY[kind](value(node.a), value(node.b))
            if kind == "Not":
                return np.logical_not(value(node.a))
            if kind == "Cast":
                return value(node.value)
            if kind == "Call" and op_name(node) == "tirx.if_then_else":
                return np.where(*map(value, node.args))
            raise AuditError(f"expected indices and guards of sizes and loops, got {node} in {expression}")

        def variable(node):
            if node in self.sizes:
                return np.float32(self.sizes[node]) if str(node.dtype) == "float32" else np.int64(self.sizes[node])
            if node in self.names:
                return value(self.names[node])
            if node not in self.loops:
                raise AuditError(f"expected indices and guards of sizes and loops, got {node} (a thread index?)")
            steps = [1] * len(axes)
            steps[list(axes).index(node)] = self.length(node)
            return value(self.loops[node].first) + np.arange(self.length(node)).reshape(steps)

        array = np.asarray(value(expression))
        return array if array.ndim == len(axes) else array.reshape((1,) * len(axes))  # a constant has no axes
