"""A step of AdamW, clipping included, on a GPU: ftkit's beside torch's and bitsandbytes'.

    python tools/bench_adamw.py               LoRA of an 8B: 448 matrices of rank 16, float32
    python tools/bench_adamw.py --full 1      all weights of 1 billion, bfloat16

Medians in milliseconds of steps in a row, the milliseconds that Python took to start one, and the
bytes of the states on the GPU. `averages` is the share by which the change of the weights after the
steps differs from that in 32 bits.
"""
import argparse, gc, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import nn

LAYER = (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)]*2, (14336, 4096)


def shapes(full, rank):
    "Of the tensors that are trained."
    if not full: return [s for a, b in LAYER*32 for s in ((rank, a), (b, rank))]
    layer = [*LAYER, (4096,), (4096,)]
    size = sum(torch.Size(s).numel() for s in layer)
    return layer*max(1, round(full*1e9/size))


def optimizers():
    "Names, and functions: parameters -> function that clips and steps."
    from ftkit.kernels.adamw import FlatAdamW
    def ours(**more): return lambda ps: FlatAdamW(ps, lr=1e-4, **more)
    out = {"ftkit 32 bits": ours(), "ftkit 16 bits": ours(bits=16), "ftkit 8 bits": ours(bits=8),
           "ftkit 32 bits, host": ours(host=True), "ftkit 8 bits, host": ours(bits=8, host=True),
           "torch fused": lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True)}
    try: import bitsandbytes as bnb
    except ImportError: return out
    return out | {"bitsandbytes 8 bits": lambda ps: bnb.optim.AdamW8bit(ps, lr=1e-4),
                  "bitsandbytes 8, paged": lambda ps: bnb.optim.PagedAdamW8bit(ps, lr=1e-4)}


def measure(make, params, steps):
    "Milliseconds of a step on the GPU and on the CPU; bytes of the states."
    before = torch.cuda.memory_allocated()
    opt, times, host = make(params), [], []
    def step():
        if hasattr(opt, "clip_and_step"): return opt.clip_and_step(1.)
        nn.utils.clip_grad_norm_(params, 1.)
        opt.step()
    for i in range(steps + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        clock = time.perf_counter()
        begin.record(); step(); end.record()
        host.append(1e3*(time.perf_counter() - clock))
        end.synchronize()
        times.append(begin.elapsed_time(end))
    state = torch.cuda.memory_allocated() - before
    return statistics.median(times[3:]), statistics.median(host[3:]), state


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", type=float, default=0, help="billions of weights, bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    dtype = torch.bfloat16 if args.full else torch.float32
    g = torch.Generator("cuda").manual_seed(0)
    new = lambda s: 0.02*torch.randn(s, generator=g, device="cuda", dtype=dtype)
    start = [new(s) for s in shapes(args.full, args.rank)]
    grads = [new(s) for s in shapes(args.full, args.rank)]
    n = sum(w.numel() for w in start)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{len(start)} tensors, {n/1e6:.1f} M numbers, {dtype}\n")
    print(f"{'':24}{'step':>9}{'host':>9}{'state':>12}{'averages':>10}")
    wanted = None
    for name, make in optimizers().items():
        params = [nn.Parameter(w.clone()) for w in start]
        for p, grad in zip(params, grads): p.grad = grad.clone()
        try: step, host, state = measure(make, params, args.steps)
        except torch.OutOfMemoryError: print(f"{name:24}out of memory"); continue
        change = torch.cat([(p.detach() - w).float().flatten() for p, w in zip(params, start)])
        wanted = change if wanted is None else wanted
        far = ((change - wanted).norm()/wanted.norm()).item()
        print(f"{name:24}{step:6.3f} ms{host:6.3f} ms{state/1e6:9.1f} MB{far:10.4f}")
        del params, change
        gc.collect(); torch.cuda.empty_cache()


if __name__ == "__main__": main()
