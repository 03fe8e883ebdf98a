"""Does a run take what the ledger says? Two real steps with random weights, beside the prediction.

    python tools/bench_memory.py                    three settings; needs a GPU of 80 GB
    python tools/bench_memory.py --only qlora_7b    one of them
    python tools/bench_memory.py --only lora_7b --batch-size 1 --learned 0.3
    python tools/bench_memory.py --tiny             tiny models on the CPU, in seconds

No files are read: a model of the shape is filled with random weights on the device, quantized by
ftkit, given LoRA layers and trained by ftkit's Trainer. After each stage stands what torch reports
(`memory_allocated`, `max_memory_allocated`), what the ledger predicted, and their ratio. Sizes that
stay have to agree within 2 % or 10 MB, the peak within 10 %; otherwise the exit code is 1.
"""
import argparse, gc, json, os, sys, time
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
import ftkit as ft
from ftkit.activations import METHODS
from ftkit.data.packing import make_row
from ftkit.data.tokens import Encoded
from ftkit.memory import predict_memory
from ftkit.models.shapes import shape_config

LORA = ft.LoraConfig(r=64, alpha=16, dropout=0.1)
SETTINGS = {
    "qlora_7b": ("llama2_7b", replace(METHODS["qlora"], lora=LORA, length=2048)),
    "lora_7b": ("llama2_7b", replace(METHODS["lora"], lora=LORA, batch_size=4, length=1024)),
    "full_1.5b": ("qwen2_5_1_5b", replace(METHODS["full"], batch_size=4, length=1024)),
    # more, where they are asked for; Mixtral needs 110 GB before it is quantized
    "qlora_7b_8bit": ("llama2_7b", replace(METHODS["qlora"], lora=LORA, optimizer="adamw_8bit")),
    "qlora_7b_paged": ("llama2_7b",
                       replace(METHODS["qlora"], lora=LORA, optimizer="paged_adamw_8bit")),
    "qlora_7b_packed": ("llama2_7b", replace(METHODS["qlora"], lora=LORA, mask=True)),
    "lora_7b_keep": ("llama2_7b", replace(METHODS["lora"], lora=LORA, checkpointing=False)),
    "int8_7b": ("llama2_7b", replace(METHODS["int8_lora"], lora=LORA)),
    "qlora_mixtral": ("mixtral_8x7b", replace(METHODS["qlora"], lora=LORA)),
}
USUAL = ["qlora_7b", "lora_7b", "full_1.5b"]
TINY = dict(model_type="llama", hidden_size=256, intermediate_size=704, num_attention_heads=4,
            num_key_value_heads=2, num_hidden_layers=4, vocab_size=2000)


def make_model(shape, s, device):
    "A model of a shape with random weights, as ftkit holds it before LoRA layers are added."
    from transformers import AutoModelForCausalLM
    dtype = ft.pick_dtype(s.weights)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=dtype,
                                                 attn_implementation=s.attn)
    if not s.bits: return model
    from ftkit.quant.linear import quantize_model
    return quantize_model(model, s.bits, double=s.double_quant, compute_dtype=dtype)


def make_rows(s, words, n):
    "Rows of random tokens, of two samples where a mask is wanted."
    rng = np.random.default_rng(0)
    def sample(length):
        ids = rng.integers(0, words, length)
        labels = np.where(np.arange(length) < round((1 - s.learned)*length), -100, ids)
        return Encoded(ids.tolist(), labels.tolist())
    parts = [s.length//2, s.length - s.length//2] if s.mask else [s.length]
    return [make_row([sample(p) for p in parts]) for _ in range(n)]


class Cuda:
    "What torch says about the memory of a GPU."
    def __init__(self): self.peaks = {}
    def allocated(self):
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def step(self, run):
        "The peak of a step, and its parts: forward, backward, update."
        torch.cuda.reset_peak_memory_stats()
        self.peaks = {}
        run()
        torch.cuda.synchronize()
        self.note("update")
        return max(self.peaks.values())

    def note(self, moment):
        torch.cuda.synchronize()
        self.peaks[moment] = max(torch.cuda.max_memory_allocated(), self.peaks.get(moment, 0))
        torch.cuda.reset_peak_memory_stats()

    def beyond(self):
        "Bytes that the allocator holds idle; bytes that CUDA takes for itself."
        free,total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        return reserved, total - free - reserved


class Cpu:
    "The same on a CPU, where the profiler has to count."
    def __init__(self, tensors): self.tensors,self.peaks = tensors,{}
    def allocated(self):
        gc.collect()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in self.tensors()}
        return sum(storages.values())

    def step(self, run):
        from torch.profiler import ProfilerActivity, profile
        before = self.allocated()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: run()
        events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events()
                        if e.name() == "[memory]")
        return before + max(accumulate(n for _,n in events))

    def note(self, moment): "The profiler sees everything."
    def beyond(self): return 0, 0


