"""replay: the stream of a block of sublayers, recomputed for the backward from its start and the layers' outputs.

Equation (3), for the sublayers k = 0 … S − 1 of a block one after the other, as `post` and `aggregate` have it:

    x_{k+1}[t, j, c]   = Σ_i h_res_k[t, j, i] · x_k[t, i, c] + h_post_k[t, j] · layer_output_k[t, c]
    layer_input_k[t, c] = Σ_i h_pre_k[t, i] · x_k[t, i, c]

Nothing is projected: the coefficients are those that the forward left, n² + 2n numbers a token and sublayer. So no
channel needs another one, and there is no barrier.

Traffic per token: the start and S layer outputs are read, (n + S)·C, and what follows is written, S·n·C and C for each
layer input that is asked for. The last sublayer's output only leads to the next block's start, which is kept: a block
of L sublayers is replayed with S = L − 1 and L layer inputs, n + L − 1 read and n·(L − 1) + L written.

**The same bits as the forward.** The fma chains are those of `post` and `aggregate`, by the same macros; x_{k+1} is
rounded to the stream's dtype in registers before it is written, aggregated, or mixed again.

Without h_res, where H_res is the identity, x_{k+1}[j] = fma(h_post_k[j], layer_output_k, x_k[j]).

Each sublayer's tensors are arguments of their own, since they lie where the forward left them: `sublayers` of them are
compiled in, and a longer block is a chain of launches.
"""

import tilelang.language as T
from tvm.script.ir_builder import tirx

from .aggregate import aggregate_streams
from .plans import ChannelTile
from .post import add_output, mix_streams


def arguments(name: str, numbers, shape: tuple, dtype: str) -> list:
    """A tensor argument of the function that is being traced for each number; a signature has no lists."""
    return [tirx.arg(f"{name}_{k}", T.Tensor[shape, dtype]) for k in numbers]


def replay_kernel(
    num_streams: int,
    hidden_size: int,
    dtype: str,
    layer_dtype: str,
    sublayers: int,
    inputs: tuple[int, ...],
    tile: ChannelTile,
    has_h_res: bool = True,
):
    """x_0 [T, n, C]; layer_output_k [T, C], h_post_k [T, n], h_res_k [T, n, n] for k < `sublayers`; h_pre_k [T, n]
    for each k of `inputs` -> x_1 … x_sublayers [T, n, C]; layer_input_k [T, C] for each k of `inputs`.

    Without h_res there are no h_res_k.
    """
    n, block = num_streams, tile.channels
    blocks = -(-hidden_size // block)
    num_tokens = T.dynamic("num_tokens")
    steps = tuple(range(sublayers))
    stream, layer = (num_tokens, n, hidden_size), (num_tokens, hidden_size)

    @T.prim_func
    def replay():
        x = arguments("x", range(sublayers + 1), stream, dtype)
        layer_output = arguments("layer_output", steps, layer, layer_dtype)
        h_post = arguments("h_post", steps, (num_tokens, n), "float32")
        h_res = arguments("h_res", steps if has_h_res else (), (num_tokens, n, n), "float32")
        h_pre = arguments("h_pre", inputs, (num_tokens, n), "float32")
        layer_input = arguments("layer_input", inputs, layer, dtype)
        with T.Kernel(num_tokens * blocks, threads=tile.threads) as index:
            token = index // blocks
            first = index % blocks * block
            x_frag = T.alloc_fragment((n, block), dtype)
            layer_output_frag = T.alloc_fragment((block,), layer_dtype)
            acc = T.alloc_fragment((n, block), T.float32)
            input_acc = T.alloc_fragment((block,), T.float32)
            T.copy(x[0][token, 0, first], x_frag)
            for k in (*steps, sublayers):
                if k in inputs:
                    aggregate_streams(input_acc, x_frag, h_pre[inputs.index(k)], token)
                    T.copy(input_acc, layer_input[inputs.index(k)][token, first])
                if k < sublayers:
                    T.copy(layer_output[k][token, first], layer_output_frag)
                    if has_h_res:
                        mix_streams(acc, x_frag, layer_output_frag, h_post[k], h_res[k], token)
                    else:
                        add_output(acc, x_frag, layer_output_frag, h_post[k], token)
                    T.copy(acc, x_frag)
                    T.copy(x_frag, x[k + 1][token, 0, first])

    return replay
