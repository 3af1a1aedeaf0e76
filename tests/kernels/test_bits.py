"""Bits: a token's result depends on that token alone, on one device and build.

Would catch: a sum whose order follows the batch, the split or the thread count; a race; a fused function that
rounds elsewhere than its parts.
"""

import pytest
import torch
from helpers import CPU, assert_same_bits, map_tokens, replace_launch
from helpers_backward import BACKWARD, SUMS, in_nan, take, take_tokens, token_axis

from mhc_tilelang import launch, ops
from mhc_tilelang.checking.inputs import Case, Inputs

NUM_TOKENS = 70
CASES = {
    "n4-bfloat16": Case(4, 1000, torch.bfloat16, NUM_TOKENS),  # four chunks, so that splits matter
    "n2-float16": Case(2, 192, torch.float16, NUM_TOKENS),
    "n8-float32": Case(8, 192, torch.float32, NUM_TOKENS),
}


def projected(inputs, rows=None):
    groups = None if rows is None else 1
    return inputs.x, inputs.phi[:rows], inputs.alpha[:groups], inputs.bias[:rows]


FUNCTIONS = {
    "coefficients": lambda i, spec: ops.coefficients(*projected(i), spec),
    "pre": lambda i, spec: ops.pre(*projected(i), spec),
    "pre-normed": lambda i, spec: ops.pre(*projected(i), spec, rms_norm_weight=torch.linspace(-1, 2, spec.hidden_size)),
    "post": lambda i, _: (ops.post(i.x, i.layer_output, i.h_post, i.h_res),),
    "post_pre": lambda i, spec: ops.post_pre(i.x, i.layer_output, i.h_post, i.h_res, *projected(i)[1:], spec),
    "sinkhorn": lambda i, spec: (ops.sinkhorn(i.logits, spec.sinkhorn_iters, spec.sinkhorn_eps),),
    "expand_pre": lambda i, spec: ops.expand_pre(i.h, *projected(i)[1:], spec),
    "post_head": lambda i, spec: ops.post_head(
        i.x, i.layer_output, i.h_post, i.h_res, *projected(i, spec.num_streams)[1:], spec
    ),
    "head": lambda i, spec: (ops.head(*projected(i, spec.num_streams), spec),),
}


ENDS = ("expand_pre", "post_head")


def run(function, inputs, case):
    return FUNCTIONS[function](inputs, case.spec)


WITHOUT_OUT = ("head_coefficients_backward", "aggregate_norm_backward")  # no call hands them buffers
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_function_and_case = pytest.mark.parametrize(
    ("function", "case"),
    [  # the stream's two ends are made of kernels of other rows
        pytest.param(f, c, id=f"{name}-{f}", marks=[pytest.mark.full] * (f in ENDS and name != "n4-bfloat16"))
        for f in FUNCTIONS
        for name, c in CASES.items()
    ],
)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_backward = pytest.mark.parametrize("function", BACKWARD.values(), ids=BACKWARD)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards: the kernels take their thread count from it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def each_alone(function, inputs, case):
    """The outputs of one call per token, put together."""
    calls = [run(function, map_tokens(inputs, lambda t, k=k: t[k : k + 1]), case) for k in range(NUM_TOKENS)]
    return [torch.cat(outputs) for outputs in zip(*calls, strict=True)]


@every_function_and_case
def test_same_call_twice(case, function):
    """Also catches an argument that a kernel writes, and an output that shares memory with another one."""
    inputs = Inputs.of(case, CPU)
    first = run(function, inputs, case)
    kept = [output.clone() for output in first]
    for _ in range(3):
        assert_same_bits(run(function, inputs, case), first)
    assert_same_bits(first, kept)
    assert_same_bits(vars(inputs).values(), vars(Inputs.of(case, CPU)).values())


