"""Access widths of each global buffer in the CUDA source that tilelang generates.

Machine code does not tell which tensor an instruction reads; the source does, in four spellings:

    *(uint4*)(x + …)                        as wide as the type that the pointer is cast to
    tl::cp_async_gs<16>(…, &(x[…]))         as wide as the number says
    tl::load_global_128(&(x[…]))            as many bits, as store_global_128
    x[…]                                    one element

What nvcc makes of them is another matter: it joins narrow accesses, and splits a wide one now and then. The machine
code that it makes of each line is in `machine_accesses`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ...errors import MHCError

PARAMETER = re.compile(r"(\w+)\s*\*\s*__restrict__\s+(\w+)")
CAST = re.compile(r"\(\s*(\w+)\s*\*\s*\)\s*\($")
GLOBAL = re.compile(r"tl::(load|store)_global_(\d+)(?:_conditional)?\(")
ATOMIC = re.compile(r"\bAtomic(AddRet|Add|Load|Store)\(")
ASYNC = re.compile(r"cp_async_gs(?:_conditional)?<(\d+)>")
ELEMENT_BYTES = {
    **dict.fromkeys(("char", "uchar", "signed", "unsigned", "int8_t", "uint8_t", "bool", "fp8_e4_t"), 1),
    **dict.fromkeys(("bfloat16_t", "half_t", "half", "short", "ushort", "int16_t", "uint16_t", "__nv_bfloat16"), 2),
    **dict.fromkeys(("float", "int", "uint", "int32_t", "uint32_t", "tfloat32_t"), 4),
    **dict.fromkeys(("double", "long", "ulong", "longlong", "ulonglong", "int64_t", "uint64_t"), 8),
}


class Widths(NamedTuple):
    """Bytes of the accesses to a buffer, each width once, ascending."""

    read: list[int]
    written: list[int]


class Use(NamedTuple):
    """One access: the line of the source, from 1, the bytes, whether it writes."""

    line: int
    width: int
    writes: bool


def accesses(code: str) -> dict[str, Widths]:
    """Return the widths in bytes by which the kernel reads and writes each buffer. Raises MHCError as `uses` does."""
    return {
        name: Widths(*(sorted({use.width for use in found if use.writes == side}) for side in (False, True)))
        for name, found in uses(code).items()
    }


def uses(code: str) -> dict[str, list[Use]]:
    """Every access of the kernel to each buffer.

    Raises MHCError for a buffer that is used in another way, since its width would go unseen.
    """
    start = code.rindex("__global__")
    start_of_body = code.index("{", start)
    head, body, first_line = code[start:start_of_body], code[start_of_body:], code.count("\n", 0, start_of_body) + 1
    found = {}
    for element, name in PARAMETER.findall(head):
        found[name] = [
            Use(first_line + body.count("\n", 0, place.start()), *use_of(body, place, ELEMENT_BYTES[element], name))
            for place in places(body, name)
        ]
    return found


def places(body: str, name: str) -> list[re.Match[str]]:
    """Find the places of a buffer's name, members as in threadIdx.x excluded."""
    return list(re.finditer(rf"(?<![\w.]){name}\b", body))


def use_of(body: str, place: re.Match[str], element_bytes: int, name: str) -> tuple[int, bool]:
    """Bytes of one access, and whether it writes."""
    before, after = body[: place.start()], body[place.end() :]
    if cast := CAST.search(before):
        return bytes_of(cast.group(1)), is_assigned(after, depth=1)
    if after.startswith("["):
        if not before.endswith("&("):
            return element_bytes, is_assigned(after, depth=0)
        statement = before[before.rfind(";") + 1 :]
        if found := ASYNC.findall(statement):
            return int(found[-1]), False
        if found := GLOBAL.findall(statement):
            return int(found[-1][1]) // 8, found[-1][0] == "store"
        if found := ATOMIC.findall(statement):
            return element_bytes, found[-1] != "Load"
    line = body.count("\n", 0, place.start()) + 1
    raise MHCError(f"source_accesses: {name}: expected a cast, an index or cp_async_gs, got line {line} of the kernel")


def is_assigned(text: str, depth: int) -> bool:
    """Whether an assignment follows the brackets that are open, or that the text starts with."""
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0:
            return re.match(r"\s*=(?!=)", text[place + 1 :]) is not None
    return False


def bytes_of(vector: str) -> int:
    """Bytes of a vector type: 16 of uint4, 4 of uint1, 8 of fp8_e4_8_t."""
    vector = re.sub(r"^fp8_e4_(\d+)_t$", r"uchar\1", vector)
    if vector in ELEMENT_BYTES:
        return ELEMENT_BYTES[vector]
    found = re.fullmatch(r"(\w+?)(\d+)", vector)
    if found is None or found.group(1) not in ELEMENT_BYTES:
        raise MHCError(f"source_accesses: expected a vector type such as uint4, got {vector}")
    return ELEMENT_BYTES[found.group(1)] * int(found.group(2))
