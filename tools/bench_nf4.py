"""A layer of a 7B model to four bits and back on a GPU: ftkit's kernels beside bitsandbytes'.

    python tools/bench_nf4.py                 11008 × 4096 weights in bfloat16, double quantization
    python tools/bench_nf4.py --shape 4096 4096

Medians in milliseconds, and the time of a plain copy of the weights.
"""
import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=2, type=int, default=(11008, 4096))
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from triton.testing import do_bench
    from ftkit.quant.qtensor import quantize
    w = 0.02*torch.randn(*args.shape, device="cuda", dtype=torch.bfloat16)
    how = dict(compress_statistics=True, quant_type="nf4")
    (codes, state), ours, out = quantize_4bit(w, **how), quantize(w), torch.empty_like(w)
    runs = {"dequantize, ftkit": lambda: ours.dequantize(out=out),
            "dequantize, bitsandbytes": lambda: dequantize_4bit(codes, state, out=out),
            "quantize, ftkit": lambda: quantize(w),
            "quantize, bitsandbytes": lambda: quantize_4bit(w, **how),
            "copy": lambda: out.copy_(w)}
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for name, run in runs.items(): print(f"{name:26}{do_bench(run, return_mode='median'):8.3f} ms")


if __name__ == "__main__": main()
