"""Products in eight bits on a GPU of compute capability 8.9 or more, and the passes around them.

    python tools/bench_fp8.py                 the layers of a Llama-3-8B, 8192 tokens
    python tools/bench_fp8.py --tokens 2048
    python tools/bench_fp8.py --inner 28672   with a feed-forward network as wide as that of a 70B

First every kernel beside the formula, then medians in milliseconds: the passes with their share of
the copy rate, the products, and the linear layers of one decoder layer forward and back, with LoRA
of rank 16, in sixteen and in eight bits, from weights of 16 and of 4 bits.
"""
import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

D, F, QKV = 4096, 14336, (4096, 1024, 1024)


def randn(*shape, scale=1.): return scale*torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def check():
    "The compiled kernels beside the formulas."
    from ftkit.kernels.eight import rms_codes
    from ftkit.kernels.middle import glu_backward_codes, glu_codes
    from ftkit.kernels.fp8 import (codes_beside, qtensor_scales, qtensor_to_fp8, quantize_rows,
                                   scaled_linear)
    from ftkit.kernels.glu import glu_backward
    from ftkit.quant.fp8 import fp8_product, from_fp8, to_fp8
    from ftkit.quant.qtensor import quantize
    x, dy, gate_up, w = randn(333, D), randn(333, D), randn(333, 2*D), randn(1024, D, scale=0.02)
    factors = torch.rand(2*D, device="cuda")
    norm = rms_codes(x, randn(D), 1e-6)
    h, *middle = glu_codes(gate_up)
    d, *back = glu_backward_codes(dy, gate_up, factors)
    torch.testing.assert_close(d, glu_backward(dy, gate_up))
    pairs = {"rows": (quantize_rows(x), to_fp8(x)), "norm": (norm[3:], to_fp8(norm[0])),
             "glu": (middle, to_fp8(h)), "glu back": (back, to_fp8(d, factors))}
    q = quantize(w)
    scales = qtensor_scales(q)
    formula = to_fp8(q.dequantize(torch.float32), scales=scales)
    for turned in False, True:
        codes = qtensor_to_fp8(q, scales, transposed=turned)
        pairs["nf4" + " turned"*turned] = (codes.T if turned else codes, scales), formula
    for name, (ours, theirs) in pairs.items():
        other = (ours[0].float() != theirs[0].float()).float().mean().item()
        far = ((from_fp8(*ours) - from_fp8(*theirs)).norm()/from_fp8(*theirs).norm()).item()
        print(f"{name:12} other codes {other:.1e}, relative difference {far:.1e}")
    a, b = scaled_linear(*to_fp8(x), *formula), fp8_product(*to_fp8(x), *formula, torch.float32)
    print(f"{'product':12} relative difference {((a - b).norm()/b.norm()).item():.1e}")
    xa, sB = randn(333, 32), randn(1024, 32, scale=0.1)
    right, steps = formula[0].new_empty(1024, D + 96), torch.empty(32, device="cuda")
    right[:, :D].copy_(formula[0])
    codes_beside(sB, right[:, D:], steps, scales)
    a = scaled_linear(*quantize_rows(x, beside=(xa, steps)), right, scales).float()
    a -= scaled_linear(*quantize_rows(x, beside=(xa*0, steps)), right, scales).float()
    b = xa.float() @ sB.float().T
    print(f"{'LoRA within':12} relative difference {((a - b).norm()/b.norm()).item():.1e}")


