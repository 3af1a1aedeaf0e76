"""What every test shares: the markers `gpu` and `nvcc` skip where the machine lacks what they name.

With MHC_REQUIRE_NVCC=1, as in CI, a missing nvcc is a failure instead of a skip.
"""

from __future__ import annotations

import os

import pytest

from mhc_tilelang.toolchain import find_nvcc


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nvcc") and find_nvcc() is None:
        if os.environ.get("MHC_REQUIRE_NVCC") == "1":
            pytest.fail("no nvcc, and MHC_REQUIRE_NVCC=1")
        pytest.skip("no nvcc")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
