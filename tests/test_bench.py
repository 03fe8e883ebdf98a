"FLOPs against PyTorch's own count, kinds of work, the clock, `ftkit bench`, and the tools that compare programs."
import importlib.util, json, math, sys
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
import ftkit
from ftkit.bench import BenchResult, Clock, bench, random_rows, row_work, times
from ftkit.cli import main
from ftkit.core import FtkitError
from ftkit.flops import PEAKS, attention_flops, pairs, promised, step_flops, weight_flops
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.profiling import IDLE, KINDS, Watch, covered, kind_of, where_time_goes
from ftkit.quant.linear import quantize_model
from small_runs import tiny_rows, tiny_trainer
from toys import SIZES, tiny_llama

TOOLS = Path(__file__).parents[1]/"tools"
RECIPE = "nano_lora_colors_e4"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS/f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(TOOLS))
    try: spec.loader.exec_module(module)
    finally: sys.path.remove(str(TOOLS))
    return module


# ------------------------------------------------------------ FLOPs

def products(model, ids):
    "FLOPs of a step in products with weights, as PyTorch counts them."
    with FlopCounterMode(display=False) as counter: model(input_ids=ids, use_cache=False).logits.sum().backward()
    found = {str(k).rpartition(".")[2]: v for k,v in counter.get_flop_counts()["Global"].items()}
    return found.get("mm", 0) + found.get("addmm", 0)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Phi3", "Gemma"])
def test_weights_as_pytorch_counts_them(kind):
    config = getattr(transformers, f"{kind}Config")(**SIZES, pad_token_id=0, head_dim=16)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    ids = torch.zeros(2, 10, dtype=torch.long)
    assert weight_flops(model, 20).total == products(model, ids)


def test_frozen_weights_need_a_third_less():
    model = tiny_llama().requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_() # so that a gradient goes all the way down
    assert weight_flops(model, 18).total == products(model, torch.zeros(2, 9, dtype=torch.long))
    whole = weight_flops(tiny_llama(), 18).total
    assert weight_flops(model, 18).total == whole*2/3
    bits = quantize_model(tiny_llama(), 4)
    assert weight_flops(bits.requires_grad_(False), 18).total == whole*2/3


def test_adapters():
    model = add_lora(tiny_llama(), LoraConfig(r=4))
    flops = weight_flops(model, 10, learned=5)
    assert flops.adapters == 6*10*sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.head == 4*5*model.lm_head.weight.numel()
    on_head = weight_flops(add_lora(tiny_llama(), LoraConfig(r=4, targets=["lm_head"])), 10, 5)
    assert on_head.head == 5*(4*128*64 + 6*4*(128 + 64)) and on_head.adapters == 0


def test_attention_by_windows_and_samples():
    full,near = tiny_llama().config, transformers.MistralConfig(**SIZES, sliding_window=3)
    assert attention_flops(full, [8]) == 12*36*64*2 and attention_flops(full, [4, 4]) == 12*20*64*2
    assert attention_flops(near, [8]) == 12*pairs(8, 3)*64*2
    mixed = transformers.Gemma2Config(**SIZES | dict(head_dim=16), sliding_window=3)
    assert attention_flops(mixed, [8]) == 12*64*(36 + pairs(8, 3))
    both = step_flops(tiny_llama(), [5, 3])
    assert both.total == both.attention + weight_flops(tiny_llama(), 8).total


def test_cards():
    for name in "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 3090", "NVIDIA L40S", "NVIDIA A10G", \
                "NVIDIA RTX 6000 Ada Generation", "NVIDIA GH200 480GB":
        assert promised(name)
    assert promised("NVIDIA L40") == PEAKS["L40"]*1e12 and promised("AMD Instinct MI300X") is None


# ------------------------------------------------------------ where the time goes

def test_kinds_of_our_own_kernels():
    names = dict(_score_kernel="loss", _dequantize_kernel="dequantize", _rms_forward="norm, rope, glu",
                 _glu_backward="norm, rope, glu", _rotate_kernel="norm, rope, glu", _adamw_kernel="optimizer",
                 _attend_forward="attention", _double_kernel="other")
    assert {n: kind_of(n) for n in names} == names
    assert all(kind_of(k) in (k, "other") for k in KINDS if " " not in k)


def test_intervals():
    g = torch.Generator().manual_seed(0)
    for n in 0, 1, 7, 50:
        begins = torch.randint(0, 100, (n,), generator=g)
        spans = [(b, b + w) for b,w in zip(begins.tolist(), torch.randint(0, 20, (n,), generator=g).tolist())]
        assert covered(spans) == len({i for a,b in spans for i in range(a, b)})


def event(name, begin, end, device="DeviceType.CUDA", named=False):
    return SimpleNamespace(name=lambda: name, start_ns=lambda: int(begin*1e9), duration_ns=lambda: int((end - begin)*1e9),
                           device_type=lambda: device, is_user_annotation=lambda: named)


