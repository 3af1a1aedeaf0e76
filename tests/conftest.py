"""Fixtures and markers of all tests: `gpu` and `nvcc` skip where the machine lacks what they name.

With MHC_REQUIRE_NVCC=1, as in CI, a missing nvcc is a failure instead of a skip.
"""

from __future__ import annotations

import os

import pytest

from mhc_tilelang.compiler.toolchain import find_nvcc


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nvcc") and find_nvcc() is None:
        if os.environ.get("MHC_REQUIRE_NVCC") == "1":
            pytest.fail("no nvcc, and MHC_REQUIRE_NVCC=1")
        pytest.skip("no nvcc")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is allocated without a value starts as NaN: what a kernel leaves unwritten shows.

    `tests/kernels/test_of_tests.py` sees to it that this is so.
    """
    import torch

    def poisoning(allocate):
        def allocated(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocated

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


# pytest -n runs more OpenMP threads than there are cores. One that spins at a barrier keeps the one it waits for
# from running: 43 s for test_bits.py and test_of_tests.py on two cores, 9 s without. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
