"""Norms, rotary embeddings and gated activations of a layer on a GPU, beside a plain copy.

    python tools/bench_elementwise.py                        8192 tokens of a Llama-3-8B
    python tools/bench_elementwise.py --inner 11008 --kv-heads 32
    python tools/bench_elementwise.py --dtype float16 --sweep

Share: bytes that have to be moved, over those that a copy moves in the time. Error: the largest
distance from float64, in units of what rounding alone does to a number; the exit code is 1 beyond
--limit. Host: microseconds until a call returns, on 16 tokens, where the GPU never lags behind.
--sweep also times other shapes of the programs, for each kernel.
"""
import argparse, sys, time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

DEVICE = "cuda"


def exact_norm(x, residual, weight, plus=0.):
    x, residual, weight = (t.double() for t in (x, residual, weight))
    s = (x + residual).requires_grad_()
    return s, s*torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5)*(plus + weight)


def distance(ours, exact):
    "The largest error, over the largest error of rounding, of numbers of the same size."
    eps = torch.finfo(ours.dtype).eps/2
    size = exact.abs().clamp(min=exact.abs().mean())
    return ((ours.double() - exact).abs()/size).max().item()/eps


def check(args, new):
    "Errors of each function, on some tokens."
    from ftkit.kernels.glu import glu_backward, glu_forward
    from ftkit.kernels.norm import rms_backward, rms_forward
    from ftkit.kernels.rope import rotate_
    x, r, dy, add = (new(300, args.dim) for _ in range(4))
    w, out = new(args.dim), {}
    for plus, name in (0., "llama"), (1., "gemma"):
        y, inverse, s = rms_forward(x, w, 1e-5, plus, residual=r)
        exact_s, exact = exact_norm(s, torch.zeros_like(s), w.double(), plus)
        weight = w.double().requires_grad_()
        _, again = exact_norm(s, torch.zeros_like(s), weight, plus)
        dx, = torch.autograd.grad(exact, exact_s, dy.double())
        dw = (dy.double()*(exact_s*inverse.double()[:, None])).sum(0)
        ours = rms_backward(dy, s, w, inverse, plus, add, need_weight=True)
        out |= {f"sum ({name})": distance(s, x.double() + r.double()),
                f"norm ({name})": distance(y, again.detach()),
                f"norm back ({name})": distance(ours[0], dx + add.double()),
                f"weight back ({name})": distance(ours[1], dw)}
    for act in ("silu", "gelu", "gelu_tanh"):
        gu, dh = new(300, 2*args.inner), new(300, args.inner)
        wide = gu.double().requires_grad_()
        gate, up = wide.chunk(2, 1)
        kind = "tanh" if act == "gelu_tanh" else "none"
        f = torch.nn.functional
        h = (f.silu(gate) if act == "silu" else f.gelu(gate, approximate=kind))*up
        d, = torch.autograd.grad(h, wide, dh.double())
        out[act] = distance(glu_forward(gu, act), h.detach())
        out[f"{act} back, in place"] = distance(glu_backward(dh, gu, act, gu, h=dh), d)
        out[f"{act} again"] = distance(dh, h.detach())
    turned, n = args.heads + args.kv_heads, args.head_dim
    angle = torch.rand(300, n//2, device=DEVICE)*6
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]
    for interleaved in (False, True):
        qkv = new(300, (turned + args.kv_heads)*n)
        part = qkv[:, :turned*n].double().view(300, turned, n)
        a, b = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, -1)
        parts = a*cos - b*sin, b*cos + a*sin
        exact = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        rotate_(qkv, angle.cos(), angle.sin(), args.heads, args.kv_heads, n, interleaved,
                rotary_dim=n)
        out["neighbours turned" if interleaved else "halves turned"] = distance(
            qkv[:, :turned*n].reshape(exact.shape), exact)
    return out


