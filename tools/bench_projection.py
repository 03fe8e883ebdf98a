"""Linear layers with LoRA on a GPU: as one projection, and one by one.

    python tools/bench_projection.py                       the four projections of an 8B's layer
    python tools/bench_projection.py --weights nf4 --rows 2048 --rank 64
    python tools/bench_projection.py --only gate_up        one of them

Medians in milliseconds. "bare" is the product with the stacked weight alone, forward and for the
gradient of the input: what cannot be saved. "one by one" is the layers as they are under autocast,
forward and backward together. "room" has free columns behind input and gradient. The last lines
are the small products and moves by themselves.
"""
import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn

SHAPES = {"qkv": (4096, [4096, 1024, 1024]), "o": (4096, [4096]), "gate_up": (4096, [14336]*2),
          "down": (14336, [4096])}


def layers(width, sizes, args):
    from ftkit.lora.layers import LoraLinear
    from ftkit.quant.linear import QLinear
    out = []
    for n in sizes:
        m = nn.Linear(width, n, bias=args.bias, device="cuda", dtype=torch.bfloat16)
        if args.weights == "nf4": m = QLinear.from_linear(m)
        if args.rank: m = LoraLinear(m, args.rank, dropout=args.dropout)
        out.append(m.requires_grad_(False))
        if args.rank: m.A.requires_grad_(), nn.init.normal_(m.B, std=0.01).requires_grad_()
    return out


def runs(width, sizes, args):
    "Name → what to time."
    from ftkit.kernels.edges import product
    from ftkit.kernels.grouped import both
    from ftkit.kernels.lora import Projection
    modules = layers(width, sizes, args)
    p = Projection(modules, piece=args.piece)
    if args.weights == "bf16" or args.cache: p.hold(torch.bfloat16, cache=True)
    new = dict(device="cuda", dtype=torch.bfloat16)
    W = torch.randn(p.N, p.K, **new)*0.02
    x, dy = torch.randn(args.rows, p.K + p.R, **new), torch.randn(args.rows, p.N + p.R, **new)
    x_, dy_ = x[:, :p.K].contiguous(), dy[:, :p.N].contiguous()
    y, dx = torch.empty(args.rows, p.N, **new), torch.empty(args.rows, p.K, **new)
    seed = 1 if args.dropout else None
    _, xa = p.project(x, out=y, seed=seed)

    def one_by_one():
        inner = x_.detach().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16): outs = [m(inner) for m in modules]
        torch.autograd.backward(outs, list(dy_.split(sizes, 1)))
        for t in p.trainable: t.grad = None
    out = {"bare, forward": lambda: torch.mm(x_, W.T, out=y),
           "bare, backward": lambda: torch.mm(dy_, W, out=dx),
           "projection, forward": lambda: p.project(x_, out=y, seed=seed),
           "projection, forward, room": lambda: p.project(x, out=y, seed=seed),
           "projection, backward": lambda: p.project_backward(dy_, x_, xa, dx, seed=seed),
           "projection, backward, room": lambda: p.project_backward(dy, x, xa, dx, seed=seed),
           "one by one, both": one_by_one}
    if not p.R: return out
    A, sB = torch.zeros(p.R, p.K, **new), torch.zeros(p.N, p.R, **new)
    return out | {"  x Aᵀ": lambda: x_ @ A.T, "  dy sB": lambda: dy_ @ sB,
                  "  dyᵀ xa": lambda: product(dy_.T, xa, torch.float32),
                  "  these two, of one reading": lambda: both(dy_, sB, xa, p.diagonal),
                  "  dxaᵀ x": lambda: product(xa.T, x_, torch.float32),
                  "  factors to their places": lambda: p.spread(A, sB)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SHAPES))
    parser.add_argument("--weights", choices=["bf16", "nf4"], default="bf16")
    parser.add_argument("--cache", action="store_true", help="hold weights in four bits unpacked")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--piece", type=int)
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    from triton.testing import do_bench
    print(torch.cuda.get_device_name(), "torch", torch.__version__, vars(args))
    names, total = [args.only] if args.only else list(SHAPES), {}
    for name in names:
        print(f"{name}: {SHAPES[name][0]} → {SHAPES[name][1]}")
        for what, run in runs(*SHAPES[name], args).items():
            ms = do_bench(run, warmup=100, rep=400, return_mode="median")
            total[what] = total.get(what, 0) + ms
            print(f"  {what:30}{ms:8.3f} ms", flush=True)
    if len(names) > 1: print("together")
    for what, ms in total.items() if len(names) > 1 else (): print(f"  {what:30}{ms:8.3f} ms")


if __name__ == "__main__": main()
