"""Head and loss of a large vocabulary on a GPU, forward and backward: ftkit beside other ways.

    python tools/bench_loss.py                           8,192 × 4,096 × 128,256, half learned
    python tools/bench_loss.py --vocab 256000 --learned 1 --trained

Medians in milliseconds, and GiB at the peak beyond what was there before. The ordinary way computes
logits for all tokens, as transformers does; "by rows" only for those that are learned. Liger's is
measured where it is installed.
"""
import argparse, sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F


def ways(hidden, weight, labels, places):
    "Name -> function that returns the mean loss."
    from ftkit.kernels.loss import linear_cross_entropy
    wanted, n = labels[places], len(places)

    def chosen(): return hidden.index_select(0, places)

    def ours(piece=None):
        return linear_cross_entropy(chosen(), weight, wanted, piece=piece)[0]/n

    out = {"ftkit": ours,
           "ordinary": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels),
           "by rows": lambda: F.cross_entropy(F.linear(chosen(), weight).float(), wanted)}
    out |= {f"ftkit, {p} rows a piece": lambda p=p: ours(p) for p in (256, 512, 2048)}
    try: from liger_kernel.ops import fused_linear_cross_entropy as module
    except ImportError: return out
    liger = module.LigerFusedLinearCrossEntropyFunction.apply
    return out | {"liger": lambda: liger(hidden, weight, labels)[0],
                  "liger, by rows": lambda: liger(chosen(), weight, wanted)[0]}


def measure(way, hidden, weight):
    "Milliseconds, GiB, loss, gradient."
    from triton.testing import do_bench

    def step():
        hidden.grad = weight.grad = None
        loss = way()
        loss.backward()
        return loss.detach()
    loss, grad = step().item(), hidden.grad.float().clone()
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before)/2**30
    return do_bench(step, warmup=200, rep=1000, return_mode="median"), peak, loss, grad


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--learned", type=float, default=0.5, help="part that is learned")
    parser.add_argument("--trained", action="store_true", help="the head is trained too")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    torch.manual_seed(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    half = torch.bfloat16 if bf16 else torch.float16
    hidden = torch.randn(args.tokens, args.dim, device="cuda", dtype=half).requires_grad_()
    weight = 0.02*torch.randn(args.vocab, args.dim, device="cuda", dtype=half)
    weight.requires_grad_(args.trained)
    labels = torch.randint(args.vocab, (args.tokens,), device="cuda")
    labels[torch.rand(args.tokens, device="cuda") >= args.learned] = -100
    places = (labels != -100).nonzero()[:, 0]
    print(torch.cuda.get_device_name(), "torch", torch.__version__,
          f"{len(places)} of {args.tokens} learned")
    first = None
    for name, way in ways(hidden, weight, labels, places).items():
        torch.cuda.empty_cache()
        try: ms, gib, loss, grad = measure(way, hidden, weight)
        except torch.OutOfMemoryError:
            print(f"{name:26} out of memory")
            continue
        first = grad if first is None else first
        off = ((grad - first).norm()/first.norm()).item()
        print(f"{name:26}{ms:9.3f} ms {gib:7.2f} GiB   loss {loss:.4f}   gradient off by {off:.1e}")


if __name__ == "__main__": main()