@every_function_and_case
def test_token_alone_and_in_batches(case, function):
    """A token has equal bits in batches of 1 to 70, then repeatedly at random places, in batches of 127 to 4097."""
    inputs = Inputs.of(case, CPU)
    alone = each_alone(function, inputs, case)
    for size in range(1, NUM_TOKENS + 1):
        batch = run(function, map_tokens(inputs, lambda t, size=size: t[:size]), case)
        assert_same_bits(batch, [output[:size] for output in alone])
    generator = torch.Generator().manual_seed(6)
    for size in (127, 1000, 4097):
        places = torch.randint(NUM_TOKENS, (size,), generator=generator)
        batch = run(function, map_tokens(inputs, lambda t, places=places: t[places]), case)
        assert_same_bits(batch, [output[places] for output in alone])


@every_function
def test_thread_count(function, threads):
    """1, 2 and 3 threads, 70 and 4097 tokens. Catches a partial sum per thread."""
    case = CASES["n4-bfloat16"]
    small = Inputs.of(case, CPU)
    for inputs in (small, map_tokens(small, lambda t: t.repeat(59, *[1] * (t.ndim - 1))[:4097])):
        threads(1)
        one = run(function, inputs, case)
        for count in (2, 3):
            threads(count)
            assert_same_bits(run(function, inputs, case), one)


@every_backward
@every_case
def test_same_backward_twice(case, function):
    """Sums over tokens included. Also catches an argument that is written, and outputs that share memory."""
    arguments = function.arguments(case)
    before = [a.clone() for a in arguments.values() if isinstance(a, torch.Tensor)]
    first = function(arguments)
    kept = [output.clone() for output in first.values()]
    for _ in range(3):
        assert_same_bits(function(arguments).values(), first.values())
    assert_same_bits(first.values(), kept)
    assert_same_bits([a for a in arguments.values() if isinstance(a, torch.Tensor)], before)


@every_backward
@every_case
def test_backward_of_a_token_alone_and_in_batches(case, function):
    """The gradients of a token, in batches of 1 to 70, then at random places in batches of 127 to 4097."""
    arguments = function.arguments(case)

    def of_tokens(places):
        got = function(take_tokens(arguments, places))
        return {name: output for name, output in got.items() if name not in SUMS}

    singles = [of_tokens(torch.tensor([k])) for k in range(NUM_TOKENS)]
    alone = {name: torch.cat([one[name] for one in singles], token_axis(name)) for name in singles[0]}
    generator = torch.Generator().manual_seed(6)
    batches = [torch.arange(size) for size in range(1, NUM_TOKENS + 1)]
    batches += [torch.randint(NUM_TOKENS, (size,), generator=generator) for size in (127, 1000, 4097)]
    for places in batches:
        expected = [take(name, output, places) for name, output in alone.items()]
        assert_same_bits(of_tokens(places).values(), expected)


@every_backward
def test_thread_count_of_a_backward(function, threads):
    """1, 2 and 3 threads, 70 and 4097 tokens, sums over tokens included. Catches a partial sum per thread."""
    small = function.arguments(CASES["n4-bfloat16"])
    for arguments in (small, take_tokens(small, torch.arange(4097) % NUM_TOKENS)):
        threads(1)
        one = function(arguments)
        for count in (2, 3):
            threads(count)
            assert_same_bits(function(arguments).values(), one.values())


@pytest.mark.parametrize("name", [name for name in BACKWARD if name not in WITHOUT_OUT])
def test_given_outputs_of_a_backward_are_written(name):
    """`out=`: the same bits, in that memory."""
    function = BACKWARD[name]
    for num_tokens in (NUM_TOKENS, 1100):  # one range of tokens for g_phi, and three
        arguments = take_tokens(function.arguments(CASES["n8-float32"]), torch.arange(num_tokens) % NUM_TOKENS)
        expected = function(arguments)
        given = [in_nan(torch.full_like(tensor, torch.nan), 0) for tensor in expected.values()]
        returned = function(arguments, out=tuple(given) if len(given) > 1 else given[0])
        assert_same_bits(given, expected.values())
        assert all(r is g for r, g in zip(returned.values(), given, strict=True))


def test_given_total_of_partial_sums_is_written():
    partial, total = torch.randn(17, 300), torch.full((300,), torch.nan)
    assert launch.sum_partials(partial, out=total) is total
    assert_same_bits([total], [launch.sum_partials(partial)])


