"""One program, one setting, one process: some training steps, and one line of JSON.

    python tools/peers.py --peer ftkit --mode lora --ckpt FOLDER --gc 0 --batch 4 --seq 2048
    python tools/peers.py --peer hf --mode qlora --ckpt FOLDER --parity 20

Peers: hf (transformers + peft + bitsandbytes), liger, unsloth, and ftkit through its public API.
All see the same weights (tools/make_checkpoint.py), the same random tokens and, with --parity N,
the same start of the adapters; then every step's loss and gradient norm is read, which makes the
times worthless. The line says tokens/s, GiB, losses and norms. FOLDER's tokenizer is not used.
"""
import argparse, json, math, os, sys, time, zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = dict(adamw16="adamw_16bit", adamw8="adamw_8bit") # ftkit's alone
GIB, SPREAD = 2**30, 0.8 # the latter: of the logarithms of uneven lengths


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--peer", choices=("hf", "liger", "unsloth", "ftkit"), required=True)
    add("--mode", choices=("lora", "qlora", "full", "fp8"), required=True,
        help="fp8: a frozen base in 8 bits, ftkit only")
    add("--ckpt", required=True)
    add("--gc", choices=("0", "1", "auto"), default="1",
        help="recompute activations; auto: as the program likes it")
    add("--batch", type=int, default=4)
    add("--seq", type=int, default=2048)
    add("--packed", type=int, default=0,
        help="mean length of samples of uneven length; --seq is the longest")
    add("--steps", type=int, default=9)
    add("--warmup", type=int, default=4)
    add("--r", type=int, default=16)
    add("--opt", choices=("adamw", "paged8", *OURS), default="adamw",
        help="AdamW in the type of the weights, or paged in 8 bits; ftkit's own of 16 and 8")
    add("--early", action="store_true", help="apply gradients inside backward, ftkit only")
    add("--mask", type=float, default=0., help="part of each row that is not learned")
    add("--cap", type=float, help="GiB that may be used")
    add("--parity", type=int, help="steps, of which everything is read")
    add("--profile", type=int, default=0, help="steps more, to say where the time goes; ftkit only")
    add("--turn", type=Path, help="a file that is locked from the imports to the end: who else "
                                  "names it waits")
    add("--device", default="cuda")
    return parser.parse_args()


def take_turn(a):
    "Wait until nobody else measures."
    if not a.turn: return
    import fcntl
    a.turn = open(a.turn, "w") # until the process ends
    fcntl.flock(a.turn, fcntl.LOCK_EX)


# ------------------------------------------------------------ the same for all

def samples(a, vocab):
    "Steps of lists of (ids, how many of the first are not learned), the same for every program."
    import numpy as np
    rng, n = np.random.default_rng(0), a.parity or a.warmup + a.steps + a.profile
    for _ in range(n):
        lengths = [a.seq]*a.batch
        if a.packed: # as many tokens as in full rows
            lengths, room = [], a.batch*a.seq
            while room > 8:
                length = rng.lognormal(math.log(a.packed) - SPREAD**2/2, SPREAD)
                lengths.append(int(min(room, a.seq, max(8, length))))
                room -= lengths[-1]
        yield [(rng.integers(4, vocab, k), int(k*a.mask)) for k in lengths]


def start_of(path, shape):
    "The first values of a matrix A, by the name of its layer."
    import torch
    g = torch.Generator().manual_seed(zlib.crc32(path[path.index("layers."):].encode()))
    bound = 1/math.sqrt(shape[1])
    return (torch.rand(shape, generator=g)*2 - 1)*bound


def say(a, **values):
    print("RESULT " + json.dumps(dict(vars(a), **values, turn=None)), flush=True)


def vocabulary(a):
    return config(a)["vocab_size"]


def config(a): return json.loads((Path(a.ckpt)/"config.json").read_text())


# ------------------------------------------------------------ the peers, in a plain loop

def load_unsloth(a):
    from unsloth import FastLanguageModel
    import torch
    model, _ = FastLanguageModel.from_pretrained(
        a.ckpt, max_seq_length=a.seq, dtype=torch.bfloat16, load_in_4bit=a.mode == "qlora",
        full_finetuning=a.mode == "full", local_files_only=True)
    if a.mode == "full": return model
    again = False if a.gc == "0" else "unsloth"
    return FastLanguageModel.get_peft_model(
        model, r=a.r, target_modules=LINEARS, lora_alpha=a.r, lora_dropout=0, bias="none",
        use_gradient_checkpointing=again, random_state=0)