def passes(T, bench):
    from ftkit.kernels.eight import rms_codes
    from ftkit.kernels.middle import glu_backward_codes, glu_codes
    from ftkit.kernels.fp8 import (CodesBeside, codes_beside, qtensor_scales, qtensor_to_fp8,
                                   quantize_rows, transpose_codes)
    from ftkit.kernels.glu import glu_backward, glu_forward
    from ftkit.kernels.norm import rms_forward
    from ftkit.quant.qtensor import quantize
    x, r, weight, gate_up, h = randn(T, D), randn(T, D), randn(D), randn(T, 2*F), randn(T, F)
    wide, factors = torch.empty_like(gate_up), torch.rand(2*F, device="cuda")
    q = quantize(randn(2*F, D, scale=0.02))
    scales = qtensor_scales(q)
    codes = qtensor_to_fp8(q, scales)
    turned = codes.new_empty(D, 2*F)
    xa, sB, A, dxa = randn(T, 32), randn(2*F, 32)/50, randn(16, F)/50, randn(T, 16)
    steps, right = torch.rand(32, device="cuda"), codes.new_empty(2*F, 96)
    below = codes.new_empty(F, 48)
    td, tf, n = T*D, T*F, 2*F*D
    several = [(t.clone().T if s is None else t.clone(),
                codes.new_empty(rows, D + 128)[:, D:D + 3*r],
                steps[:r].clone(), s) for _ in range(8)
               for t, rows, r, s in ((sB, 2*F, 32, scales), (A, F, 16, None))]
    runs = {"copy": (lambda: wide.copy_(gate_up), 8*tf),
            "rows of 4096": (lambda: quantize_rows(x), 3*td),
            "rows of 4096, LoRA beside": (lambda: quantize_rows(x, beside=(xa, steps)), 3*td),
            "factors beside gate, up": (lambda: codes_beside(sB, right, steps, scales), 4*F*80),
            "factors beside down": (lambda: codes_beside(A.T, below, steps[:16]), F*80),
            "factors beside 8 layers": (CodesBeside(several), 8*F*560),
            f"rows of {F}": (lambda: quantize_rows(h), 3*tf),
            f"rows of {2*F}, factors": (lambda: quantize_rows(gate_up, factors), 6*tf),
            "norm alone": (lambda: rms_forward(x, weight, 1e-6, residual=r, summed=r), 8*td),
            "norm and codes": (lambda: rms_codes(x, weight, 1e-6, residual=r, summed=r), 9*td),
            "glu alone": (lambda: glu_forward(gate_up, out=h), 6*tf),
            "glu and codes": (lambda: glu_codes(gate_up, out=h), 7*tf),
            "glu back alone": (lambda: glu_backward(h, gate_up, out=wide), 10*tf),
            "glu back and codes": (lambda: glu_backward_codes(h, gate_up, factors, out=wide, h=h),
                                   14*tf),
            "the same without h": (lambda: glu_backward_codes(h, gate_up, factors, out=wide),
                                   12*tf),
            "h times A": (lambda: h @ A.T, 2*tf),
            "LoRA added to gate and up": (lambda: wide.addmm_(xa, sB.T), 8*tf),
            "LoRA added to dh": (lambda: h.addmm_(dxa, A), 4*tf),
            "nf4 to e4m3": (lambda: qtensor_to_fp8(q, scales, codes), 1.53*n),
            "nf4 to e4m3, turned": (lambda: qtensor_to_fp8(q, scales, turned, True), 1.53*n),
            "codes turned": (lambda: transpose_codes(codes, turned), 2*n)}
    times = {name: bench(run) for name, (run, _) in runs.items()}
    rate = runs["copy"][1]/times["copy"]
    for name, ms in times.items(): print(f"{name:26}{ms:8.4f} ms{runs[name][1]/ms/rate:8.0%}")


def products(T, bench):
    from ftkit.kernels.fp8 import quantize_rows, scaled_linear
    for name, n, k in (("qkv", sum(QKV), D), ("o", D, D), ("gate-up", 2*F, D),
                       ("gate-up, LoRA within", 2*F, D + 96),
                       ("gate-up, whole tiles", 2*F, D + 128), ("down", D, F),
                       ("down back", F, D), ("down back, LoRA within", F, D + 48),
                       ("down back, whole tiles", F, D + 128)):
        x, w, out = randn(T, k), randn(n, k, scale=0.02), randn(T, n)
        codes, flops = (*quantize_rows(x), *quantize_rows(w)), 2*T*n*k/1e9
        ms = [bench(lambda: torch.mm(x, w.T, out=out)),
              bench(lambda: scaled_linear(*codes, out=out))]
        print(f"{name:22} bf16 {ms[0]:7.3f} ms {flops/ms[0]:6.0f} TFLOP/s   "
              f"e4m3 {ms[1]:7.3f} ms {flops/ms[1]:6.0f} TFLOP/s")


def layer(kind, quantized, **how):
    "The four projections of a decoder layer, with LoRA."
    from torch import nn
    from ftkit.lora.layers import LoraLinear
    from ftkit.quant.linear import QLinear
    def linear(n, k):
        base = nn.Linear(k, n, False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        return LoraLinear(QLinear.from_linear(base) if quantized else base, r=16)
    made = [[linear(n, D) for n in QKV], [linear(D, D)], [linear(F, D) for _ in range(2)],
            [linear(D, F)]]
    made = [kind(m, **how) for m in made]
    for p in made: p.hold(torch.bfloat16)
    return made


def layers(T, bench):
    from ftkit.kernels.eight import EightProjection
    from ftkit.kernels.lora import Projection
    for quantized in False, True:
        for name, kind, how in (("bf16", Projection, {}), ("e4m3", EightProjection, {}),
                                ("e4m3, one", EightProjection, dict(keep="one")),
                                ("e4m3, back in bf16", EightProjection, dict(back=False))):
            made = layer(kind, quantized, **how)
            xs, dys = [[randn(T, s(p)) for p in made]
                       for s in (lambda p: p.in_features, lambda p: p.out_features)]
            def step():
                for p, x, dy in zip(made, xs, dys): p.project_backward(dy, x, p.project(x)[1])
            ms = bench(step)
            print(f"{'nf4' if quantized else '16-bit'} weights, {name:20}{ms:8.3f} ms a layer")
            del made, xs, dys


def main():
    global F
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=F, help="width of the feed-forward network")
    args = parser.parse_args()
    F = args.inner
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    from ftkit.kernels.fp8 import need_fp8
    from triton.testing import do_bench
    need_fp8("cuda")
    card = torch.cuda.get_device_name()
    print(card, "torch", torch.__version__, f"{args.tokens} tokens, {F} wide")
    torch.manual_seed(0)
    check()
    for part in passes, products, layers:
        part(args.tokens, lambda run: do_bench(run, warmup=100, rep=500, return_mode="median"))


if __name__ == "__main__": main()
