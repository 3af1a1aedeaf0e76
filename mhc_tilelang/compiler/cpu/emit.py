"""TileLang to C++: one pass over a GPU kernel's TIR that writes the function a CPU runs.

The kernels are written for the GPU and stay untouched. The pass reads the TIR that `@T.prim_func` traced,
before tilelang lowers it, where loops, copies and fragments still have their meaning:

    the grid of blocks                 one loop, shared out over OpenMP threads: a block is the unit of work
    shared memory, fragments           arrays on the thread's stack
    T.Parallel                         a loop nest; its last variable is the vector axis
    T.Pipelined, swizzles, policies    nothing
    T.copy, T.fill, T.reduce, T.gemm   loops (see `tile_ops`), clipped where a tile hangs over an edge
    bfloat16, float16                  16 bits in memory, float in arithmetic (see `runtime.h`)

Which block a thread runs changes no bits: blocks are independent and each is summed in its own order.
Imports tilelang's TIR classes; `build` compiles what comes out, `compile` (a level up) calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from tilelang import tvm  # noqa: F401  (puts tilelang's tvm on the path)
from tvm import arith, ir, tirx

from ...errors import LoweringError
from . import tile_ops
from .outline import ELEMENTS, LONG, elements, outline
from .types import Array, c_type, op_name
from .views import View, accesses_of, views_of

INFIX = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "Div": "/",
    "FloorDiv": "/",  # indices are never negative
    "FloorMod": "%",
    "Mod": "%",
    "EQ": "==",
    "NE": "!=",
    "LT": "<",
    "LE": "<=",
    "GT": ">",
    "GE": ">=",
    "And": "&&",
    "Or": "||",
}

CALLS = {
    "tirx.exp": "mhc::exp",
    "tirx.rsqrt": "mhc::rsqrt",
    "tl.ieee_fmaf": "__builtin_fmaf",
}

BITWISE = {"tirx.bitwise_and": "&", "tirx.shift_right": ">>", "tirx.shift_left": "<<"}

RESERVED = {"block", "blocks", "threads"}  # what `emit` itself declares: a kernel's variable of that name would hide it

MAX_STACK_BYTES = 1 << 19  # OpenMP threads have 2 MiB or more by default


@dataclass
class Emitter:
    """Writes statements and expressions; holds the names given so far."""

    checked: bool = False
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    names: dict = field(default_factory=dict)
    arrays: dict = field(default_factory=dict)
    views: dict = field(default_factory=dict)
    registers: dict[str, tuple[Array, str]] = field(default_factory=dict)
    in_straight_line: bool = False
    writes_rows: bool = False
    stack_bytes: int = 0
    nests: list[tuple[int, int]] = field(default_factory=list)
    analyzer: arith.Analyzer = field(default_factory=arith.Analyzer)

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def open(self, header: str) -> None:
        self.line(header + " {")
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1
        self.line("}")

    def name(self, var: tirx.Var) -> str:
        """Return the C++ name of a TIR variable: its own, numbered when another variable has it already."""
        if var not in self.names:
            self.names[var] = self.fresh(var.name)
        return self.names[var]

    def fresh(self, wanted: str) -> str:
        taken = RESERVED | set(self.names.values()) | {array.name for array in self.arrays.values()}
        wanted, number = wanted.strip("_") or "v", 0
        while (candidate := wanted if not number else f"{wanted}_{number}") in taken:
            number += 1
        return candidate

    def array(self, buffer: tirx.Buffer) -> Array:
        return self.arrays[buffer]

    def declare(self, buffer: tirx.Buffer, is_global: bool) -> Array:
        array = Array(self.fresh(buffer.name), str(buffer.dtype), tuple(buffer.shape), is_global)
        self.arrays[buffer] = array
        return array

    def statement(self, stmt: tirx.Stmt) -> None:
        handler = getattr(self, f"_{type(stmt).__name__}", None)
        if handler is None:
            raise LoweringError(f"statement {type(stmt).__name__}: {stmt}")
        first = len(self.lines)
        handler(stmt)
        if elements(stmt) >= ELEMENTS and len(self.lines) > first:  # nests within this one are a part of it
            self.nests = [nest for nest in self.nests if nest[0] < first] + [(first, len(self.lines))]

    def _SeqStmt(self, stmt) -> None:
        for part in stmt.seq:
            self.statement(part)

    def _SBlockRealize(self, stmt) -> None:
        self.statement(stmt.block)

    def _SBlock(self, stmt) -> None:
        self.views |= views_of(stmt, self.analyzer)
        touched = {access.buffer for access in accesses_of(stmt.body)}
        for buffer in stmt.alloc_buffers:
            if buffer in self.views or buffer not in touched:
                continue
            array = self.declare(buffer, is_global=False)
            size = prod(int(extent) for extent in buffer.shape)
            self.stack_bytes += size * buffer.dtype.itemsize
            self.line(f"alignas(64) {array.c_type} {array.name}[{size}];")
        if self.stack_bytes > MAX_STACK_BYTES:
            raise LoweringError(f"tiles of {self.stack_bytes} bytes; the stack holds {MAX_STACK_BYTES}")
        self.statement(stmt.body)

    def _AttrStmt(self, stmt) -> None:
        self.statement(stmt.body)  # a word to nvcc, such as how many blocks shall share a multiprocessor

    def _Bind(self, stmt) -> None:
        if op_name(stmt.value) == "tl.launch_thread_idx":
            return  # the tile operations know no threads; a use of the index is refused in `_Var`
        self.analyzer.bind(stmt.var, stmt.value, allow_override=True)
        self.line(f"const {c_type(stmt.var.dtype)} {self.name(stmt.var)} = {self.expr(stmt.value)};")

    def _IfThenElse(self, stmt) -> None:
        self.open(f"if ({self.expr(stmt.condition)})")
        self.statement(stmt.then_case)
        self.close()
        if stmt.else_case is not None:
            self.open("else")
            self.statement(stmt.else_case)
            self.close()

    def _For(self, stmt) -> None:
        if is_unrolled(stmt):
            self._unrolled(stmt)
            return
        self.bound(stmt)
        var = self.name(stmt.loop_var)
        first, extent = self.expr(stmt.min), self.expr(stmt.extent)
        end = extent if first == "0" else f"{first} + {extent}"
        is_vector_axis = stmt.kind == tirx.ForKind.PARALLEL and is_straight(stmt.body)
        if is_vector_axis:
            self.line("MHC_INDEPENDENT  // T.Parallel: no iteration depends on another")
        self.open(f"for (int64_t {var} = {first}; {var} < {end}; ++{var})")
        if is_vector_axis:
            self._in_registers(stmt.body)
        else:
            self.statement(stmt.body)
        self.close()

    def _in_registers(self, body) -> None:
        """Straight-line code: every element of a tile that it stores is a variable, written back once at the end.

        Tiles only: TileLang holds each of a fragment's accesses in a T.Parallel to one form of index, so two
        elements of different spelling are two elements.
        """
        self.registers, start = {}, len(self.lines)
        self.in_straight_line = True
        self.statement(body)
        self.in_straight_line = False
        declared = [f"{'  ' * self.depth}{array.c_type} {name};" for array, name in self.registers.values()]
        self.lines[start:start] = declared
        for element, (_, name) in self.registers.items():
            self.line(f"{element} = {name};")
        self.registers = {}

    def bound(self, loop: tirx.For) -> None:
        """Tell the analyzer the range of a loop's variable, so that it can prove a tile to lie inside."""
        self.analyzer.bind(loop.loop_var, ir.Range.from_min_extent(loop.min, loop.extent))

    def _unrolled(self, stmt) -> None:
        """Write the body out once per value: a vectoriser sees straight lines where an inner loop stops it."""
        self.bound(stmt)
        for value in range(int(stmt.min), int(stmt.min) + int(stmt.extent)):
            self.names[stmt.loop_var] = str(value)
            self.open("")
            self.statement(stmt.body)
            self.close()

    def _BufferStore(self, stmt) -> None:
        array, indices = self.place(stmt)
        element, value = self.element(array, indices), self.expr(stmt.value)
        if str(stmt.value.dtype) != array.dtype:
            value = f"{array.c_type}({value})"
        if self.in_straight_line and stmt.buffer.scope() != "global" and element not in self.registers:
            self.registers[element] = (array, f"{array.name}_{len(self.registers)}_element")
        self.line(f"{self.registered(element)} = {value};")

    def registered(self, element: str) -> str:
        """Return the variable that holds an element for now, or the element itself."""
        return self.registers[element][1] if element in self.registers else element

    def _Evaluate(self, stmt) -> None:
        if is_nothing(stmt):
            return
        lower = tile_ops.LOWERINGS.get(op_name(stmt.value))
        if lower is None:
            raise LoweringError(f"call {stmt.value}")
        lower(self, stmt.value)

    def expr(self, node) -> str:
        kind = type(node).__name__
        if kind in INFIX:
            return f"({self.expr(node.a)} {INFIX[kind]} {self.expr(node.b)})"
        handler = getattr(self, f"_{kind}", None)
        if handler is None:
            raise LoweringError(f"expression {kind}: {node}")
        return handler(node)

    def _IntImm(self, node) -> str:
        if str(node.dtype) == "bool":
            return "true" if node.value else "false"
        return f"{int(node.value)}u" if str(node.dtype) == "uint32" else str(int(node.value))

    def _FloatImm(self, node) -> str:
        value = float(node.value)
        if value in (float("inf"), float("-inf")):
            return f"({'-' if value < 0 else ''}__builtin_inff())"
        return f"{value.hex()}f"

    def _Var(self, node) -> str:
        if node not in self.names:
            raise LoweringError(f"variable {node} (a thread index?)")
        return self.names[node]

    def _BufferLoad(self, node) -> str:
        return self.registered(self.element(*self.place(node)))

    def _Cast(self, node) -> str:
        return f"{c_type(node.dtype)}({self.expr(node.value)})"

    def _Min(self, node) -> str:
        return f"mhc::min<{c_type(node.dtype)}>({self.expr(node.a)}, {self.expr(node.b)})"

    def _Max(self, node) -> str:
        return f"mhc::max<{c_type(node.dtype)}>({self.expr(node.a)}, {self.expr(node.b)})"

    def _Not(self, node) -> str:
        return f"(!{self.expr(node.a)})"

    def _Select(self, node) -> str:
        return f"({self.expr(node.condition)} ? {self.expr(node.true_value)} : {self.expr(node.false_value)})"

    def _Call(self, node) -> str:
        name, args = (
            op_name(node),
            [self.expr(arg) for arg in node.args if not isinstance(arg, tirx.StringImm)],
        )
        if name in CALLS:
            return f"{CALLS[name]}({', '.join(args)})"
        if name in BITWISE:
            return f"({args[0]} {BITWISE[name]} {args[1]})"
        if name == "tirx.reinterpret":
            return f"mhc::bit_cast<{c_type(node.dtype)}>({args[0]})"
        if name == "tirx.if_then_else":
            return f"({args[0]} ? {args[1]} : {args[2]})"
        raise LoweringError(f"call {node}")

    def place(self, access) -> tuple[Array, list[str]]:
        """Return the array and the indices that a load or store names, through its view if it has one."""
        view: View | None = self.views.get(access.buffer)
        if view is None:
            return self.array(access.buffer), [self.expr(index) for index in access.indices]
        return self.array(view.buffer), [self.expr(index) for index in view.indices(access.indices)]

    def element(self, array: Array, indices: list[str]) -> str:
        """`array[flat index]`, row-major; in a checked build the index is tested first."""
        sizes = [self.expr(extent) for extent in array.shape]
        flat = indices[0]
        for index, size in zip(indices[1:], sizes[1:], strict=True):
            flat = f"({flat}) * {size} + {index}"
        if self.checked:
            flat = f'mhc::checked({flat}, {" * ".join(f"int64_t({s})" for s in sizes)}, "{array.name}")'
        return f"{array.name}[{flat}]"


