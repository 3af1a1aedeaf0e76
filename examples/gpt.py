"""A small GPT on bytes, whose layers read and write a residual stream of any kind.

python examples/gpt.py --connection mhc        # or hc, or residual; two to three minutes on two cores
python examples/gpt.py --text my.txt --steps 1000
python examples/gpt.py --recompute                 # the backward makes streams and layer inputs again
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import mhc_tilelang as mhc


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(u)).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class GPT(nn.Module):
    def __init__(self, kind: str, width: int, depth: int, heads: int, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.spec = mhc.MHCSpec.deepseek_v4(width)
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(layer for _ in range(depth) for layer in (Attention(width, heads), mlp(width)))
        self.connections = nn.ModuleList(mhc.connection(kind, self.spec, i) for i in range(2 * depth))
        self.recompute: int | None = None  # sublayers a block
        self.norm, self.unembed = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = (self.token(tokens) + self.position.weight[: tokens.shape[1]]).to(self.dtype)
        stream = mhc.ResidualStream(h, self.spec.num_streams, self.kind, recompute=self.recompute)
        for connection, layer in zip(self.connections, self.layers, strict=True):
            stream.write(layer(stream.read(connection)))
        return self.unembed(self.norm(stream.reduce("mean")))


def read_bytes(text: Path | None) -> torch.Tensor:
    """A file's bytes; by default those of the modules of Python's standard library."""
    paths = [text] if text else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def optimizer_of(model: GPT, rate: float) -> torch.optim.Optimizer:
    """Weight decay for the layers' matrices; none for connections, norms and biases."""
    decayed = [weight for weight in model.layers.parameters() if weight.ndim > 1]
    chosen = set(decayed)
    rest = [parameter for parameter in model.parameters() if parameter not in chosen]
    return torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], rate, (0.9, 0.95), 1e-8, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connection", choices=("residual", "hc", "mhc"), default="mhc")
    parser.add_argument("--recompute", action="store_true", help="keep the stream of every few sublayers only")
    parser.add_argument("--text", type=Path, help="a file to learn (the Python standard library)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of stream and layers")
    for name, value in (("steps", 200), ("batch", 8), ("context", 256), ("width", 128), ("depth", 4), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW's learning rate (0.002)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    data = read_bytes(args.text)
    model = GPT(args.connection, args.width, args.depth, args.heads, args.context, dtype).to(device)
    if args.recompute:
        model.recompute = mhc.recompute_length(len(model.layers), model.spec.num_streams)
    optimizer = optimizer_of(model, args.rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.connection}: {size:,} parameters, {len(data):,} bytes of text, {args.dtype} on {device.type}")

    start, losses = time.perf_counter(), []
    for step in (progress := tqdm(range(1, args.steps + 1), unit="step")):
        starts = torch.randint(len(data) - args.context, (args.batch, 1))
        window = data[starts + torch.arange(args.context + 1)].long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if step % 50 == 0:
            tqdm.write(f"step {step:5}  loss {sum(losses[-50:]) / 50:.3f} (mean of 50)")
    last, seconds = losses[-20:], time.perf_counter() - start
    print(f"loss {losses[0]:.3f} -> {sum(last) / len(last):.3f} (mean of the last {len(last)})")
    print(f"{args.steps * args.batch * args.context / seconds:,.0f} tokens/s, {seconds:.0f} s")


if __name__ == "__main__":
    main()
