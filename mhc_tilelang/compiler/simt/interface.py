"""The structures of interface.h, field for field."""

from __future__ import annotations

import ctypes


class Index(ctypes.Structure):
    """A position or an extent in a grid or a block."""

    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


class Tensor(ctypes.Structure):
    """A tensor and the traffic that is counted for it."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("element_bytes", ctypes.c_int64),
        ("read_only", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("read_bytes", "written_bytes", "read_sectors", "written_sectors")),
        *((name, ctypes.c_int64) for name in ("read_distinct", "written_distinct")),
    ]


class FoundAt(ctypes.Structure):
    """SimtFinding."""

    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("text", ctypes.c_char * 480),
        ("times", ctypes.c_int64),
        ("site", ctypes.c_void_p),
    ]


class ConflictAt(ctypes.Structure):
    """SimtConflict."""

    _fields_ = [("site", ctypes.c_void_p), ("wavefronts", ctypes.c_int64), ("conflicts", ctypes.c_int64)]


class Launch(ctypes.Structure):
    """SimtLaunch: what a launch is, then what came of it."""

    _fields_ = [
        ("grid", Index),
        ("block", Index),
        *((name, ctypes.c_int64) for name in ("shared_bytes", "most_static", "most")),
        ("resident", ctypes.c_int),
        ("seed", ctypes.c_int),
        ("num_tensors", ctypes.c_int),
        ("num_scalars", ctypes.c_int),
        ("tensors", ctypes.POINTER(Tensor)),
        ("scalars", ctypes.POINTER(ctypes.c_void_p)),
        ("num_findings", ctypes.c_int),
        ("left_out", ctypes.c_int),
        ("findings", FoundAt * 16),
        *((name, ctypes.c_int64) for name in ("shared_wavefronts", "shared_conflicts", "barriers", "mma")),
        ("num_conflicts", ctypes.c_int),
        ("conflicts", ConflictAt * 8),
    ]