def emit(func: tirx.PrimFunc, checked: bool = False) -> str:
    """Emit the C++ source of `func`: `extern "C" void NAME(buffers…, sizes and scalars…, int threads)`.

    Buffers come in the order of the TileLang signature, then the run-time sizes in the order in which the
    shapes first mention them, then the scalars, then how many OpenMP threads may run. `checked` builds
    abort with the buffer's name on an index outside a buffer.
    """
    emitter = Emitter(checked=checked)
    signature = []
    for buffer in buffers_of(func):
        array = emitter.declare(buffer, is_global=True)
        signature.append(f"{array.c_type}* __restrict {array.name}")
    for var in sizes_of(func) + scalars_of(func):
        signature.append(f"{'float' if str(var.dtype) == 'float32' else 'int64_t'} {emitter.name(var)}")
    signature.append("int threads")

    grid, body = grid_of(func)
    emitter.line("const int64_t blocks = " + " * ".join(f"int64_t({emitter.expr(loop.extent)})" for loop in grid) + ";")
    emitter.line("#pragma omp parallel for schedule(static) num_threads(threads) if (blocks > 1)")
    emitter.open("for (int64_t block = 0; block < blocks; ++block)")
    rest = "block"
    for loop in reversed(grid):  # the last grid axis is the fastest: neighbouring blocks share a token
        var, extent = emitter.name(loop.loop_var), emitter.expr(loop.extent)
        emitter.line(f"const int64_t {var} = ({rest}) % ({extent});")
        emitter.bound(loop)
        rest = f"({rest}) / ({extent})"
    emitter.statement(body)
    if emitter.writes_rows:
        emitter.line("mhc::finish_rows();")
    emitter.close()

    name, functions = func.attrs["global_symbol"], []
    if len(emitter.lines) > LONG and not checked:
        arrays = {array.name: array for array in emitter.arrays.values()}
        functions = outline(name, emitter.lines, emitter.nests, arrays, signature[len(buffers_of(func)) :])
    head = ['#include "runtime.h"', "", *functions, f'extern "C" void {name}({", ".join(signature)}) {{']
    return "\n".join(head + emitter.lines + ["}", ""])


