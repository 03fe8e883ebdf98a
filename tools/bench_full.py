"""Full fine-tuning of an 8B shape on one GPU: when the update is made, how wide its averages are,
and what is kept of the activations.

    python tools/bench_full.py                                  every row
    python tools/bench_full.py --rows late:16:none,early:8:some
    python tools/bench_full.py --tiny                           a smoke test, on a CPU as well
    python tools/bench_full.py --parity 20                      losses beside torch's, tiny

A row is WHEN:BITS:SAVING. WHEN is `late` (all gradients, clipping, one step) or `early` (each
gradient is applied and freed inside backward); BITS are those of each of AdamW's averages; SAVING
is a level of `Saving`, with `+host` for inputs that wait on the host, and with /N in the last N
layers only: the others keep everything. Weights are random and made on the GPU in bfloat16; there
is no checkpoint. It prints milliseconds of a step (median), tokens/s, the peak that torch has
allocated.
"""
import argparse, gc, json, os, sys, time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
GIB = 2**30
ROWS = ("late:16:none,late:32:none,late:8:none,late:8:some,late:8:most,early:16:none,early:16:some,"
        "early:8:none,early:8:some/16,early:8:some,early:8:much,early:8:most,early:8:most+host")
OPTIMIZERS = {"32": "adamw", "16": "adamw_16bit", "8": "adamw_8bit"}


def random_model(shape, device):
    "A model in bfloat16, drawn where it will be."
    import torch
    from transformers import AutoModelForCausalLM
    from make_checkpoint import config_of
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16).train()


def plan_of(text, layers):
    "The `Saving` of each layer."
    from ftkit.kept import Saving
    text, _, last = text.partition("/")
    level, _, host = text.partition("+")
    some = Saving(level, bool(host))
    n = min(int(last or layers), layers)
    return [Saving()]*(layers - n) + [some]*n


def batch_of(a, vocab, device):
    import torch
    import ftkit as ft
    ids = torch.randint(4, vocab, (a.batch, a.seq), generator=torch.Generator().manual_seed(1))
    batch = ft.SupervisedTuning().prepare(dict(input_ids=ids, labels=ids.clone()))
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def prepared(model, when, bits, lr, norm):
    "The optimizer, and what steps in backward if anything does."
    from ftkit.training.optim import OptimConfig, StepInBackward, build_optimizer
    early = when == "early"
    cfg = OptimConfig(lr=lr, optimizer=OPTIMIZERS[bits], max_grad_norm=norm)
    optimizer = build_optimizer(model, cfg, parts=True)
    return optimizer, StepInBackward(optimizer, norm) if early else None


def steps_of(model, batch, row, a, lr=1e-6, norm=1.):
    "Losses, and the seconds of the steps after the warm-up."
    import torch
    import ftkit as ft
    from ftkit.fast import speed_up
    when, bits, saving = row.split(":")
    speed_up(model, plan_of(saving, model.config.num_hidden_layers), hold=True)
    optimizer, inside = prepared(model, when, bits, lr, norm)
    objective, losses, marks = ft.SupervisedTuning(), [], []
    device, count = model.device, len(batch["wanted"])
    cuda = device.type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats()
    with inside.hooks() if inside else nullcontext():
        for i in range(a.warmup + a.steps + 1):
            if i >= a.warmup: marks.append(mark(cuda))
            if i == a.warmup + a.steps: break
            loss = objective(model, batch)[0]/count
            loss.backward()
            if inside: inside.finish()
            else:
                optimizer.clip_and_step(norm)
                optimizer.zero_grad()
            losses.append(loss.detach())
    if cuda: torch.cuda.synchronize()
    seconds = [x.elapsed_time(y)/1e3 if cuda else y - x for x, y in zip(marks, marks[1:])]
    return [x.item() for x in losses], seconds


def mark(cuda):
    "A moment, in the queue of the GPU."
    import torch
    if not cuda: return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def run(model, row, a):
    "One row, measured."
    import torch
    from ftkit.fast import slow_down
    cuda = model.device.type == "cuda"
    batch = batch_of(a, model.config.vocab_size, model.device)
    try: losses, seconds = steps_of(model, batch, row, a)
    except torch.OutOfMemoryError as e: return dict(row=row, error=str(e).partition(". ")[0])
    finally:
        slow_down(model)
        model.zero_grad()
    ms, peak = 1e3*median(seconds), torch.cuda.max_memory_allocated()/GIB if cuda else 0.
    return dict(row=row, ms=round(ms, 1), tok_s=round(a.batch*a.seq/ms*1e3),
                peak_gib=round(peak, 2), loss=round(losses[-1], 4))


def parity(a, device):
    "Losses of each row beside those of torch's AdamW on float32 weights, nothing clipped."
    import torch
    a.warmup, a.steps, good = 0, a.parity, True
    model = random_model("tiny", device).float()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_of(a, model.config.vocab_size, device)
    opt, truth = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.), []
    for _ in range(a.steps):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        truth.append(loss.item())
    for row in a.rows.split(","):
        model = random_model("tiny", device)
        model.load_state_dict(start)
        losses, _ = steps_of(model, batch, row, a, 1e-3, 0.)
        apart = max(abs(x/y - 1) for x, y in zip(losses, truth))
        good &= apart < 0.005
        print(f"{row:16} loss {losses[0]:.4f} → {losses[-1]:.4f} ({truth[-1]:.4f}), at most "
              f"{apart:.2%} apart{'' if apart < 0.005 else '  (!)'}", flush=True)
    return 0 if good else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", default=ROWS)
    add("--shape", default="llama3-8b", help="as in make_checkpoint.py")
    add("--batch", type=int, default=4)
    add("--seq", type=int, default=2048)
    add("--steps", type=int, default=6)
    add("--warmup", type=int, default=3)
    add("--parity", type=int, help="compare so many losses of a tiny model instead")
    add("--tiny", action="store_true")
    add("--json", type=Path, help="add each result to this file, a line each")
    a = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.tiny or a.parity: a.shape, a.batch, a.seq = "tiny", 2, 32
    if a.parity: return parity(a, device)
    if device == "cpu" and not a.tiny: sys.exit("no GPU here: try --tiny")
    model = random_model(a.shape, device)
    own = sum(p.nbytes for p in model.parameters())/GIB
    print(f"{a.shape}, {a.batch} × {a.seq} tokens, {own:.2f} GiB of weights, {device}")
    for row in a.rows.split(","):
        found = run(model, row, a)
        gc.collect()
        if device == "cuda": torch.cuda.empty_cache()
        if a.json:
            with open(a.json, "a") as f: f.write(json.dumps(found) + "\n")
        good = "{ms:8.1f} ms {tok_s:8,} tok/s {peak_gib:7.2f} GiB"
        said = found.get("error") or good.format(**found)
        print(f"{row:16} {said}", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