def measure(name, shape, s, device):
    "Rows of (what, measured, predicted), and what else was seen."
    ledger = predict_memory(shape, s, name)
    held = {}
    def tensors():
        states = held["trainer"].optimizer.state.values() if "trainer" in held else []
        return [*held["model"].parameters(), *held["model"].buffers(),
                *(t for state in states for t in state.values() if isinstance(t, torch.Tensor))]
    meter = Cuda() if device.type == "cuda" else Cpu(tensors)
    start = meter.allocated() if device.type == "cuda" else 0
    model = held["model"] = make_model(shape, s, device)
    weights = meter.allocated() - start
    if s.lora: ft.add_lora(model, s.lora)
    adapters = meter.allocated() - start - weights
    parts = ledger.moments["update"]
    rows = [("weights and scales", weights, parts["weights"] + parts["scales"])]
    if s.lora: rows.append(("adapters", adapters, parts["adapters"]))

    class Noting(ft.SupervisedTuning):
        def __call__(self, model, batch):
            out = super().__call__(model, batch)
            meter.note("forward")
            return out

    train = ft.TrainConfig(max_steps=2, batch_size=s.batch_size, accumulate=s.accumulate,
                           precision=s.precision, gradient_checkpointing=s.checkpointing)
    words = model.config.vocab_size
    trainer = held["trainer"] = ft.Trainer(
        model, Noting(), make_rows(s, words, 2*s.batch_size*s.accumulate), train,
        ft.OptimConfig(optimizer=s.optimizer), collate=partial(ft.collate, pad_id=0, mask=None))
    gradients = []
    def before_update(*_):
        gradients.append(sum(p.grad.nbytes for p in trainer.parameters if p.grad is not None))
        meter.note("backward")
    trainer.optimizer.register_step_pre_hook(before_update)
    with trainer.training_mode():
        seconds = []
        def step(i):
            begin = time.perf_counter()
            trainer.take_step(trainer.prepare_step(i))
            if device.type == "cuda": torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        meter.step(lambda: step(0))
        trainer.pending.clear()
        optimizer = meter.allocated() - start - weights - adapters
        peak = meter.step(lambda: step(1)) - start
        beyond = meter.beyond()
    rows += [("gradients", gradients[-1], parts["gradients"]),
             ("optimizer", optimizer, parts["optimizer"]), ("peak", peak, ledger.peak)]
    return ledger, rows, dict(peaks=meter.peaks, beyond=beyond, seconds=seconds)


def tied_extra(ledger):
    "Bytes of the second gradient that a tied embedding has for a moment, see the page on memory."
    head = ledger.model.get_output_embeddings().weight
    table = ledger.model.get_input_embeddings().weight
    alone = not ledger.setting.lora and ledger.setting.accumulate == 1 and head is table
    return head.numel()*ft.pick_dtype(ledger.setting.weights).itemsize if alone else 0


def report(name, shape, s, device, bounds):
    "Print a setting; True if all of it is within bounds."
    ledger, rows, more = measure(name, shape, s, device)
    what = {k: v for k,v in asdict(s).items() if k != "lora"}
    print(f"\n== {name}: {ledger.name} {what} {s.lora}\n{ledger}\n")
    good = True
    print(f"{'':20} {'measured':>12} {'predicted':>12}  ratio (predicted/measured), in MB")
    for part,found,said in rows:
        if part == "gradients": said -= tied_extra(ledger)
        ratio = said/found if found else float(said == 0)
        small = device.type == "cuda" and part != "peak" and abs(said - found) < 10e6
        fine = small or abs(ratio - 1) <= bounds[part == "peak"]
        good &= fine
        print(f"{part:20} {found/1e6:12,.1f} {said/1e6:12,.1f}  {ratio:.4f}{'' if fine else '  !'}")
    sums = {m: sum(parts.values()) for m,parts in ledger.moments.items()}
    said = dict(forward=max(sums["forward"], sums["loss"]), update=sums["update"],
                backward=max(sums["top layer"], sums["bottom layer"]))
    for moment,found in more["peaks"].items():
        print(f"  peak of {moment:10} {found/1e6:12,.1f} {said[moment]/1e6:12,.1f}  "
              f"{said[moment]/found:.4f}")
    reserved, cuda = more["beyond"]
    peak = next(found for part,found,_ in rows if part == "peak")
    if reserved:
        print(f"the allocator holds {(reserved - peak)/1e6:,.0f} MB more than the peak, "
              f"CUDA {cuda/1e6:,.0f} MB; the ledger adds {ledger.overhead/1e6:,.0f} MB")
    print(f"seconds of the two steps: {', '.join(f'{x:.2f}' for x in more['seconds'])}", flush=True)
    return good, dict(name=name, rows=rows, **more)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=USUAL)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--learned", type=float, help="part of the tokens that are learned")
    parser.add_argument("--json", help="write the numbers here too")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available(): sys.exit("no GPU here: try --tiny")
    device = torch.device("cpu" if args.tiny else "cuda")
    bounds = (0.02, 0.10)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        torch.zeros(1, device=device) # the context is made now
    good, found = True, []
    for name in args.only:
        shape, s = SETTINGS[name]
        changes = dict(batch_size=args.batch_size, length=args.length, learned=args.learned)
        s = replace(s, **{k: v for k,v in changes.items() if v is not None})
        if args.tiny:
            plain = s.lora and replace(s.lora, r=8, dropout=0.)
            shape, s = dict(TINY), replace(s, batch_size=2, length=256, lora=plain)
        fine, numbers = report(name, shape, s, device, bounds)
        good &= fine
        found.append(numbers)
        gc.collect()
        if device.type == "cuda": torch.cuda.empty_cache()
    if args.json: Path(args.json).write_text(json.dumps(found))
    print("\nall within bounds" if good else "\nnot all within bounds (!)")
    return 0 if good else 1


if __name__ == "__main__": sys.exit(main())
