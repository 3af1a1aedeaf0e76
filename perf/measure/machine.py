"""Facts about the machine that a measurement needs: the last-level cache that traffic must miss, the clock."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
CPU_FACTS = Path("/proc/cpuinfo")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's last cache before memory; 0 where the system does not tell."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return cpu_last_level_cache()


def cpu_last_level_cache(caches: Path = CPU_CACHES) -> int:
    """Bytes of the highest level of the first processor's data caches, from Linux's description."""
    sizes = {}
    for index in caches.glob("index*"):
        with suppress(OSError):  # some systems list a cache without its level or size
            if (index / "type").read_text().strip() != "Instruction":
                sizes[int((index / "level").read_text())] = parse_size((index / "size").read_text())
    return sizes[max(sizes)] if sizes else 0


def parse_size(text: str) -> int:
    """Bytes of a size as Linux writes it: "32768K"."""
    text = text.strip()
    return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)


def clock_mhz(device: torch.device) -> int | None:
    """Return the clock the device runs at now, in MHz, None if the system does not tell. Read it after measuring."""
    if device.type == "cuda":
        import torch

        with suppress(Exception):  # NVML's bindings are an extra of torch, and containers may hide the driver's library
            return int(torch.cuda.clock_rate(device))
        return None
    return cpu_clock_mhz()


def cpu_clock_mhz(cpuinfo: Path = CPU_FACTS) -> int | None:
    """Return the fastest core's clock, as Linux tells it."""
    with suppress(OSError):
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        return round(max(clocks)) if clocks else None
    return None