def calls(tokens, args, new):
    "What is timed: name → (function, bytes moved)."
    from ftkit.kernels.glu import glu_backward, glu_forward
    from ftkit.kernels.middle import glu_backward_factor
    from ftkit.kernels.norm import rms_backward, rms_forward
    from ftkit.kernels.rope import rotate_
    size = torch.finfo(args.dtype).bits//8
    x, r, y, w = new(tokens, args.dim), new(tokens, args.dim), new(tokens, args.dim), new(args.dim)
    _, inverse, _ = rms_forward(x, w, 1e-5)
    row = x.numel()*size
    gu, h = new(tokens, 2*args.inner), new(tokens, args.inner)
    n, turned = args.head_dim, args.heads + args.kv_heads
    qkv = new(tokens, (turned + args.kv_heads)*n)
    angle = torch.rand(min(tokens, 2048), n, device=DEVICE)
    turn = angle.cos().to(args.dtype), angle.sin().to(args.dtype)
    rotate = partial(rotate_, qkv, *turn, args.heads, args.kv_heads, n)
    back = partial(rms_backward, y, x, w, inverse, out=r)
    heads, norm = qkv[:, :turned*n].unflatten(1, (turned, n)), new(n)
    out = torch.empty_like(heads)
    dxa, factor = new(tokens, 16), torch.empty(16, args.inner, device=DEVICE)
    return {
        "norm": (partial(rms_forward, x, w, 1e-5, out=y), 2*row),
        "add, norm": (partial(rms_forward, x, w, 1e-5, residual=r, out=y, summed=r), 4*row),
        "add, norm, twice": (partial(rms_forward, x, w, 1e-5, residual=r, out=y, summed=r,
                                     twice=torch.empty_like(x)), 5*row),
        "norm back": (back, 3*row),
        "norm back, add": (partial(back, add=r), 4*row),
        "norm back, weight": (partial(back, add=r, need_weight=True), 4*row),
        "norm of heads": (partial(rms_forward, heads, norm, 1e-5, out=out), 2*out.numel()*size),
        "turn": (rotate, 2*tokens*turned*n*size),
        "turn neighbours": (partial(rotate, interleaved=True), 2*tokens*turned*n*size),
        "silu": (partial(glu_forward, gu, out=h), 3*h.numel()*size),
        "gelu_tanh": (partial(glu_forward, gu, "gelu_tanh", h), 3*h.numel()*size),
        "silu back": (partial(glu_backward, h, gu, out=gu), 5*h.numel()*size),
        "silu back, again": (partial(glu_backward, h, gu, out=gu, h=h), 6*h.numel()*size),
        "silu back, factor": (partial(glu_backward_factor, h, gu, dxa, out=gu, into=factor),
                              5*h.numel()*size)}


def host(f, times=200):
    for _ in range(5): f()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times): f()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent/times*1e6


def sweep(timed, rate):
    "Other shapes of programs: numbers, and numbers of a thread."
    from ftkit.kernels import glu, norm, rope
    def by_norm(n, each):
        def shape(width):
            block = norm.triton.next_power_of_2(width)
            rows = max(1, n//block)
            return dict(ROWS=rows, BLOCK=block, num_warps=min(32, max(1, rows*block//(32*each))))
        return shape
    def by_glu(n, each): return lambda width: dict(BLOCK=n, num_warps=max(1, n//(32*each)))
    def by_rope(n, each):
        def group(heads, pairs):
            block = norm.triton.next_power_of_2(pairs)
            g = max(1, n//block)
            return dict(GROUP=g, BLOCK=block, num_warps=max(1, g*block//(32*each)))
        return group
    kinds = ((norm, "_shape", by_norm, "norm"), (glu, "_blocks", by_glu, "lu"),
             (rope, "_group", by_rope, "turn"))
    for module, name, make, names in kinds:
        kept = getattr(module, name)
        for n in (512, 1024, 2048, 4096):
            for each in (8, 16, 32):
                setattr(module, name, make(n, each))
                row = [f"{k} {b/timer(f)/rate:.0%}" for k, (f, b) in timed.items() if names in k]
                print(f"{n:5} by {each:2}:", ", ".join(row), flush=True)
        setattr(module, name, kept)


def timer(f):
    "Seconds."
    from triton.testing import do_bench
    return do_bench(f, warmup=5, rep=30, return_mode="median")/1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(tokens=8192, dim=4096, inner=14336, heads=32, kv_heads=8, head_dim=128)
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", type=lambda s: getattr(torch, s))
    parser.add_argument("--limit", type=float, help="largest error that passes (3; 64 in float32)")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    g = torch.Generator(DEVICE).manual_seed(0)
    def new(*shape): return torch.randn(*shape, device=DEVICE, generator=g).to(args.dtype)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, vars(args))
    errors = check(args, new)
    print("errors:", ", ".join(f"{k} {v:.1f}" for k, v in errors.items()))
    a = new(args.tokens, 2*args.inner)
    b = torch.empty_like(a)
    rate = 2*a.numel()*a.element_size()/timer(lambda: b.copy_(a))
    del a, b
    timed, small = calls(args.tokens, args, new), calls(16, args, new)
    print(f"copy {rate/1e12:.2f} TB/s\n{'':20}{'ms':>8}{'TB/s':>8}{'share':>8}{'host':>8}")
    for name, (f, moved) in timed.items():
        spent = timer(f)
        print(f"{name:20}{spent*1e3:8.3f}{moved/spent/1e12:8.2f}{moved/spent/rate:8.0%}"
              f"{host(small[name][0]):7.1f}µ", flush=True)
    if args.sweep: sweep(timed, rate)
    limit = args.limit or (64 if args.dtype == torch.float32 else 3)
    wrong = [k for k, v in errors.items() if not v < limit]
    if wrong: sys.exit(f"too far from float64: {', '.join(wrong)}")


if __name__ == "__main__": main()
