"""A stream through a few sublayers, by hand: what a model does between its layers.

python examples/sublayers.py
"""

import torch

import mhc_tilelang as mhc

spec = mhc.MHCSpec.deepseek_v4(hidden_size=256)
n, C = spec.num_streams, spec.hidden_size
torch.manual_seed(0)


def parameters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """phi, alpha and bias of one sublayer; the bias is the paper's start, where h_res is close to the identity."""
    phi = torch.randn(spec.num_coefficients, spec.stream_size) / spec.stream_size**0.5
    bias = torch.cat([torch.full((n,), -3.0), torch.zeros(n), (6 * torch.eye(n) - 3).flatten()])
    return phi, torch.full((3,), 0.01), bias


layers = [torch.nn.Linear(C, C, dtype=torch.bfloat16) for _ in range(4)]
sublayers = [parameters() for _ in layers]

with torch.no_grad():
    x = mhc.expand(torch.randn(8, 128, C, dtype=torch.bfloat16), n)
    for layer, (phi, alpha, bias) in zip(layers, sublayers, strict=True):
        layer_input, h_post, h_res = mhc.pre(x, phi, alpha, bias, spec)
        x = mhc.post(x, layer(layer_input), h_post, h_res)
        rows, columns = h_res.sum(-1), h_res.sum(-2)
        print(
            f"stream {tuple(x.shape)}  rms {x.float().square().mean().sqrt():.3f}  "
            f"h_res rows {rows.min():.6f} to {rows.max():.6f}  columns {columns.min():.6f} to {columns.max():.6f}"
        )
