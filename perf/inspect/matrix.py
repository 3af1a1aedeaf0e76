"""The builds: kernels that calls launch, their sizes and architectures.

`calls.launches` says what a call launches, so nothing is built here that does not ship. A subject is one of its
kernels, named by its family and, where a family is compiled in more than one way at the same sizes, a variant. Loads
neither torch nor tilelang until `subjects` is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...errors import MHCError
from ...kernels import FAMILIES, boundary_plans, projection_plans
from ..calls.cases import POST_PRE, POST_PRE_DELAYED, Case, Shape
from ..calls.launches import launches
from ..calls.table import CALLS
from ..options import DTYPES
from .occupancy import ARCHITECTURES

if TYPE_CHECKING:
    from ...compiler.recording import Recorded

TOKENS = 4096  # sets the run-time sizes of a launch, and in how many lanes partial sums are added
FEW_TOKENS = 64  # of the boundary's form for few
PARALLEL_BLOCKS = 2 * 132  # of a projection, on the multiprocessors of an H100 or H200
WIDTHS = (1280, 1920, 2560, 4096, 5120, 7168)
STREAMS = (2, 4, 8)
OTHER_STREAMS = (1, 2, 3, 5, 6, 7, 8)  # than what is studied: stored, not built in CI
STUDIED = Shape(TOKENS, 4, 2560, "bfloat16")  # of the pages and of the representative builds
MAIN = "sm_90a"  # what the tiles are made for
# Where tensor cores, long sums or much shared memory make the dtype matter more than the width of an access.
HEAVY = ("project", "project_backward", "post_backward")
BY_WARPS = ("post_project", "coefficients_aggregate")  # whose 16-bit code has a conversion for each dtype
# A dtype reaches these through the number of chunks alone: one is enough.
COEFFICIENTS = ("coefficients", "head_coefficients", "gates")
# Flags of a launch that make a variant of their own.
FORMS = {"has_h_pre": "aggregated", "has_g_layer_input": "aggregated", "is_deferred": "deferred"}
GATES = projection_plans.projection_plan(8, 4, 2560, "bfloat16", "cuda")  # of an identity connection's rows
# What else `launch` may ask for: family, variant, the dtype of the stream, what is changed.
VARIANTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("split_phi", "head", "bfloat16", {"plan": projection_plans.projection_plan(4, 4, 2560, "bfloat16", "cuda")}),
    ("project", "head", "bfloat16", {"plan": projection_plans.projection_plan(4, 4, 2560, "bfloat16", "cuda")}),
    (
        "project_backward",
        "head",
        "bfloat16",
        {"plan": projection_plans.projection_backward_plan(4, 2560, "bfloat16", "cuda", 4), "has_g_layer_input": True},
    ),
    ("project_backward", "g_x only", "bfloat16", {"needs_g_phi": False}),
    ("project_backward", "g_phi only", "bfloat16", {"needs_g_x": False}),
    (
        "project_backward",
        "one stream",
        "bfloat16",
        {
            "num_streams": 1,
            "plan": projection_plans.projection_backward_plan(24, 2560, "bfloat16", "cuda", 1),
            "has_g_layer_input": True,
        },
    ),
    ("post_project", "head", "bfloat16", {"plan": boundary_plans.post_project_plan(4, 4, 2560, "bfloat16", "cuda")}),
    (
        "boundary_backward",
        "head",
        "bfloat16",
        {"plan": boundary_plans.boundary_backward_plan(4, 4, 2560, "bfloat16", "cuda")},
    ),
    ("split_phi", "gates", "bfloat16", {"plan": GATES}),
    ("project", "gates", "bfloat16", {"plan": GATES}),
    ("post", "identity", "bfloat16", {"has_h_res": False}),
    (
        "post_project",
        "identity, aggregated",
        "bfloat16",
        {
            "plan": boundary_plans.post_project_plan(8, 4, 2560, "bfloat16", "cuda", True),
            "has_h_pre": True,
            "has_h_res": False,
        },
    ),
    ("post", "16-bit layer", "float32", {"layer_dtype": "bfloat16"}),
    ("post_backward", "16-bit layer", "float32", {"layer_dtype": "bfloat16"}),
    ("post", "float32 layer", "bfloat16", {"layer_dtype": "float32"}),
    ("post_backward", "float32 layer", "bfloat16", {"layer_dtype": "float32"}),
    ("post_backward", "mixing only", "bfloat16", {"needs_g_x": False, "needs_g_layer_output": False}),
    ("aggregate_quantized", "layer input beside it", "bfloat16", {"has_layer_input": True}),
    ("coefficients_backward", "no res", "bfloat16", {"has_g_h_res": False}),
)


@dataclass(frozen=True)
class Subject:
    """A kernel to build; None for sizes and dtypes that it does not depend on."""

    kernel: str
    variant: str
    num_streams: int | None
    hidden_size: int | None
    dtype: str | None
    launch: Recorded

    @property
    def label(self) -> str:
        """The family, and the variant in brackets."""
        return f"{self.kernel} ({self.variant})" if self.variant else self.kernel

    def parameters(self, arch: str) -> dict[str, Any]:
        """Return the compile-time parameters for an architecture; fewer stages where shared memory is small, and tiles
        for eight streams.
        """
        parameters = self.launch.parameters
        plan = parameters.get("plan")
        projection = getattr(plan, "projection", plan)
        if isinstance(projection, projection_plans.WarpProjectionPlan) and projection.rows == 80:
            sizes = (80, 8, parameters["hidden_size"], projection.operand_dtype, "cuda")
            room = ARCHITECTURES[arch].shared_bytes_per_block
            if projection is plan:
                return {**parameters, "plan": projection_plans.projection_plan(*sizes, room)}
            return {**parameters, "plan": boundary_plans.post_project_plan(*sizes, parameters["has_h_pre"], room)}
        if self.kernel != "boundary_backward" or not isinstance(plan := parameters["plan"], projection_plans.WarpsPlan):
            return parameters
        n, hidden_size, dtype = (parameters[name] for name in ("num_streams", "hidden_size", "dtype"))
        room = ARCHITECTURES[arch].shared_bytes_per_block
        fitting = boundary_plans.boundary_backward_plan(plan.rows, n, hidden_size, dtype, "cuda", dtype, room)
        return {**parameters, "plan": fitting}

    def key(self, arch: str) -> tuple[str, str, str, int | None, int | None, str | None]:
        """Return the key that tells the rows of all builds apart."""
        return self.kernel, self.variant, arch, self.num_streams, self.hidden_size, self.dtype


def subjects(shape: Shape, kernels: Iterable[str] = FAMILIES) -> list[Subject]:
    """Every kernel of these families at one shape, in the families' order, each once."""
    found: dict[tuple[str, str], Subject] = {}
    every = [launches(Case(call, shape), "cuda", PARALLEL_BLOCKS) for call in CALLS]
    rows = shape.num_streams * (shape.num_streams + 2)
    if boundary_plans.post_pre_plan(
        projection_plans.projection_plan(rows, shape.num_streams, shape.hidden_size, shape.dtype, "cuda")
    ):
        few = replace(shape, num_tokens=FEW_TOKENS)
        every += [launches(Case(call, few), "cuda", PARALLEL_BLOCKS) for call in (POST_PRE, POST_PRE_DELAYED)]
    for launch in chain.from_iterable(every):
        subject = subject_of(launch, shape, variant_of(launch))
        found.setdefault((subject.kernel, subject.variant), subject)
    wanted = (subject for subject in found.values() if subject.kernel in kernels)
    return sorted(wanted, key=lambda subject: list(FAMILIES).index(subject.kernel))


