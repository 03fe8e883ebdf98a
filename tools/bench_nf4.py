"""Layers in four bits and back on a GPU: ftkit's kernels beside bitsandbytes' and a plain copy.

    python tools/bench_nf4.py                 several shapes, bfloat16, double quantization
    python tools/bench_nf4.py --shape 4096 14336

Medians in milliseconds with cold caches; the share is that of the copy's rate, bytes read and
written counted. "wider rows" go into a view of a matrix with 64 columns more, "half" takes half of
the rows; the results are compared to the last bit with bitsandbytes' first.
"""
import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

SHAPES = (4096, 4096), (14336, 4096), (4096, 14336), (11008, 4096), (28672, 4096)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, help="one shape alone")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'shape':14}{'what':28}{'ms':>8}{'share of the copy rate':>25}")
    for shape in [args.shape] if args.shape else SHAPES: one_shape(*shape)


def one_shape(n, k):
    from triton.testing import do_bench
    from ftkit.kernels import nf4
    from ftkit.quant.qtensor import quantize
    w = 0.02*torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    ours, out, wide = quantize(w), torch.empty_like(w), w.new_empty(n, k + 64)
    half = slice(0, n//2)
    moved = ours.nbytes + 2*n*k
    runs = {"copy": (lambda: out.copy_(w), 4*n*k),
            "dequantize": (lambda: ours.dequantize(out=out), moved),
            "dequantize, wider rows": (lambda: ours.dequantize(out=wide[:, :k]), moved),
            "dequantize, half": (lambda: ours.dequantize(out=out[half], rows=half), moved/2),
            "quantize": (lambda: quantize(w), moved)}
    theirs = theirs_of(w, out)
    if theirs:
        check = theirs["dequantize, bitsandbytes"]().clone()
        assert torch.equal(ours.dequantize(), check), "not the weights of bitsandbytes"
        assert torch.equal(ours.dequantize(out=wide[:, :k]), check)
        assert torch.equal(ours.dequantize(rows=half), check[half])
        runs |= {name: (run, moved) for name, run in theirs.items()}
    own = nf4._shuffles
    def looked_up():
        nf4._shuffles = lambda t: False
        try: ours.dequantize(out=out)
        finally: nf4._shuffles = own
    runs["dequantize, values in memory"] = looked_up, moved
    times = {name: do_bench(run, return_mode="median") for name, (run, _) in runs.items()}
    rate = runs["copy"][1]/times["copy"]
    for name, ms in times.items():
        print(f"{f'{n}×{k}':14}{name:28}{ms:8.4f}{runs[name][1]/ms/rate:25.0%}")


def theirs_of(w, out):
    try: from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError: return {}
    how = dict(compress_statistics=True, quant_type="nf4")
    codes, state = quantize_4bit(w, **how)
    return {"dequantize, bitsandbytes": lambda: dequantize_4bit(codes, state, out=out),
            "quantize, bitsandbytes": lambda: quantize_4bit(w, **how)}


if __name__ == "__main__": main()
