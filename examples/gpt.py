"""A small GPT on bytes, whose layers read and write a residual stream of any kind.

python examples/gpt.py --connection mhc        # or hc, or residual; two to three minutes on two cores
python examples/gpt.py --text my.txt --steps 1000
python examples/gpt.py --recompute                 # the backward makes streams and layer inputs again
python examples/gpt.py --world 2                  # two processes, a pipeline; or --parallel ddp
"""

import argparse
import math
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
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
    """The model, or one stage of it: `stage` of `stages`, each with its share of the sublayers."""

    def __init__(
        self,
        kind: str,
        width: int,
        depth: int,
        heads: int,
        context: int,
        dtype: torch.dtype,
        stage: int = 0,
        stages: int = 1,
    ) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self.spec = mhc.MHCSpec.deepseek_v4(width)
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(layer for _ in range(depth) for layer in (Attention(width, heads), mlp(width)))
        self.connections = nn.ModuleList(mhc.connection(kind, self.spec, i) for i in range(2 * depth))
        self.recompute: int | None = None  # sublayers a block
        self.norm, self.unembed = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        self.first, self.last = stage == 0, stage == stages - 1
        mine = slice(2 * depth * stage // stages, 2 * depth * (stage + 1) // stages)
        self.layers, self.connections = self.layers[mine], self.connections[mine]
        if not self.first:
            del self.token, self.position
        if not self.last:
            del self.norm, self.unembed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens, or the streams of the stage before, to logits, or the streams for the stage after."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            if self.first:
                h = (self.token(x) + self.position.weight[: x.shape[1]]).to(self.dtype)
                stream = mhc.ResidualStream(h, self.spec.num_streams, self.kind, recompute=self.recompute)
            else:
                stream = mhc.ResidualStream.from_streams(x, connection=self.kind, recompute=self.recompute)
            for connection, layer in zip(self.connections, self.layers, strict=True):
                stream.write(layer(stream.read(connection)))
            return self.unembed(self.norm(stream.reduce("mean"))) if self.last else stream.hand_over()


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


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def clip(model: nn.Module, pipeline: bool) -> None:
    """Gradients of norm 1 at most, over all stages."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if pipeline:
        dist.all_reduce(squared := norm.square())
        norm = squared.sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connection", choices=("residual", "hc", "mhc"), default="mhc")
    parser.add_argument("--recompute", action="store_true", help="keep the stream of every few sublayers only")
    parser.add_argument("--text", type=Path, help="a file to learn (the Python standard library)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of stream and layers"
    )
    sizes = {"steps": 200, "batch": 8, "context": 256, "width": 128, "depth": 4, "heads": 4}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW's learning rate (0.002)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=1, help="processes (1)")
    parser.add_argument("--parallel", choices=("pipeline", "ddp"), default="pipeline", help="parallelism (pipeline)")
    args = parser.parse_args()
    for name in sizes:
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name}: expected at least 1, got {value}")
    if args.width % args.heads:
        parser.error(f"--width: expected a multiple of --heads {args.heads}, got {args.width}")
    if args.text and not args.text.is_file():
        parser.error(f"--text: expected a file, got {args.text}")
    if args.world < 1 or args.batch % args.world:
        parser.error(f"--world: expected a divisor of --batch {args.batch}, got {args.world}")
    if args.world == 1:
        train(0, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(train, (args, folder), nprocs=args.world)


def train(rank: int, args: argparse.Namespace, folder: str = "") -> None:
    """One of the processes, which meet in a folder."""
    torch.manual_seed(args.seed)
    if args.world > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // args.world))
    pipeline, ddp = (args.world > 1 and args.parallel == kind for kind in ("pipeline", "ddp"))
    cuda = torch.cuda.device_count() >= args.world
    device, dtype = torch.device("cuda", rank) if cuda else torch.device("cpu"), getattr(torch, args.dtype)
    data = read_bytes(args.text)
    stage = (rank, args.world) if pipeline else (0, 1)
    model = GPT(args.connection, args.width, args.depth, args.heads, args.context, dtype, *stage).to(device)
    if args.recompute:
        model.recompute = mhc.recompute_length(len(model.layers), model.spec.num_streams)
    if args.world > 1:
        meeting = f"file://{folder}/rendezvous"
        dist.init_process_group("nccl" if cuda else "gloo", meeting, rank=rank, world_size=args.world)
    optimizer = optimizer_of(model, args.rate)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.connection}: {size:,} parameters, {len(data):,} bytes of text, {args.dtype} on {device.type}")
    if pipeline:
        micro_batches = math.gcd(args.batch, 2 * args.world)
        built = PipelineStage(model, rank, args.world, device)
        schedule = Schedule1F1B(built, micro_batches, loss_fn=loss_of)
        if model.last:
            crossing = mhc.wire_bytes(model.spec, args.batch * args.context, dtype, args.connection)
            print(f"{args.world} stages, {micro_batches} micro-batches, {crossing:,} bytes a step each way")
    wrapped = DistributedDataParallel(model) if ddp else model
    talks = rank == (args.world - 1 if pipeline else 0)

    start, losses = time.perf_counter(), []
    for step in (progress := tqdm(range(1, args.steps + 1), unit="step", disable=not talks)):
        starts = torch.randint(len(data) - args.context, (args.batch, 1))
        window = data[starts + torch.arange(args.context + 1)].long().to(device)
        if ddp:
            window = window.chunk(args.world)[rank]
        tokens, targets = window[:, :-1], window[:, 1:]
        optimizer.zero_grad()
        if pipeline:
            parts: list[torch.Tensor] = []
            schedule.step(*([tokens] if model.first else []), target=targets if model.last else None, losses=parts)
            loss = torch.stack(parts).mean() if model.last else torch.zeros(())
        else:
            loss = loss_of(wrapped(tokens), targets)
            loss.backward()
        clip(model, pipeline)
        optimizer.step()
        warmup.step()
        if not talks:
            continue
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        if step % 50 == 0:
            tqdm.write(f"step {step:5}  loss {sum(losses[-50:]) / 50:.3f} (mean of 50)")
    if talks:
        last, seconds = losses[-20:], time.perf_counter() - start
        print(f"loss {losses[0]:.3f} -> {sum(last) / len(last):.3f} (mean of the last {len(last)})")
        print(f"{args.steps * args.batch * args.context / seconds:,.0f} tokens/s, {seconds:.0f} s")
    if args.world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