def is_straight(body) -> bool:
    """Whether a loop body is a line of stores, with nothing but unrolled loops in it."""
    if isinstance(body, tirx.SeqStmt):
        return all(map(is_straight, body.seq))
    if isinstance(body, tirx.For):
        return is_unrolled(body) and is_straight(body.body)
    return isinstance(body, tirx.BufferStore | tirx.Bind) or is_nothing(body)


def is_unrolled(loop: tirx.For) -> bool:
    """Whether a T.unroll is meant to be written out: one with a factor asks nvcc for something else."""
    return loop.kind == tirx.ForKind.UNROLLED and "pragma_unroll_factor" not in loop.annotations


def is_nothing(stmt) -> bool:
    """Whether nothing is left of a body: everything in it was switched off when the kernel was traced."""
    return isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, tirx.IntImm)


def buffers_of(func: tirx.PrimFunc) -> list[tirx.Buffer]:
    return [func.buffer_map[param] for param in func.params if param in func.buffer_map]


def scalars_of(func: tirx.PrimFunc) -> list[tirx.Var]:
    return [param for param in func.params if param not in func.buffer_map]


def sizes_of(func: tirx.PrimFunc) -> list[tirx.Var]:
    """Return the run-time sizes: shape variables, in order of first mention."""
    sizes: list[tirx.Var] = []
    for buffer in buffers_of(func):
        for extent in buffer.shape:
            if isinstance(extent, tirx.Var) and not any(extent.same_as(known) for known in sizes):
                sizes.append(extent)
    return sizes


def grid_of(func: tirx.PrimFunc) -> tuple[list[tirx.For], tirx.Stmt]:
    """Return the loops over blocks, outermost first, and what one block does."""
    stmt, grid = func.body, []
    while True:
        if isinstance(stmt, tirx.SBlockRealize):
            stmt = stmt.block.body
        elif isinstance(stmt, tirx.For) and stmt.kind == tirx.ForKind.THREAD_BINDING:
            grid.append(stmt)
            stmt = stmt.body
        else:
            break
    if not grid:
        raise LoweringError("no T.Kernel in the function")
    return grid, stmt
