"""mHC in a minute: a connection around a layer, what its constraint holds, what HC's gain does, how exact kernels are.

python examples/quickstart.py
"""

import torch

import mhc_tilelang as mhc
from mhc_tilelang import diagnostics, reference

torch.manual_seed(0)
spec = mhc.MHCSpec.deepseek_v4(hidden_size=256)  # n = 4 streams, 20 Sinkhorn iterations
n, C = spec.num_streams, spec.hidden_size


class Model(torch.nn.Module):
    """24 layers on a residual stream of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.RMSNorm(C), torch.nn.Linear(C, C)) for _ in range(24)
        )
        self.connections = torch.nn.ModuleList(mhc.connection(kind, spec, i) for i in range(24))
        for connection in self.connections:  # away from the start, as if trained
            with torch.no_grad():
                connection.alpha.fill_(1.0)
                projection = connection.phi if kind == "mhc" else connection.theta
                projection.normal_(std=projection.shape[-1] ** -0.5)  # logits, or tanh's arguments, of size 1

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        stream = mhc.ResidualStream(h, n, self.kind)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(connection)))
        return stream.reduce("mean")


print("1. A connection around a layer: x [tokens, n, C] -> the layer's input -> x_next")
connection, layer = mhc.HyperConnection(spec, sublayer=0), torch.nn.Linear(C, C)
with torch.no_grad():
    connection.alpha.fill_(1.0)
    connection.phi.normal_(std=spec.stream_size**-0.5)
    x = torch.randn(512, n, C)
    layer_input, h_post, h_res = connection(x)
    x_next = connection.merge(x, layer(layer_input), h_post, h_res)
    print(f"   x {tuple(x.shape)}, layer input {tuple(layer_input.shape)}, x_next {tuple(x_next.shape)}")

    print("2. h_res is doubly stochastic, token by token: rows to eps, columns as 20 iterations bring them")
    rows, columns = diagnostics.sum_deviation(h_res)
    print(f"   smallest entry {h_res.min():.1e}; off 1 at most: row sums {rows.max():.1e}, columns {columns.max():.1e}")

    print("3. So nothing grows with depth: composite gain, 24 sublayers with random projections")
    for kind in ("hc", "mhc"):
        model = Model(kind)
        with diagnostics.watch(model) as report:
            model(torch.randn(512, C))
        forward, backward = (
            max(row[f"composite_{way}_gain"] for row in report.rows) for way in ("forward", "backward")
        )
        print(f"   {kind:3}  forward {forward:10.4g}  backward {backward:10.4g}")

    print("4. The kernels against numpy in float64: largest error over the largest value")
    parameters = connection.phi, connection.alpha, connection.bias
    expected = reference.pre(x.numpy(), *(p.detach().numpy() for p in parameters), spec)
    expected += (reference.post(x.numpy(), layer(layer_input).numpy(), h_post.numpy(), h_res.numpy()),)
    names = ("layer_input", "h_post", "h_res", "x_next")
    for name, got, exact in zip(names, (layer_input, h_post, h_res, x_next), expected, strict=True):
        print(f"   {name:11}  {abs(got.numpy() - exact).max() / abs(exact).max():.1e}")