def test_kernels_of_two_streams():
    watch = Watch("cpu")
    events = [event("gemm", 0, 4), event("memcpy", 3, 5), event("gemm", 8, 9), event("aten::mm", 0, 9, "DeviceType.CPU"),
              event("ProfilerStep", 0, 10, named=True), event("Optimizer.step#AdamW", 0, 10)]
    watch.profile = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    found = watch._of_kernels(10., 2)
    assert found.parts == {"linears": 5., "copies": 2., IDLE: 4.} and found.kernels == [("gemm", 5., 2), ("memcpy", 2., 1)]
    assert list(found.shares()) == ["linears", "copies", IDLE] and "5000.0 ms a step" in repr(found)


def test_a_profile_of_nothing():
    found = where_time_goes(lambda: None, "cpu", steps=1)
    assert found.shares().get(IDLE, 1) > 0.5 and "ms a step" in repr(found)


# ------------------------------------------------------------ the clock and the verb

def test_the_clock_in_a_run():
    clock = Clock(warmup=2, steps=3, profiled=1)
    trainer = tiny_trainer(callbacks=[clock], max_steps=6, log_every=6)
    trainer.fit()
    assert len(times(clock)) == 3 and all(t > 0 for t in times(clock)) and clock.profile.steps == 1
    lengths,learned = zip(*(row_work(r) for r in tiny_rows()))
    assert all(sum(n) == len(r) for n,r in zip(lengths, tiny_rows())) and min(learned) == 1


def test_bench_of_packed_rows():
    how = {"model.device": "cpu", "data.packing": True, "data.max_length": 128, "train.batch_size": 2}
    found = bench(RECIPE, steps=1, warmup=1, profiled=0, **how)
    assert 64 < found.tokens <= 256 and 0 < found.learned < found.tokens
    for bad in dict(steps=0), dict(warmup=0):
        with pytest.raises(FtkitError, match="at least one"): bench(RECIPE, **bad)
    with pytest.raises(FtkitError): bench("nano_lora_colours_e4")


def test_the_verb(capsys):
    line = ["bench", RECIPE, "--steps", "1", "--warmup", "1", "--profiled", "1", "--tokens", "16", "--set",
            "train.batch_size=2", "model.device=cpu"]
    assert not main(line)
    out = capsys.readouterr().out
    assert out.startswith(f"{RECIPE} on cpu") and "32 a step, 30 learned" in out and "linears" in out
    assert not main([*line, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 32 and found["flops"] > 0 and sum(found["parts"].values()) < 2 and found["mfu"] is None
    assert main(["bench", "no_such_recipe"]) == 1


def test_public_names():
    assert ftkit.bench is bench and ftkit.BenchResult is BenchResult and ftkit.step_flops is step_flops
    assert [len(r) for r in random_rows(2, 7, 9)] == [7, 7]


# ------------------------------------------------------------ beside other programs

def test_a_checkpoint_of_a_shape(tmp_path):
    made = tool("make_checkpoint")
    folder = made.make(tmp_path/"m", "tiny", limit=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = ftkit.load_model(folder, device="cpu", dtype="bf16")
    weight = model.model.layers[1].mlp.up_proj.weight
    assert 0.015 < weight.std() < 0.025 and (model.model.norm.weight == 1).all()
    assert ftkit.load_tokenizer(folder)("w7 w9").input_ids == [7, 9]
    stamp = (folder/"complete").stat().st_mtime_ns
    assert made.make(folder, "tiny") == folder and (folder/"complete").stat().st_mtime_ns == stamp
    again = ftkit.load_model(made.make(tmp_path/"n", "tiny"), device="cpu", dtype="bf16")
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), again.parameters()))


def test_all_shapes_are_known_to_transformers():
    made = tool("make_checkpoint")
    sizes = {n: sum(math.prod(shape) for _,shape in made.layout(made.config_of(n))) for n in made.SHAPES if n != "llama3-70b"}
    assert 8.0e9 < sizes["llama3-8b"] < 8.1e9 and 6.7e9 < sizes["llama2-7b"] < 6.8e9
    assert 0.49e9 < sizes["qwen2.5-0.5b"] < 0.5e9 and 7.6e9 < sizes["qwen2.5-7b"] < 7.7e9


def test_rows_come_in_the_agreed_order():
    from ftkit.training.plan import Plan
    peers = tool("peers")
    steps = [[(i, j) for j in range(3)] for i in range(5)]
    plan = Plan(15, 3)
    rows = peers.in_order(steps, plan)
    for i,step in enumerate(steps):
        assert [rows[k] for chosen,_ in plan.step(i) for k in chosen] == step


