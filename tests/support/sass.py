"""Machine code written by hand, for the tests of what reads it: lines of SASS with their control bits as numbers."""

from __future__ import annotations

import re

from mhc_tilelang.perf.predict.listing import NO_SCOREBOARD, Instruction, parse

LINE = re.compile(r"(?P<text>[^|]+?)(?:\s*\|(?P<control>.*))?$")


def listing(text: str) -> str:
    """Lines such as `@P0 BRA `(.L_x_1) | stall=5 wr=0 wait=3` as nvdisasm -hex prints them; labels end in a colon."""
    lines, address = [], 0
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        found = LINE.match(line)
        assert found is not None
        bits = {"stall": 1, "wr": NO_SCOREBOARD, "rd": NO_SCOREBOARD, "wait": 0}
        bits |= {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", found["control"] or "")}
        upper = bits["stall"] << 41 | bits["wr"] << 46 | bits["rd"] << 49 | bits["wait"] << 52
        lines.append(f"        /*{address:04x}*/    {found['text']} ;    /* 0x0000000000000000 */")
        lines.append(f"                                          /* 0x{upper:016x} */")
        address += 16
    return "\n".join(lines)


def code(text: str) -> list[Instruction]:
    """Parse the instructions of a listing."""
    return parse(listing(text))