def subject_of(launch: Recorded, shape: Shape, variant: str) -> Subject:
    """A launch as a subject: a dtype reaches a kernel by itself or through the projection's plan."""
    depends = launch.parameters.keys()
    return Subject(
        launch.family,
        variant,
        shape.num_streams if "num_streams" in depends else None,
        shape.hidden_size if "hidden_size" in depends else None,
        shape.dtype if depends & {"dtype", "plan"} else None,
        launch,
    )


def variant_of(launch: Recorded) -> str:
    """Return the variant that tells a launch from others of its family at the same sizes; empty if there is none."""
    if not launch.parameters.get("has_h_res", True):
        return "identity"
    for flag, form in FORMS.items():
        if launch.parameters.get(flag):
            return form
    lanes = launch.parameters.get("lanes")  # of partial sums
    return f"{lanes} lane{'s' * (lanes > 1)}" if lanes else ""


def variants(kernels: Iterable[str] = FAMILIES) -> list[Subject]:
    """VARIANTS, at the studied shape."""
    found = []
    for family, variant, dtype, changes in VARIANTS:
        if family in kernels:
            shape = replace(STUDIED, dtype=dtype)
            every = subjects(shape, [family])
            base = min(every, key=lambda subject: bool(subject.variant)).launch
            streams = tuple(dict.fromkeys(name for subject in every for name in subject.launch.streams))
            launch = replace(base, parameters={**base.parameters, **changes}, streams=streams)
            found.append(subject_of(launch, shape, variant))
    return found


