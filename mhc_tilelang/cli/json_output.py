"""The `--json FILE` option, spelled, explained and written in one place for every sub-command."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mhc_tilelang.errors import MHCError


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE` to a sub-command's parser; the value arrives as `args.json`, a Path or None."""
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the results to FILE as JSON")


def writable_file(text: str) -> Path:
    """Return a path that a file can be written to: asked before a long run, not after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {text}")
    return path


def write_json(path: Path | None, payload: Any) -> None:
    """Write `payload` to `path`; do nothing when no file was asked for.

    Raises MHCError when the file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise MHCError(f"cannot write --json {path}: {error.strerror or error}") from error
