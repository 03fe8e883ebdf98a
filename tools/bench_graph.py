"""Steps replayed from CUDA graphs beside steps computed by Python, on a GPU.

    python tools/bench_graph.py                       LoRA of a Qwen2.5-0.5B's shape, 1 × 2048
    python tools/bench_graph.py --shape NAME --rows 2 --seq 1024 --bits 4 --full
    python tools/bench_graph.py --only packed,resume  some of the cases

Random weights and tokens. For each case: the largest difference of losses and gradient norms in
the same 20 steps (0 is bit for bit), milliseconds of a step with Python and with graphs, and the
peak of the memory in use, recordings included, and of what torch has reserved.
"""
import argparse, gc, statistics, sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

CASES = {"dense": {}, "packed": dict(packed=True), "dropout": dict(dropout=0.05, packed=True),
         "accumulate": dict(accumulate=3, dropout=0.05), "resume": dict(dropout=0.05, resume=True)}


def model_of(args, dropout):
    from transformers import AutoModelForCausalLM
    from ftkit.fast import speed_up
    from ftkit.lora.inject import LoraConfig, add_lora
    from ftkit.models.shapes import shape_config
    from ftkit.quant.linear import quantize_model
    config = shape_config(args.shape)
    if args.layers: config.num_hidden_layers = args.layers
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if args.bits: quantize_model(model, 4)
    if not args.full: add_lora(model, LoraConfig(r=16, dropout=dropout))
    if not speed_up(model, args.saving): sys.exit("this shape has no fast path")
    return model


def rows_of(args, n, packed):
    "Rows of random tokens, two thirds of which are learned."
    from ftkit.data.packing import Row
    rng, rows = np.random.default_rng(0), []
    for _ in range(n):
        cuts = np.sort(rng.choice(np.arange(8, args.seq - 8), 6, replace=False)) if packed else []
        starts = np.array([0, *cuts, args.seq], np.int32)
        ids = rng.integers(0, 1000, args.seq).astype(np.int32)
        labels, positions = ids.copy(), np.arange(args.seq, dtype=np.int32)
        for a, b in zip(starts, starts[1:]):
            labels[a:a + max(1, (b - a)//3)] = -100
            positions[a:b] -= a
        rows.append(Row(ids, labels, positions, starts))
    return rows


def losses_of(args, graph, steps, packed=False, dropout=0., accumulate=1, folder=None, stop=None):
    "Loss and norm of each step, milliseconds of the later ones, bytes; how often one was replayed."
    from ftkit.bench import Clock, times
    from ftkit.data.packing import collate
    from ftkit.graph import StepGraphs
    from ftkit.sft import SupervisedTuning
    from ftkit.training.loop import TrainConfig, Trainer
    from ftkit.training.optim import OptimConfig
    from ftkit.training.run import Callback

    class Same(StepGraphs):
        "The same shapes of batches, never recorded."
        WARM = 10**9
    graphs = (StepGraphs if graph else Same)()
    clock, end = Clock(warmup=args.warmup, steps=steps - args.warmup - 1), Callback()
    end.after_step = lambda t: setattr(t, "should_stop", t.step == stop)
    rows = rows_of(args, args.rows*accumulate*steps, packed)
    trainer = Trainer(model_of(args, dropout), SupervisedTuning(), rows,
        TrainConfig(batch_size=args.rows, accumulate=accumulate, max_steps=steps, precision="bf16",
                    cuda_graph=True), OptimConfig(lr=1e-3),
        lambda rows: collate(rows, 0, mask=None), callbacks=[clock, graphs, end], work_dir=folder,
        save=lambda folder: None)
    run = trainer.fit(resume="auto" if folder else None)
    table = [(r["step"], r["loss"], r["grad_norm"]) for r in run.history if r["event"] == "train"]
    torch.cuda.synchronize()
    peak = graphs.peaks()
    ms = 1e3*statistics.median(times(clock)) if len(clock.marks) > 1 else float("nan")
    used = graphs.used
    del trainer, run, graphs
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return table, ms, peak, used


def compare(args, resume=False, **how):
    computed, slow, before, _ = losses_of(args, False, args.steps, **how)
    if not resume: replayed, ms, after, used = losses_of(args, True, args.steps, **how)
    else:
        with tempfile.TemporaryDirectory() as folder:
            losses_of(args, True, args.steps, folder=folder, stop=args.steps//2, **how)
            replayed, ms, after, used = losses_of(args, True, args.steps, folder=folder, **how)
    right = {step: rest for step, *rest in computed}
    off = [max(abs(x - y)/abs(y) for x, y in zip(rest, right[step])) for step, *rest in replayed]
    gib = lambda pair: " / ".join(f"{x/2**30:.2f}" for x in pair)
    print(f"  off by {max(off):.1e}; {slow:.2f} ms, replayed {ms:.2f} ms ({used} batches "
          f"replayed); GiB {gib(before)}, replayed {gib(after)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2_5_0_5b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--bits", type=int, choices=[4])
    parser.add_argument("--full", action="store_true", help="train all weights")
    parser.add_argument("--saving", default="none")
    parser.add_argument("--only", help="cases, separated by commas")
    args = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("no GPU here")
    print(torch.cuda.get_device_name(), "torch", torch.__version__, vars(args))
    for name in args.only.split(",") if args.only else CASES:
        print(name, flush=True)
        compare(args, **CASES[name])


if __name__ == "__main__": main()