def cross(
    kernels: Sequence[str], streams: Iterable[int], widths: Iterable[int], dtypes: Iterable[str]
) -> list[Subject]:
    """Return the kernels at every combination of sizes, each once."""
    shapes = [Shape(TOKENS, n, width, dtype) for dtype in dtypes for n in streams for width in widths]
    return unique(subject for shape in shapes for subject in subjects(shape, kernels))


def unique(subjects: Iterable[Subject]) -> list[Subject]:
    """Drop repeated subjects, each kept where it comes first."""
    found: dict[tuple[object, ...], Subject] = {}
    for subject in subjects:
        found.setdefault(subject.key(""), subject)
    return list(found.values())


def full(kernels: Sequence[str]) -> list[Subject]:
    """Return every n, width and dtype that makes a difference, and the variants."""
    return [*telling(cross(kernels, STREAMS, WIDTHS, DTYPES)), *variants(kernels)]


def telling(subjects: Iterable[Subject]) -> list[Subject]:
    """Drop the coefficients' kernels of all dtypes but bfloat16, whose code the dtype does not change."""
    return [each for each in subjects if each.dtype in (None, "bfloat16") or each.kernel not in COEFFICIENTS]


def studied_shape(kernel: str) -> Shape:
    """Return the shape of a kernel's page: float32 where 16-bit streams of four have a kernel of their own."""
    return STUDIED if subjects(STUDIED, [kernel]) else replace(STUDIED, dtype="float32")


def representative(kernels: Sequence[str] = tuple(FAMILIES)) -> list[tuple[Subject, str]]:
    """Return CI's builds: n = 4 in bfloat16 on every architecture; the rest, one of a kind, on the main one."""
    width = [STUDIED.hidden_size]
    here = [one for kernel in kernels for one in subjects(studied_shape(kernel), [kernel])]
    heavy = [kernel for kernel in kernels if kernel in HEAVY]
    others = [
        *cross(kernels, [2, 8], width, ["bfloat16"]),
        *cross([kernel for kernel in kernels if kernel in (*HEAVY, *BY_WARPS)], [4], width, ["float16"]),
        *telling(cross(kernels, [4], width, ["float32"])),
        *cross(heavy, [8], width, ["float32"]),
    ]
    # The aggregated form of the projection's backward holds the plain one; without h_res there is less of the same.
    others = [each for each in others if each.kernel != "project_backward" or each.variant]
    others = [each for each in others if each.variant != "identity"]
    return [
        *((subject, arch) for subject in here for arch in ARCHITECTURES),
        *((subject, MAIN) for subject in unique([*here, *others, *variants(kernels)])[len(here) :]),
    ]


def other_streams() -> list[tuple[Subject, str]]:
    """Return the builds stored beside CI's: other n on every architecture, and identity connections in float32."""
    shapes = [replace(STUDIED, num_streams=n) for n in OTHER_STREAMS]
    found = [(subject, arch) for shape in shapes for subject in subjects(shape) for arch in ARCHITECTURES]
    shape = replace(STUDIED, dtype="float32")
    of_identity = (one for one in subjects(shape) if "identity" in one.variant or "gates" in one.kernel)
    found += [(one, MAIN) for one in of_identity if one.dtype in (None, shape.dtype)]
    ci = {subject.key(arch) for subject, arch in representative()}
    return list({one.key(arch): (one, arch) for one, arch in found if one.key(arch) not in ci}.values())


def chosen_kernels(names: Sequence[str]) -> tuple[str, ...]:
    """The families that were named, all for none. Raises MHCError for a name that is no family."""
    for name in names:
        if name not in FAMILIES and name in CALLS:
            raise MHCError(f"kernel: {name} is a call; expected a kernel, of those it launches: {launched_by(name)}")
    if unknown := [name for name in names if name not in FAMILIES]:
        raise MHCError(f"kernel: expected any of {', '.join(FAMILIES)}, got {', '.join(unknown)}")
    return tuple(names) or tuple(FAMILIES)


def launched_by(call: str) -> str:
    """The families of a call at the studied shape."""
    return ", ".join(dict.fromkeys(each.family for each in launches(Case(call, STUDIED), "cuda", PARALLEL_BLOCKS)))


def refuse_unbuilt(kernels: Iterable[str], found: Iterable[Subject]) -> None:
    """Raise MHCError for a family that was named and of which nothing was found to build."""
    built = {subject.kernel for subject in found}
    for kernel in kernels:
        if kernel not in built:
            known = "at these sizes" if subjects(STUDIED, [kernel]) else "of perf.launches, which says what is built,"
            raise MHCError(f"{kernel}: expected a call that launches it, got none {known}")
