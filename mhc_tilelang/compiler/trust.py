"""Trust in files that this process loads, kernel caches and bundles: who can change them. Decided here alone.

A compiled kernel runs with all rights of the user, so whoever can write it, or a folder on the way to it, can run code
as the user. Before anything is loaded, the file and its folder must be

    owned by this user or root,
    not writable by everyone,
    not writable by a group that this process is not in: who shares a folder with their own group means to,

and so must every folder above it. Of those, a sticky one may be writable by everyone, as /tmp is: only an owner can
replace what is in it. They may also belong to whoever owns "/", who in a container need not be root.
$MHC_TILELANG_TRUST lists, as $PATH does, folders that are taken as they are, with all that is in them.

Only what the mode says is seen, not access control lists; and a path is checked, then opened: where no other
user can write, nothing changes in between. Imports neither torch nor tilelang.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import TrustError

VARIABLE = "MHC_TILELANG_TRUST"


def check(path: Path) -> Path:
    """Return the real path of a file or folder that only this user and root can change; load from that, without links.

    Raises TrustError where others can change it, or $MHC_TILELANG_TRUST is not a list of absolute paths; OSError where
    there is no such file.
    """
    real = Path(os.path.realpath(path, strict=True))
    if any(real.is_relative_to(folder) for folder in exempt()):
        return real
    for place in (real, *real.parents):
        if reason := why_not(place, above=place != real):
            folder = real if real.is_dir() else real.parent
            raise TrustError(
                f"{path}: expected code that only this user (uid {os.geteuid()}) and root can change, got {place}, "
                f"{reason}. Take the right to write from others (chmod go-w), or keep it elsewhere; if you trust all "
                f"who can write there with your account, set {VARIABLE}={folder}"
            )
    return real


def exempt() -> list[Path]:
    """Return the folders that $MHC_TILELANG_TRUST lists. Raises TrustError for a path that is not absolute."""
    named = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    for name in named:
        if not os.path.isabs(name):
            raise TrustError(
                f"${VARIABLE}: expected absolute paths of folders with {os.pathsep!r} between, got {name!r}"
            )
    return [Path(name).resolve() for name in named]


def why_not(place: Path, above: bool = False) -> str:
    """Describe how others can change a place; empty where they cannot. `above`: a folder on the way to the code."""
    facts = place.stat()
    mode = f"mode {stat.S_IMODE(facts.st_mode):04o}"
    ours = facts.st_uid in (os.geteuid(), 0) or (above and facts.st_uid == Path("/").stat().st_uid)
    if not ours:
        return f"which belongs to uid {facts.st_uid} ({mode})"
    if above and facts.st_mode & stat.S_ISVTX:
        return ""
    if facts.st_mode & stat.S_IWOTH:
        return f"which everyone can write to ({mode})"
    if facts.st_mode & stat.S_IWGRP and facts.st_gid not in {os.getegid(), *os.getgroups()}:
        return f"which group {facts.st_gid} can write to ({mode}), of which this process is not"
    return ""


def close(path: Path) -> None:
    """Take the right to write a file or folder of this user from everyone else."""
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
