"""MHCSpec: the sizes and constants that every function of a connection takes.

A leaf: imports nothing of the package.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

STREAM_COUNTS = tuple(range(1, 9))
RESIDUAL_MAPPINGS = ("sinkhorn", "identity")
MAX_ITERS = 10_000  # far beyond convergence
HIDDEN_SIZES = {"3b": 1280, "9b": 1920, "27b": 2560, "v4-flash": 4096, "v4-pro": 7168}  # the paper's, DeepSeek-V4's
SMALLEST, LARGEST = 2.0**-126, 2.0**127  # constants are float32 in the kernels, and no subnormals there
TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


@dataclass(frozen=True)
class MHCSpec:
    """The sizes and constants of one kind of mHC connection.

    Attributes:
        hidden_size: C, channels of a stream, at least 1.
        num_streams: n, lanes of the residual stream: 1 to 8.
        sinkhorn_iters: Sinkhorn-Knopp iterations, 1 to 10,000 (the paper: 20).
        sinkhorn_eps: added after the softmax and to every later row and column sum.
        pre_eps: added to h_pre after its sigmoid.
        rms_eps: added to the mean square before the root.
        post_scale: factor of h_post's sigmoid (the paper: 2).
        post_eps: added to h_post after its sigmoid; with the identity only.
        residual_mapping: "sinkhorn", or "identity": H_res = I (an identity HC, Hy4's), so that phi has 2n rows, alpha
            two numbers, and there is no h_res.
        delayed_pre: a sublayer's input is aggregated with the h_pre of the sublayer before it, and the first one's is
            stream 0 (DeepSeek-V4.1). Modules and `ResidualStream` follow this; functions take `h_pre=`, and insist.

    Raises:
        TypeError: a value of another type. ValueError: a value out of range. Both name the argument.
    """

    hidden_size: int
    num_streams: int = 4
    sinkhorn_iters: int = 20
    sinkhorn_eps: float = 1e-6
    pre_eps: float = 1e-6
    rms_eps: float = 1e-6
    post_scale: float = 2.0
    delayed_pre: bool = False
    residual_mapping: str = "sinkhorn"
    post_eps: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = TYPES[str(field.type)]
            if isinstance(value, bool) != (field.type == "bool") or not isinstance(value, wanted):
                raise TypeError(f"{field.name}: expected {field.type}, got {value!r} of type {type(value).__name__}")
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size: expected at least 1, got {self.hidden_size}")
        if not 1 <= self.sinkhorn_iters <= MAX_ITERS:
            raise ValueError(f"sinkhorn_iters: expected 1 to {MAX_ITERS}, got {self.sinkhorn_iters}")
        if self.num_streams not in STREAM_COUNTS:
            raise ValueError(f"num_streams: expected one of {STREAM_COUNTS}, got {self.num_streams}")
        if self.residual_mapping not in RESIDUAL_MAPPINGS:
            known = " or ".join(map(repr, RESIDUAL_MAPPINGS))
            raise ValueError(f"residual_mapping: expected {known}, got {self.residual_mapping!r}")
        if self.post_eps and not self.is_identity:
            raise ValueError(f"post_eps: expected 0 beside residual_mapping='sinkhorn', got {self.post_eps}")
        for name in ("sinkhorn_eps", "pre_eps", "rms_eps", "post_scale", "post_eps"):
            value = getattr(self, name)
            if not (value == 0 or SMALLEST <= value <= LARGEST):
                raise ValueError(f"{name}: expected 0 or a positive number that float32 holds, got {value}")
            object.__setattr__(self, name, float(value))  # 2 and 2.0 are one kernel

    @classmethod
    def deepseek_v4(cls, hidden_size: int, **changes: float) -> MHCSpec:
        """The constants of the released DeepSeek-V4 code: every eps 1e-6, 20 iterations (the defaults)."""
        return cls(hidden_size, **changes)  # type: ignore[arg-type]

    @classmethod
    def deepseek_v4_1(cls, hidden_size: int, **changes: float) -> MHCSpec:
        """DeepSeek-V4's constants with V4.1's two changes: delayed_pre, and 1e-20 for rms_eps (C is 5120 there)."""
        return cls(hidden_size, **{"rms_eps": 1e-20, "delayed_pre": True, **changes})  # type: ignore[arg-type]

    @classmethod
    def glm5_3(cls, hidden_size: int, **changes: float) -> MHCSpec:
        """GLM-5.3's: DeepSeek-V4's constants but for 1e-5 as rms_eps (C is 4096 there); its head is a mean."""
        return cls(hidden_size, **{"rms_eps": 1e-5, **changes})  # type: ignore[arg-type]

    @classmethod
    def hy4(cls, hidden_size: int, **changes: Any) -> MHCSpec:
        """Hy4's: H_res = I, 1e-5 for rms_eps and 1e-6 for the gates' eps (78 layers there)."""
        return cls(hidden_size, **{"rms_eps": 1e-5, "post_eps": 1e-6, "residual_mapping": "identity", **changes})

    @classmethod
    def paper(cls, hidden_size: int, **changes: float) -> MHCSpec:
        """The constants of the paper's equations: no eps but the RMS norm's 1e-20."""
        return cls(hidden_size, **{"sinkhorn_eps": 0.0, "pre_eps": 0.0, "rms_eps": 1e-20, **changes})  # type: ignore[arg-type]

    @property
    def is_identity(self) -> bool:
        """Whether H_res is the identity."""
        return self.residual_mapping == "identity"

    @property
    def num_coefficients(self) -> int:
        """M = n² + 2n, rows of phi and bias: pre n, post n, res n·n; with the identity 2n."""
        return 2 * self.num_streams + (0 if self.is_identity else self.num_streams**2)

    @property
    def num_groups(self) -> int:
        """Groups of rows, which have an alpha each: pre, post, res; with the identity the first two."""
        return 2 if self.is_identity else 3

    @property
    def stream_size(self) -> int:
        """K = n·C, elements of a token's stream."""
        return self.num_streams * self.hidden_size
