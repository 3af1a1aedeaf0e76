"""Expressions of run-time sizes, such as a grid's `(num_tokens + 63) // 64`: their value, and their text in C.

They come from a manifest, so they are parsed and walked, never evaluated as Python. Sizes are never negative.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeVar

from ..errors import BundleError

OPERATORS: dict[type, tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.FloorDiv: ("/", operator.floordiv),
    ast.Mod: ("%", operator.mod),
}
Value = TypeVar("Value", int, str)
FUNCTIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {"min": ("MHC_MIN", min), "max": ("MHC_MAX", max)}


def value_of(expression: str, numbers: Mapping[str, float]) -> int:
    """Evaluate the expression. Raises BundleError for a size that is missing or anything but arithmetic."""

    def walk(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)][1](walk(node.left), walk(node.right))
        if isinstance(node, ast.Call):
            return FUNCTIONS[function_of(node)][1](*map(walk, node.args))
        return int(numbers[node.id]) if isinstance(node, ast.Name) else constant(node)

    return evaluate(expression, walk)


def c_of(expression: str) -> str:
    """Translate the expression to C, over variables of type int64_t. Raises BundleError for anything but arithmetic."""

    def walk(node: ast.AST) -> str:
        if isinstance(node, ast.BinOp):
            return f"({walk(node.left)} {OPERATORS[type(node.op)][0]} {walk(node.right)})"
        if isinstance(node, ast.Call):
            return f"{FUNCTIONS[function_of(node)][0]}({', '.join(map(walk, node.args))})"
        return node.id if isinstance(node, ast.Name) else str(constant(node))

    return evaluate(expression, walk)


def evaluate(expression: str, walk: Callable[[ast.AST], Value]) -> Value:
    """Apply a walk to the parsed expression. Raises BundleError that names the expression."""
    try:
        return walk(parse(expression))
    except (KeyError, TypeError, ValueError, SyntaxError, ZeroDivisionError) as error:
        raise BundleError(f"launch: {expression!r}: expected arithmetic of known sizes, got {error!r}") from None


@cache
def parse(expression: str) -> ast.expr:
    """Parse an expression, once: a launch is a matter of microseconds."""
    return ast.parse(expression, mode="eval").body


def function_of(node: ast.Call) -> str:
    """`min` of `T.min(a, b)`."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)


def constant(node: ast.AST) -> int:
    """Return the integer that a node is."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise TypeError(ast.unparse(node))
