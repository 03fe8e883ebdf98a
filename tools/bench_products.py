"""The large products of a layer on a GPU: every kernel of cuBLASLt's list, and who wins the race.

    python tools/bench_products.py                            Llama-3-8B, 8,192 tokens
    python tools/bench_products.py --shape qwen2.5-7b --rows 2048 --ranks 64 --ms 200

Milliseconds, in the library's order, the mean of two rounds of `--ms` each; "bits" says which give
those of PyTorch's choice. "torch" is that choice in the same rounds. Numbers are random, rows lie
apart by the ranks of a LoRA, as in training.
"""
import argparse, sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

SHAPES = {"llama3-8b": (4096, 6144, 14336), "qwen2.5-7b": (3584, 4608, 18944)} # width, qkv, inner


def layer(width, qkv, inner, rows, ranks):
    "Name → the two factors and the place of the result."
    new = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
    for name, n, k in (("qkv", qkv, width), ("o", width, width), ("gate_up", 2*inner, width),
                       ("down", width, inner)):
        w = .02*new(n + ranks, k + ranks)
        yield name, new(rows, k + ranks), w[:n].T, new(rows, n)
        yield f"{name}, back", new(rows, n + ranks), w[:, :k], new(rows, k)


def one(a, b, out, ms):
    "Milliseconds of each kernel and of PyTorch's choice; whose bits agree; the race."
    from ftkit.kernels.products import _aligned, _clock, _Plan, race
    plan = _Plan(a, b, out, _aligned(a, b, out))
    runs = [lambda: torch.mm(a, b, out=out)] + [partial(plan.run, f, a, b, out)
                                                 for f in plan.algorithms()]
    bits = []
    for run in runs:
        out.zero_()
        run()
        bits.append(out.clone().view(torch.int16))
    same = [torch.equal(t, bits[0]) for t in bits]
    rounds = [[_clock(run, ms) for run in runs] for _ in range(2)]
    best, took = race({i - 1 if i else "torch": run for i, run in enumerate(runs) if same[i]})
    return [sum(t)/2 for t in zip(*rounds)], same, best, took["torch"]/took[best]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--ranks", type=int, default=64, help="columns of LoRA beside the weights")
    parser.add_argument("--ms", type=float, default=60, help="length of a round")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("bench_products needs a GPU of NVIDIA's")
    print(torch.cuda.get_device_name(), args.shape, f"{args.rows} rows")
    for name, a, b, out in layer(*SHAPES[args.shape], args.rows, args.ranks):
        (torchs, *each), same, best, gain = one(a, b, out, args.ms)
        other = [i for i, s in enumerate(same[1:]) if not s]
        bits = f"other bits: {other}" if other else "same bits"
        print(f"{name:14} torch {torchs:.3f} | {' '.join(f'{t:.3f}' for t in each)} | {bits} | "
              f"race: {best}, x{gain:.3f}", flush=True)


if __name__ == "__main__": main()