def test_samples_are_the_same_for_all():
    peers = tool("peers")
    a = SimpleNamespace(parity=None, warmup=1, steps=2, seq=64, batch=4, packed=16, mask=0.25, profile=0)
    first,second = (list(peers.samples(a, 100)) for _ in range(2))
    assert len(first) == 3 and all((x == y).all() and m == n for s,t in zip(first, second) for (x, m),(y, n) in zip(s, t))
    for step,rows in zip(first, peers.as_rows(a, first)):
        assert 248 <= sum(len(ids) for ids,_ in step) <= 256 and sum(map(len, rows)) == sum(len(ids) for ids,_ in step)
        assert all(len(r) <= 64 for r in rows)
    batch = peers.padded(first[0], "cpu")
    row = peers.side_by_side(first[0], "cpu")
    ends = row["packed_seq_lengths"].cumsum(0)[:-1]
    assert (row["labels"][0,ends] == -100).all() and (row["position_ids"][0,ends] == 0).all()
    assert batch["attention_mask"].sum() == sum(len(ids) for ids,_ in first[0])


def test_what_the_comparison_says(capsys):
    speed = tool("bench_speed")
    run = lambda peer, tok_s, gib, **more: dict(row="lora", peer=peer, tok_s=tok_s, peak_gib=gib, card="c", **more)
    near = dict(parity=2, losses=[2., 1.], norms=[1., 1.])
    far = dict(parity=2, losses=[2., 1.01], norms=[1., 1.])
    results = [run("hf", 50, 4), run("unsloth", 100, 2), run("ftkit", 110, 1), run("ftkit", 130, 1), run("ftkit", 120, 1),
               run("hf", 1, 1, **near), run("ftkit", 1, 1, **near), dict(row="lora", peer="liger", error="no such module")]
    found = speed.summary(results, speed.ROWS)["lora"]
    assert found["ratio"] == 1.2 and found["memory_ratio"] == 0.5 and found["parity"]["good"]
    assert found["failed"] == {"liger": "no such module"}
    assert not speed.summary([*results, run("ftkit", 1, 1, **far)], speed.ROWS)["lora"]["parity"]["good"]
    more = speed.summary([*results, run("ftkit", 150, 1) | dict(row="fp8")], speed.ROWS)["fp8"] # beside the peers of lora
    assert more["ratio"] == 1.5 and more["parity"] is None
    again = speed.summary([*results, run("ftkit", 1, 1, **near) | dict(row="lora_gc")], speed.ROWS)["lora_gc"]
    assert again["parity"]["good"] # what hf did in lora holds for all that is recomputed
    later = [run("unsloth", 50, 2, run=5), run("ftkit", 100, 1, run=5), run("ftkit", 500, 1, run=7)]
    assert speed.summary([*results, *later], speed.ROWS)["lora"]["ratio"] == 2 # runs are not mixed, nor half a run taken
    only = [run("ftkit", 10, 1, run=1) | dict(row="low_8b"), run("ftkit", 20, 1, run=2) | dict(row="low_8b")]
    assert speed.summary(only, speed.ROWS)["low_8b"]["results"]["ftkit"]["tok_s"] == 20
    speed.show(speed.summary(results, speed.ROWS))
    out = capsys.readouterr().out
    assert "good (loss 0.00%, norm 0.00%)" in out and "liger: no such module" in out
    args = SimpleNamespace(table=speed.ROWS, rows=["lora", "planner"], peers=["unsloth", "ftkit"], rounds=2, parity=None,
                           home=Path("h"), steps=6, device="cuda", profile=0)
    assert list(speed.turns(args)) == [
        ("lora", "unsloth"), ("lora", "ftkit"), ("qlora_gc", "unsloth"), ("planner", "ftkit"),
        ("lora", "ftkit"), ("lora", "unsloth"), ("planner", "ftkit"), ("qlora_gc", "unsloth")]
    args.rounds,args.rows = 1,["fp8", "lora"]  # what both are measured by is done once
    assert list(speed.turns(args)) == [("lora", "unsloth"), ("fp8", "ftkit"), ("lora", "ftkit")]
    args.parity,args.peers,args.rows = 20,["hf", "ftkit"],["lora", "lora_gc", "fp8"]
    assert list(speed.turns(args)) == [("lora", "hf"), ("lora", "ftkit"), ("lora_gc", "ftkit"), ("fp8", "hf"), ("fp8", "ftkit")]
    args.rows = ["lora_gc"]  # by itself it needs somebody to be held against, too
    assert list(speed.turns(args)) == [("lora", "hf"), ("lora_gc", "ftkit")]
    args.parity = None
    words = speed.command("planner", "ftkit", args)
    assert words[words.index("--gc") + 1] == "auto" and "--parity" not in words
    assert speed.command("packed", "hf", args).count("--packed") == 1