def test_sinkhorn_backward_is_the_one_in_coefficients():
    """Dots of zero make the bias the logits; g_bias of one token is its gradient."""
    function = BACKWARD["coefficients_backward"]
    arguments = take_tokens(function.arguments(CASES["n4-bfloat16"]), torch.arange(1))
    arguments["projected"][8:24] = 0.0
    logits = arguments["bias"][8:].view(1, 4, 4).clone()
    expected = launch.sinkhorn_backward(arguments["g_h_res"], logits, 20, 1e-6)
    assert_same_bits([function(arguments)["g_bias"][8:]], [expected])


@pytest.mark.parametrize("parallel_blocks", [1, 2, 3, 4, 264])
@pytest.mark.parametrize("function", ["coefficients", "pre", "head"])
def test_size_of_the_device(function, parallel_blocks, monkeypatch):
    """A device that runs more blocks splits further. Catches totals added in the order of the splits."""
    case = CASES["n4-bfloat16"]
    inputs = map_tokens(Inputs.of(case, CPU), lambda t: t[:3])
    expected = run(function, inputs, case)
    replace_launch(monkeypatch, "parallel_blocks", lambda _: parallel_blocks)
    assert_same_bits(run(function, inputs, case), expected)


@every_case
def test_pre_is_coefficients_and_aggregation(case):
    inputs = Inputs.of(case, CPU)
    h_pre, h_post, h_res = ops.coefficients(*projected(inputs), case.spec)
    assert_same_bits(ops.pre(*projected(inputs), case.spec), [launch.aggregate(inputs.x, h_pre), h_post, h_res])


def test_sinkhorn_is_the_one_in_coefficients():
    """Equal bits on logits that are the bias alone. Catches two copies of the iteration that drift apart."""
    case = CASES["n4-bfloat16"]
    inputs = Inputs.of(case, CPU)
    _, _, h_res = ops.coefficients(torch.zeros_like(inputs.x), *projected(inputs)[1:], case.spec)
    logits = inputs.bias[8:].view(1, 4, 4).expand(NUM_TOKENS, 4, 4).contiguous()
    assert_same_bits([h_res], [ops.sinkhorn(logits)])


def test_given_outputs_are_written():
    """`out=` of the launches, which allocate nothing then: the same bits, in that memory."""
    case = CASES["n4-bfloat16"]
    i, spec = Inputs.of(case, CPU), case.spec
    plan = launch.projection_plan(i.x, spec.num_coefficients)
    partial = launch.project(i.x, i.phi, plan)
    launches = [
        lambda **out: launch.expand(i.h, 4, **out),
        lambda **out: launch.aggregate(i.x, i.h_pre, **out),
        lambda **out: launch.post(i.x, i.layer_output, i.h_post, i.h_res, **out),
        lambda **out: launch.sinkhorn(i.logits, 20, 1e-6, **out),
        lambda **out: launch.project(i.x, i.phi, plan, **out),
        lambda **out: launch.coefficients(partial, i.alpha, i.bias, spec, plan, **out)[:3],  # not what is kept
    ]
    for call in launches:
        expected = call()
        single = isinstance(expected, torch.Tensor)
        expected = [expected] if single else expected
        given = [torch.full_like(tensor, float("nan")) for tensor in expected]
        returned = call(out=given[0] if single else tuple(given))
        assert_same_bits(given, expected)
        returned = [returned] if single else returned
        assert all(r is g for r, g in zip(returned, given, strict=True))


def test_given_partial_sums_of_another_split_are_refused():
    """One slab where every chunk writes its own would be written out of bounds."""
    case = CASES["n4-bfloat16"]
    i = Inputs.of(case, CPU)
    plan = launch.projection_plan(i.x, 24)
    with pytest.raises(ValueError, match=r"project: out: expected shape \[4, 40, 70\], got \[1, 40, 70\]"):
        launch.project(i.x, i.phi, plan, 1, out=torch.empty(1, plan.slab_rows, NUM_TOKENS))
