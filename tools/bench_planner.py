"""Does a step take what the plan says? Steps with random weights, beside the prediction.

    python tools/bench_planner.py                       all rows; needs a GPU of 80 GB
    python tools/bench_planner.py --only qlora --plans none,most
    python tools/bench_planner.py --shape llama3_8b --batch 4 --length 2048
    python tools/bench_planner.py --tiny                tiny models on a CPU; checks nothing

A model of the shape is filled with random weights on the device. For each plan two steps are
taken; what stands there is torch's `max_memory_allocated` of the second, what was predicted, their
ratio and the tokens a second. Plans are levels of saving, `host` and `pieces` for the last rungs of
the ladder, or memory such as 12GB, for which the planner chooses. With ratios outside of 0.95 to
1.05 the exit code is 1.
"""
import argparse, gc, os, sys, time
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import ftkit as ft
from bench_memory import TINY, make_model
from ftkit.activations import METHODS
from ftkit.fast import speed_up
from ftkit.kept import LEVELS, Saving
from ftkit.memory import CUDA
from ftkit.peaks import Tally
from ftkit.planner import Rung, apply_plan, plan_memory, sweep
from ftkit.training.optim import OptimConfig, build_optimizer
from ftkit.training.plan import memory_bytes

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PLANS = "none,some,much,most,host,pieces,24GB,12GB"


def place(plan, name):
    "Go to the rung that a name means."
    if name in LEVELS or name == "host": # not each ladder has each of them
        saving = Saving("more", host=True) if name == "host" else Saving(name)
        plan.rungs.append(Rung((saving,)*len(plan.rungs[0].saving)))
        plan.at = len(plan.rungs) - 1
    elif name == "pieces": plan.at = len(plan.rungs) - 1
    else: plan.budget = int(memory_bytes(name) - CUDA); plan.settle()


def steps(model, optimizer, ids, half):
    "Two steps; bytes at the peak of the second, and its seconds."
    objective, cuda = ft.SupervisedTuning(), ids.is_cuda
    batch = objective.prepare(dict(input_ids=ids.cpu(), labels=ids.cpu()))
    batch = {k: v.to(ids.device) for k, v in batch.items()}
    for _ in range(2):
        if cuda: torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with Tally() if not cuda else torch.autograd.set_grad_enabled(True) as tally:
            with torch.autocast(ids.device.type, dtype=half, enabled=cuda):
                loss, _ = objective(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if cuda: torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return (torch.cuda.max_memory_allocated() if cuda else tally.peak), seconds


def rows(args, device):
    "One line for each method and plan."
    half = ft.pick_dtype("auto", device) if device.type == "cuda" else torch.float32
    for name in args.only.split(","):
        s = replace(METHODS[name], batch_size=args.batch, length=args.length, weights=TYPES[half])
        if s.lora: s = replace(s, lora=ft.LoraConfig(r=args.r))
        model = make_model(TINY if args.tiny else args.shape, s, device)
        if s.lora: ft.add_lora(model, s.lora)
        model.train()
        if not speed_up(model): continue
        optimizer = build_optimizer(model, OptimConfig(optimizer=args.optimizer))
        ids = torch.randint(0, model.config.vocab_size, (args.batch, args.length), device=device)
        for wanted in args.plans.split(","):
            sweep()
            state = optimizer if optimizer.state else args.optimizer
            plan = plan_memory(model, ids.numel(), dtype=half, optimizer=state)
            place(plan, wanted)
            apply_plan(model, plan)
            found, seconds = steps(model, optimizer, ids, half)
            apply_plan(model, None)
            said = plan.peak_at(plan.at)
            if not ids.is_cuda:
                found += sum(said.parts[k] for k in ("weights", "optimizer", "unpacked"))
            yield name, wanted, plan, said, found, ids.numel()/seconds
        del model, optimizer
        gc.collect()
        sweep()


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="qlora,lora")
    p.add_argument("--plans", default=PLANS)
    p.add_argument("--shape", default="llama3_8b")
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--r", type=int, default=16)
    p.add_argument("--optimizer", default="adamw")
    p.add_argument("--tiny", action="store_true")
    args = p.parse_args()
    if args.tiny: args.batch, args.length = 2, 256
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    bad = 0
    for name, wanted, plan, said, found, speed in rows(args, device):
        ratio = said.bytes/found
        bad += not 0.95 <= ratio <= 1.05
        print(f"{name:9} {wanted:7} measured {found/2**30:7.3f}  "
              f"predicted {said.bytes/2**30:7.3f} GiB  {ratio:5.3f}  "
              f"{speed:8,.0f} tokens/s  {plan!r}", flush=True)
        print("   ", said, flush=True)
    return bool(bad) and device.type == "cuda"


if __name__ == "__main__": sys.exit(main())
