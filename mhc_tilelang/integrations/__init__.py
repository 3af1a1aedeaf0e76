"""Other frameworks' models on these kernels. Each module loads its framework, so each is loaded on first use.

nemo_automodel  NeMo Automodel's deepseek_v4 and deepseek_v41
transformers    Hugging Face's deepseek_v4, glm5_next and hy_v4
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["nemo_automodel", "transformers"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
