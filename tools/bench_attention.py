"""Attention on a GPU: milliseconds forward and backward of every back end that may run.

    python tools/bench_attention.py                      rows and packed samples of 8B and 7B models
    python tools/bench_attention.py --heads 14 2 64      other heads: of queries, of keys, width
    python tools/bench_attention.py --dtype float16 --window 1024 --softcap 50
    python tools/bench_attention.py --tiles              the shapes of tiles of the Triton kernels

Before it is timed, each back end is compared with the formula (see `measure`). --check prints the
distance from the formula in float64. TFLOP/s count what causality leaves: 4·head_dim
operations a pair of tokens forward, 2.5 times that backward.
"""
import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from ftkit import attention
from ftkit.attention import measure
from ftkit.kernels import attention as kernels
from ftkit.kernels.attention import Rows, reference_backward, reference_forward
from ftkit.kernels.backends import BACKENDS, case_of
from ftkit.kernels.launch import capability

SHAPES = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 3),
          (128, 128, 8, 2), (128, 32, 8, 3)] # queries, keys, warps, stages
TILES = dict(forward=SHAPES, queries=SHAPES,
             keys=[(64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 8, 2), (64, 64, 4, 2),
                   (32, 128, 8, 2), (32, 128, 8, 3), (128, 64, 8, 2), (32, 64, 4, 3)])


def packed_rows(total, mean, seed=0):
    "Samples of log-normal lengths that fill `total` tokens."
    g = torch.Generator().manual_seed(seed)
    borders = [0]
    while borders[-1] < total:
        n = int((torch.randn((), generator=g) - .5).exp()*mean) + 1
        borders.append(min(total, borders[-1] + n))
    cu = torch.tensor(borders, dtype=torch.int32)
    return Rows(cu_seqlens=cu.cuda(), longest=int(cu.diff().max()), total=total)


def pairs(rows, window):
    "How many pairs of query and key there are."
    n = rows.borders("cpu").diff().double()
    w = n.clamp(max=window) if window else n
    return float((n*w - w*(w - 1)/2).sum())


def check(heads, kv_heads, head_dim, dtype, args):
    "The largest distance from float64 of each back end, of the largest number."
    cu = torch.tensor([0, 200, 237, 238, 238, 700], dtype=torch.int32, device="cuda")
    for rows in (Rows(2, 333), Rows(cu_seqlens=cu, longest=462, total=700)):
        how = (head_dim**-.5, args.window, args.softcap)
        few = attention._random(rows.total, heads, kv_heads, head_dim, dtype, "cuda")
        q, k, v, dout = (x.double() for x in few)
        out, lse = reference_forward(q, k, v, rows, *how)
        right = out, *reference_backward(dout, q, k, v, out, lse, rows, *how)
        for name, b in BACKENDS.items():
            if b.refuses(case_of(*few[:2], rows, args.window, args.softcap)): continue
            out, saved = b.forward(*few[:3], rows, *how)
            ours = out, *b.backward(few[3], *few[:3], out, saved, rows, *how, None, None, None)
            off = [((a.double() - b).abs().max()/b.abs().max()).item() for a, b in zip(ours, right)]
            print(f"  {name:10} {rows!s:44} out {off[0]:.1e}  dq {off[1]:.1e}  dk {off[2]:.1e}  "
                  f"dv {off[3]:.1e}")


def sweep(heads, kv_heads, head_dim, dtype, rows, args):
    "Milliseconds of the Triton kernels with other tiles than those of the table."
    how = (head_dim**-.5, args.window, args.softcap)
    q, k, v, dout = attention._random(rows.total, heads, kv_heads, head_dim, dtype, "cuda")
    out, lse = kernels.kernel_forward(q, k, v, rows, *how)
    wide = max(16, 1 << (head_dim - 1).bit_length())
    def forward(): kernels.kernel_forward(q, k, v, rows, *how)
    def backward(): kernels.kernel_backward(dout, q, k, v, out, lse, rows, *how)
    for kind, run in dict(forward=forward, queries=backward, keys=backward).items():
        key, times = (kind, wide, q.element_size(), capability(q)), {}
        for shape in TILES[kind]:
            before = kernels._fits.get(key)
            kernels._fits[key] = [shape]
            try:
                run()
                times[shape] = attention._clock(run, q.device, 5)
            except RuntimeError as e: print(f"  {kind} {shape}: {str(e)[:60]}")
            kernels._fits[key] = before or kernels.tiles(*key)
        best = sorted(times, key=times.get)[:5]
        kernels._fits[key] = best[:1]
        print(f"  {kind:8}", "  ".join(f"{s} {times[s]:.3f}" for s in best))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs=3, type=int, action="append",
                        metavar=("QUERIES", "KEYS", "WIDTH"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--window", type=int)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--mean", type=int, default=600, help="mean length of packed samples")
    parser.add_argument("--check", action="store_true", help="compare with float64 and stop")
    parser.add_argument("--tiles", action="store_true", help="try shapes of tiles and stop")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, args.dtype)
    dtype = getattr(torch, args.dtype)
    for heads in args.heads or [(32, 8, 128), (32, 32, 128)]:
        print("heads", *heads)
        if args.check:
            check(*heads, dtype, args)
            continue
        for rows in (Rows(4, 2048), Rows(2, 8192), packed_rows(8192, args.mean)):
            print(f" {rows}")
            if args.tiles:
                sweep(*heads, dtype, rows, args)
                continue
            work = 4*heads[0]*heads[2]*pairs(rows, args.window)/1e9
            times = measure(*heads, dtype, rows, window=args.window, softcap=args.softcap)
            for name, t in times.items():
                if isinstance(t, str): print(f"  {name:10} {t}")
                else: print(f"  {name:10} forward {t[0]:7.3f} ms {work/t[0]:5.0f} TFLOP/s   "
                            f"backward {t[1]:7.3f} ms {2.5*work/t[1]:5.0f} TFLOP/s")
    print(attention.explain())


if __name__ == "__main__": main()