def load_hf(a):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    if a.peer == "liger":
        import liger_kernel.transformers as liger
        kind = json.loads((Path(a.ckpt)/"config.json").read_text())["model_type"]
        getattr(liger, f"apply_liger_kernel_to_{kind}")()
    how = dict(dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": a.device})
    if a.mode == "qlora":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(a.ckpt, **how)
    model.config.use_cache = False
    if a.gc != "0": model.gradient_checkpointing_enable({"use_reentrant": False})
    if a.mode == "full": return model
    from peft import LoraConfig, get_peft_model
    model.requires_grad_(False)
    if a.gc != "0": model.enable_input_require_grads()
    config = LoraConfig(r=a.r, lora_alpha=a.r, target_modules=LINEARS, lora_dropout=0., bias="none",
                        task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def same_start(model):
    "Put the agreed values into all A."
    import torch
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name: p.copy_(start_of(name[:name.index(".lora_A")], p.shape))


def padded(step, device):
    "One batch; its mask only where something is padded."
    import torch
    longest = max(len(ids) for ids, _ in step)
    ids = torch.zeros(len(step), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (x, masked) in enumerate(step):
        ids[i, :len(x)] = torch.from_numpy(x)
        labels[i, masked:len(x)] = ids[i, masked:len(x)]
    out = dict(input_ids=ids, labels=labels)
    if any(len(x) < longest for x, _ in step):
        lengths = torch.tensor([len(x) for x, _ in step])
        out["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
    return {k: v.to(device, non_blocking=True) for k, v in out.items()}


def side_by_side(step, device):
    "One row of samples as Unsloth's packing makes it; lengths are read on the host."
    import torch
    ids = torch.cat([torch.from_numpy(x) for x, _ in step])[None]
    labels, places, at = ids.clone(), torch.zeros_like(ids), 0
    for x, masked in step:
        labels[0, at:at + max(masked, 1)] = -100 # the first token follows no other
        places[0, at:at + len(x)] = torch.arange(len(x))
        at += len(x)
    batch = dict(input_ids=ids, labels=labels, position_ids=places)
    batch = {k: v.to(device) for k, v in batch.items()}
    lengths = torch.tensor([len(x) for x, _ in step], dtype=torch.int32)
    return dict(batch, packed_seq_lengths=lengths)


def parts_of(a, step):
    "Batches of a step, and what the loss of each counts."
    if not a.packed: return [(padded(step, a.device), 1.)]
    if a.peer == "unsloth": return [(side_by_side(step, a.device), 1.)]
    learned = [len(ids) - max(masked, 1) for ids, masked in step] # one by one, as a reference
    return [(padded([one], a.device), n/sum(learned)) for one, n in zip(step, learned) if n > 0]


def run_peer(a):
    import torch
    if a.peer != "unsloth":
        import peft, transformers # noqa: F401, before it is our turn
        from transformers import AutoModelForCausalLM # noqa: F401
    take_turn(a)
    begin = time.perf_counter()
    model = (load_unsloth if a.peer == "unsloth" else load_hf)(a)
    cuda = a.device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    model.train()
    if a.parity: same_start(model)
    learn = [p for p in model.parameters() if p.requires_grad]
    how = dict(lr=1e-4, weight_decay=0., betas=(0.9, 0.95))
    if a.opt == "adamw": optimizer = torch.optim.AdamW(learn, fused=cuda, **how)
    else:
        import bitsandbytes as bnb
        optimizer = bnb.optim.PagedAdamW8bit(learn, **how)
    loaded = time.perf_counter() - begin
    if cuda:
        torch.cuda.empty_cache()
        resident = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    losses, norms, tokens, marks = [], [], [], []

    def mark(): # in the queue of the GPU, so that nobody waits
        if not cuda: return marks.append(time.perf_counter())
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    batches = [parts_of(a, step) for step in samples(a, vocabulary(a))]
    wait()
    mark()
    for step, parts in zip(samples(a, vocabulary(a)), batches):
        loss = 0.
        for batch, share in parts:
            with torch.autocast("cuda" if cuda else "cpu", dtype=torch.bfloat16):
                part = model(**batch).loss*share
            part.backward()
            loss += part.detach()
        if a.parity: norms.append(torch.nn.utils.clip_grad_norm_(learn, math.inf).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        mark()
        tokens.append(sum(len(ids) for ids, _ in step))
    wait()
    seconds = [x.elapsed_time(y)/1e3 if cuda else y - x for x, y in zip(marks, marks[1:])]
    losses = [x.item() for x in losses]
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    report(a, seconds, tokens, losses, norms, peak, resident if cuda else 0, loaded, learn)


def report(a, seconds, tokens, losses, norms, peak, resident, loaded, learn):
    pairs = list(zip(tokens, seconds))[1 if a.parity else a.warmup:]
    rates, steady = sorted(n/s for n, s in pairs), sorted(s for _, s in pairs)
    say(a, tok_s=round(rates[len(rates)//2], 1), step_ms=round(1e3*steady[len(steady)//2], 2),
        peak_gib=round(peak[0]/GIB, 3), reserved_gib=round(peak[1]/GIB, 3),
        resident_gib=round(resident/GIB, 3),
        load_s=round(loaded, 1), learned_weights=sum(p.numel() for p in learn),
        losses=[round(x, 5) for x in losses], norms=[round(x, 6) for x in norms])


# ------------------------------------------------------------ ftkit

def in_order(steps, plan):
    "Rows so dealt out that the trainer's plan takes those of step i in step i."
    rows = [None]*sum(map(len, steps))
    for i, step in enumerate(steps):
        for at, row in zip((k for chosen, _ in plan.step(i) for k in chosen), step): rows[at] = row
    return rows


def as_rows(a, steps):
    "ftkit's rows of each step: as many as the batch has, samples side by side if they are uneven."
    from ftkit.data.packing import make_row, pack
    from ftkit.data.tokens import Encoded
    for step in steps:
        encoded = [Encoded(x.tolist(), [-100]*masked + x[masked:].tolist()) for x, masked in step]
        chosen = [[i] for i in range(len(encoded))]
        if a.packed: chosen = pack([len(e) for e in encoded], a.seq)
        yield [make_row([encoded[i] for i in row]) for row in chosen]


def run_ftkit(a):
    import torch
    import ftkit as ft
    from functools import partial
    from ftkit.bench import Clock, times
    from ftkit.fast import speed_up
    from ftkit.training.loop import Trainer
    from ftkit.training.plan import Plan, TrainConfig
    take_turn(a)
    begin, cuda = time.perf_counter(), a.device.startswith("cuda")
    bits = 4 if a.mode == "qlora" and "quantization_config" not in config(a) else None
    model = ft.load_model(a.ckpt, dtype="bf16", device=a.device, bits=bits)
    if a.mode == "full": model.requires_grad_(True)
    else: ft.add_lora(model, ft.LoraConfig(r=a.r, alpha=a.r))
    if a.parity:
        with torch.no_grad():
            for name, layer in ft.lora_layers(model).items():
                layer.A.copy_(start_of(name, layer.A.shape))
    steps = list(as_rows(a, samples(a, vocabulary(a))))
    batch = max(map(len, steps))
    for step in steps: # a row of one token that is not learned fills up
        while len(step) < batch: step.append(blank())
    again = {"0": False, "1": True, "auto": None}[a.gc]
    compute = "fp8" if a.mode == "fp8" else "auto"
    if cuda and not ft.speed_up(model, compute=compute): sys.exit("no fast path for this model")
    cfg = TrainConfig(max_steps=len(steps), batch_size=batch, precision="bf16", compute=compute,
                      log_every=1 if a.parity else len(steps), gradient_checkpointing=again,
                      gpu_memory=f"{a.cap}GiB" if a.cap else None, step_in_backward=a.early)
    optim = ft.OptimConfig(lr=1e-4, schedule="constant", warmup_steps=0,
                           max_grad_norm=1e9 if a.parity else 0,
                           optimizer=dict(adamw="adamw", paged8="paged_adamw_8bit", **OURS)[a.opt])
    rows = in_order(steps, Plan(batch*len(steps), batch, seed=cfg.seed))
    clock = Clock(0 if a.parity else a.warmup, a.parity or a.steps, a.profile)
    collate = partial(ft.collate, pad_id=0, mask=None)
    trainer = Trainer(model, ft.SupervisedTuning(), rows, cfg, optim, collate,
                      callbacks=[ft.FitMemory(), ft.StepGraphs(), clock])
    resident, loaded = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter() - begin
    run = trainer.fit()
    real = [sum(len(ids) for ids, _ in step) for step in samples(a, vocabulary(a))]
    seconds, every = times(clock), [r for r in run.history if r["event"] == "train"]
    real = real[:len(real) - a.profile]
    first = len(real) - len(seconds)
    if clock.profile: show_profile(clock.profile)
    report(a, [math.nan]*first + seconds, real, [r["loss"] for r in every],
           [r["grad_norm"] for r in every] if a.parity else [],
           (clock.peak or 0, clock.reserved or 0), resident, loaded,
           [p for p in model.parameters() if p.requires_grad])


def show_profile(profile):
    "Where the time goes, and in which kernels."
    print(profile, file=sys.stderr)
    for name, seconds, calls in profile.kernels:
        each = f"{1e3*seconds/profile.steps:9.2f} ms {calls/profile.steps:7.1f} calls"
        print(f"  {each}  {name[:110]}", file=sys.stderr)


def blank():
    "A row of one token."
    from ftkit.data.packing import make_row
    from ftkit.data.tokens import Encoded
    return make_row([Encoded([4], [-100])])


def main():
    a = arguments()
    if a.peer != "ftkit" and (a.mode == "fp8" or a.early or a.profile or a.opt in OURS):
        sys.exit("only ftkit has it")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1",
                      TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if a.peer == "ftkit": return run_ftkit(a)
    if a.peer == "unsloth": import unsloth  # noqa: F401, it wants to be first
    if a.cap:
        import torch
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(a.cap*GIB/total)
    run_peer(a)


if __name__ == "__main__": main()
