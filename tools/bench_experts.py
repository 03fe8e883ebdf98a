"""One layer of experts, forward and backward, on a GPU: transformers' ways beside ftkit's.

    python tools/bench_experts.py                       Mixtral's shape, 8,192 tokens, bfloat16
    python tools/bench_experts.py --shape deepseek      64 experts of DeepSeek-V2-Lite, 6 a token
    python tools/bench_experts.py --shape deepseek_v2   160 experts of DeepSeek-V2, 6 a token
    python tools/bench_experts.py --only products       the bare product, in TFLOP/s
    python tools/bench_experts.py --tiny                tiny sizes on the CPU, to see that it runs

Each row: medians in milliseconds, peak GiB beyond the weights, and how far the answers are from
those of the ordinary way, relative to the largest. Kernels are compiled for one shape at a time.
"""
import argparse, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from ftkit.experts import slow_down_experts, speed_up_experts
from ftkit.kernels.grouped import grouped_matmul
from ftkit.kernels.routing import route
from ftkit.lora.experts import LoraExperts
from ftkit.quant.linear import QExperts

SHAPES = {"mixtral": (8, 2, 4096, 14336), "deepseek": (64, 6, 2048, 1408),
          "deepseek_v2": (160, 6, 5120, 1536), "tiny": (4, 2, 64, 96)} # experts, k, dim, hidden


def clock(run, device, repeat):
    "Median milliseconds after two runs to warm up, and the peak beyond what was there."
    times = []
    for i in range(repeat + 2):
        if device == "cuda":
            torch.cuda.synchronize()
            if i == 2: torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        run()
        if device == "cuda": torch.cuda.synchronize()
        if i >= 2: times.append(1e3*(time.perf_counter() - start))
    peak = (torch.cuda.max_memory_allocated() - before)/2**30 if device == "cuda" else 0
    return statistics.median(times), peak


def layer(shape, dtype, device):
    experts, k, dim, hidden = SHAPES[shape]
    config = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=experts)
    with torch.device(device): module = MixtralExperts(config)
    for p in module.parameters(): torch.nn.init.normal_(p, std=0.02)
    return module.to(dtype).requires_grad_(False)


def products(shape, tokens, dtype, device, repeat):
    "The first product of the layer, forwards and for the gradient of its input."
    experts, k, dim, hidden = SHAPES[shape]
    w = layer(shape, dtype, device).gate_up_proj
    to = route(torch.rand(tokens, experts, device=device).topk(k)[1], experts)
    x = torch.randn(tokens*k, dim, device=device, dtype=dtype)
    dy = torch.randn(tokens*k, 2*hidden, device=device, dtype=dtype)
    runs = {"ftkit": (lambda: grouped_matmul(x, w, to.offsets),
                      lambda: grouped_matmul(dy, w.transpose(1, 2), to.offsets))}
    if hasattr(torch, "_grouped_mm") and dtype == torch.bfloat16:
        ends = to.offsets[1:].contiguous()
        runs["torch._grouped_mm"] = (lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
                                     lambda: torch._grouped_mm(dy, w, offs=ends))
    each = 2*tokens*k*dim*2*hidden/1e9
    for name, pair in runs.items():
        ms = [clock(run, device, repeat)[0] for run in pair]
        print(f"{name:28}" + "".join(f"{t:9.3f} ms {each/t:7.0f} TFLOP/s" for t in ms), flush=True)


def layers(shape, tokens, dtype, device, repeat, rank):
    "The whole layer, frozen, with LoRA, and with LoRA on four bits."
    experts, k, dim, hidden = SHAPES[shape]
    plain = layer(shape, dtype, device)
    scores, index = torch.rand(tokens, experts, device=device).topk(k)
    x = torch.randn(tokens, dim, device=device, dtype=dtype).requires_grad_()
    up = torch.randn_like(x)
    plan = {n: (rank, 2*rank) for n in ("gate_up_proj", "down_proj")}

    def step(module):
        scores.grad = x.grad = None
        out = module(x, index, scores.requires_grad_())
        out.backward(up)
        return out

    def row(name, module, wanted=None):
        with torch.no_grad():
            out = module(x, index, scores)
        far = "" if wanted is None else f"{((out - wanted).abs().max()/wanted.abs().max()):10.1e}"
        forward, _ = clock(lambda: module(x, index, scores), device, repeat)
        ms, peak = clock(lambda: step(module), device, repeat)
        print(f"{name:28}{forward:9.2f} ms {ms:9.2f} ms {peak:8.2f} GiB {far}", flush=True)
        return out if wanted is None else wanted

    wanted = None
    for how in "eager", "grouped_mm":
        plain.config._experts_implementation = how
        wanted = row(f"frozen, {how}", plain, wanted)
    plain.config._experts_implementation = "eager"
    speed_up_experts(plain)
    row("frozen, ftkit", plain, wanted)
    speed_up_experts(plain, recompute=True)
    row("frozen, ftkit, recomputed", plain, wanted)
    slow_down_experts(plain)
    for bits in 16, 4:
        base = QExperts.from_experts(plain) if bits == 4 else plain
        lora = LoraExperts(base, plan, dtype=dtype)
        for p in lora.B.values(): torch.nn.init.normal_(p, std=0.02)
        wanted = row(f"LoRA on {bits} bits, loop", lora)
        speed_up_experts(lora)
        row(f"LoRA on {bits} bits, ftkit", lora, wanted)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="mixtral", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=["products", "layers"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    if device == "cpu" and not args.tiny: sys.exit("no GPU here; --tiny runs on the CPU")
    shape, dtype = (("tiny", torch.float32) if args.tiny else (args.shape, torch.bfloat16))
    tokens = 70 if args.tiny else args.tokens
    torch.manual_seed(0)
    print("the CPU" if device == "cpu" else torch.cuda.get_device_name(), "torch",
          torch.__version__, shape, tokens, "tokens")
    if args.only != "layers": products(shape, tokens, dtype, device, args.repeat)
    if args.only != "products": layers(shape, tokens, dtype, device, args.repeat, args.rank)


if __name__ == "__main__": main()
