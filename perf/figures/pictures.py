"""`--out DIR` of the commands that draw a model: matplotlib asked for by name, the folder made, pictures written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MHCError

if TYPE_CHECKING:
    from .run import Picture


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--out DIR`; the value arrives as `args.out`, a Path or None."""
    text = "also draw it: SVG and PNG in this folder, created if missing"
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)


def write_pictures(folder: Path | None, draw: Callable[[], Sequence[Picture]]) -> None:
    """Draw and write; nothing where no folder was asked for.

    Raises MHCError where matplotlib is missing or the folder cannot be written.
    """
    if folder is None:
        return
    try:
        import matplotlib  # noqa: F401  # an extra: asked for by name before anything is drawn
    except ImportError as error:
        wanted = "expected matplotlib, which draws the pictures: pip install 'mhc-tilelang[plots]'"
        raise MHCError(f"{wanted} ({error})") from error
    pictures = draw()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MHCError(f"cannot write --out {folder}: {error.strerror or error}") from error
    for picture in pictures:
        picture.save(folder)
