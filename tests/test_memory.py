"The ledger against what torch keeps: saved tensors, whole steps, quantized models, and the command."
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

import ftkit as ft
from ftkit.activations import METHODS, MemorySetting, layer_keeps
from ftkit.core import FtkitError
from ftkit.lora.inject import LoraConfig, _linears, add_lora, find_targets
from ftkit.memory import (advice, decoder_layers, moments, predict_memory, recipe_setting,
                          resident, state_bytes, trained_tensors)
from ftkit.models.shapes import empty_model, known_shape, shape_config, shape_names
from ftkit.quant.linear import quantize_model
from ftkit.training.optim import OptimConfig, build_optimizer
from ftkit.training.plan import memory_bytes

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
WIDTHS = dict(hidden_size=256, intermediate_size=704, num_attention_heads=4,
              num_key_value_heads=2, vocab_size=64, pad_token_id=None)
TOKENS = 2, 96 # sizes that no weight has


def config(kind, layers=2, **more):
    return shape_config({"model_type": kind, "num_hidden_layers": layers, **WIDTHS, **more})


def build(cfg, s):
    model = AutoModelForCausalLM.from_config(cfg, dtype=ft.pick_dtype(s.weights),
                                             attn_implementation=s.attn).train()
    if s.bits: quantize_model(model, s.bits, double=s.double_quant, compute_dtype=torch.bfloat16)
    return add_lora(model, s.lora) if s.lora else model


def kept(model, s):
    "Bytes of activations that autograd keeps of a forward pass."
    found = {}
    def note(t):
        storage = t.untyped_storage()
        if {96, 192, 384} & set(t.shape): found[storage.data_ptr()] = storage.nbytes(), t
        return t
    ids = torch.zeros(TOKENS, dtype=torch.long)
    batch = dict(input_ids=ids, labels=ids)
    if s.mask: batch["position_ids"] = (torch.arange(96) % 48).expand(TOKENS)
    with saved_tensors_hooks(note, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=s.half):
            ft.SupervisedTuning()(model, batch)
    return sum(size for size,_ in found.values())


def counted(kind, s, **more):
    "Bytes a token that a third layer adds to two."
    two, three = (kept(build(config(kind, n, **more), s), s) for n in (2, 3))
    return (three - two)/192


def predicted(kind, s, **more):
    model = empty_model(config(kind, 1, **more))
    name, layer = next(iter(decoder_layers(model).items()))
    base = empty_model(config(kind, 1, **more))
    if s.bits: quantize_model(base, s.bits)
    names = find_targets(base, s.lora.targets) if s.lora else _linears(model)
    learned = {n[len(name) + 1:] for n in names if n.startswith(name + ".")}
    return layer_keeps(layer, model.config, learned, s)


# ------------------------------------------------------------ what a layer keeps

FULL, LORA, QLORA = (METHODS[n] for n in ("full", "lora", "qlora"))
GRID = {
    "full": FULL, "lora": LORA, "qlora": QLORA,
    "full in fp32": replace(FULL, precision="fp32"),
    "full in bf16 weights": replace(FULL, weights="bf16"),
    "lora on fp32": replace(LORA, weights="fp32"),
    "lora without autocast": replace(LORA, precision="fp32"),
    "lora in the base's type": replace(LORA, lora=LoraConfig(r=4, dtype="base"), precision="fp32"),
    "lora of two": replace(LORA, lora=LoraConfig(r=4, targets=["q_proj", "v_proj"])),
    "lora of the mlp": replace(LORA, lora=LoraConfig(r=4, targets=["down_proj", "up_proj"])),
    "dora": replace(LORA, lora=LoraConfig(r=4, dora=True)),
    "packed": replace(LORA, mask=True),
    "packed, full": replace(FULL, mask=True),
}


@pytest.mark.parametrize("name", GRID)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_layer_keeps_what_the_formula_says(kind, name):
    more = dict(head_dim=64) if kind == "qwen3" else {}
    assert counted(kind, GRID[name], **more) == predicted(kind, GRID[name], **more)


@pytest.mark.parametrize("kind,more", [("mistral", {}), ("gemma", dict(head_dim=64)), ("phi3", {}),
                                       ("gemma", dict(head_dim=32)), ("cohere", {}),
                                       ("gpt_bigcode", dict(n_inner=704, resid_pdrop=0., attn_pdrop=0.)),
                                       ("mixtral", dict(num_local_experts=4, num_experts=4)),
                                       ("qwen3_moe", dict(head_dim=64, num_experts=4,
                                                          num_experts_per_tok=2,
                                                          moe_intermediate_size=160))])
@pytest.mark.parametrize("name", ["full", "lora", "qlora", "full in fp32"])
def test_other_families(kind, more, name):
    ratio = predicted(kind, GRID[name], **more)/counted(kind, GRID[name], **more)
    assert 0.88 < ratio < 1.16, ratio


def test_dropout_costs_a_copy_and_a_mask_for_each_adapted_layer():
    s = replace(LORA, lora=LoraConfig(r=4, dropout=0.1))
    read = sum(m.in_features for n,m in _linears(empty_model(config("llama", 1))).items()
               if n != "lm_head")
    assert counted("llama", s) == predicted("llama", s) + read # on a CPU a mask has two bytes


def test_eager_attention_keeps_the_scores():
    s = replace(LORA, attn="eager")
    repeated = 2*2*(4 - 2)*64 # keys and values, for each query
    assert predicted("llama", s) - predicted("llama", LORA) == 4*(6*s.length - 4) + repeated
    s = replace(s, length=96)
    assert counted("llama", s) == pytest.approx(predicted("llama", s), rel=0.01)


# ------------------------------------------------------------ what stays

@pytest.mark.parametrize("kind,more", [("llama", {}), ("qwen2", dict(tie_word_embeddings=True)),
                                       ("mixtral", dict(num_local_experts=4))])
@pytest.mark.parametrize("double", [True, False])
def test_a_quantized_model_has_the_bytes_of_the_ledger(kind, more, double):
    s = replace(QLORA, double_quant=double)
    model = build(config(kind, **more), replace(s, lora=None))
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    parts = resident(empty_model(config(kind, **more)), s)
    assert sum(tensors.values()) == parts["weights"] + parts["scales"]
    if kind != "mixtral": return
    plain = resident(empty_model(config(kind, **more)), LORA)["weights"]
    assert parts["weights"] < plain/3 # the experts, too


WAYS = [dict(), dict(targets=["q_proj", "down_proj"]), dict(dtype="bf16"), dict(dtype="base"),
        dict(dora=True), dict(modules_to_save=("lm_head",)), dict(tokens=(3, 5)),
        dict(start="pissa_niter_4")]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_adapters_are_those_that_add_lora_makes(way, kind):
    more = dict(num_local_experts=4) if kind == "mixtral" else {}
    if more and way.keys() & {"dora", "start"}: return # not for experts
    s = replace(LORA, lora=LoraConfig(r=5, **way))
    model = build(config(kind, **more), s)
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = resident(empty_model(config(kind, **more)), s)
    assert sorted(trained_tensors(empty_model(config(kind, **more)), s)) == sorted(
        (tuple(p.shape), p.itemsize) for p in trained)
    every = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    ids = sum(b.nbytes for n,b in model.named_buffers() if n.endswith("ids"))
    assert sum(every.values()) == pytest.approx(parts["weights"] + parts["adapters"] + ids, rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adamw_16bit", "adamw_8bit", "bnb_adamw_8bit",
                                  "adafactor"])
def test_optimizer_states(name):
    if "bnb" in name: pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(torch.nn.Linear(300, 100), torch.nn.Linear(100, 30))
    optimizer = build_optimizer(model, OptimConfig(optimizer=name))
    for p in model.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()
    shared = {"qmap1", "qmap2", "step"} # tables, the same for all tensors
    found = sum(t.nbytes for state in optimizer.state.values() for k,t in state.items()
                if isinstance(t, torch.Tensor) and k not in shared)
    said = sum(state_bytes(tuple(p.shape), 4, name) for p in model.parameters())
    assert said == pytest.approx(found, rel=0.001)


def test_full_tuning_of_7b_takes_16_bytes_a_weight():
    ledger = predict_memory("llama2_7b", "full")
    n = sum(p.numel() for p in ledger.model.parameters())
    assert ledger.peak == pytest.approx(16*n, rel=0.001)
    assert ledger.peak*7e9/n == pytest.approx(112e9, rel=0.001)
    assert ledger.parts["optimizer"] == 2*ledger.parts["weights"] - 2*sum(
        b.nbytes for b in ledger.model.buffers())


# ------------------------------------------------------------ whole steps

def test_real_steps_of_the_trainer_take_what_was_predicted():
    "In a process of its own, since the profiler counts all that a process takes."
    done = subprocess.run([sys.executable, "-W", "ignore", str(ROOT/"tools/bench_memory.py"), "--tiny"],
                          capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("peak ") >= 6 and "all within bounds" in done.stdout


def test_what_makes_it_smaller():
    peak = lambda **changes: predict_memory("llama2_7b", "lora", **changes).peak
    assert peak(bits=4) < peak(bits=8) < peak() < peak(checkpointing=False)
    assert peak(batch_size=4) > peak(batch_size=2) > peak() > peak(length=1024)
    assert peak(optimizer="paged_adamw_8bit") < peak(optimizer="adamw_8bit") < peak()
    assert peak(learned=0.2) <= peak() < peak(accumulate=4)
    loss = lambda **changes: sum(predict_memory("llama2_7b", "lora", **changes).moments["loss"].values())
    assert loss(learned=0.2) < loss() # though another moment may be the worst
    assert peak(attn="eager", checkpointing=False) > 1.5*peak(checkpointing=False)
    assert peak(mask=True, length=32768) - peak(length=32768) > 32768**2


def test_moments_have_the_same_parts():
    for s in METHODS.values():
        found = moments(empty_model("qwen2_5_0_5b"), s)
        assert len({tuple(parts) for parts in found.values()}) == 1
        assert all(n >= 0 for parts in found.values() for n in parts.values())


# ------------------------------------------------------------ verdict and advice

def test_advice_leads_to_a_run_that_fits():
    ledger = predict_memory("llama2_7b", "full", gpu="24GB", batch_size=8, checkpointing=False)
    lines = advice(ledger)
    assert "does not fit" in repr(ledger) and lines[-1].startswith("fits with")
    assert "_qlora_" in lines[0] and "checkpointing" in lines[-1]
    saved = [float(line.split()[0]) for line in lines[:-1]]
    assert saved == sorted(saved, reverse=True) and all(x > 0 for x in saved)
    hopeless = predict_memory("llama2_70b", "full", gpu="8GB")
    assert advice(hopeless)[-1].startswith("not even with")
    assert advice(predict_memory("nano", "lora", gpu="8GB")) == []


def test_a_ledger_can_be_read_everywhere():
    ledger = predict_memory("qwen2_5_0_5b", "qlora", gpu="2GB", length=512)
    text, page = repr(ledger), ledger._repr_html_()
    assert f"{ledger.peak/1e9:.2f}" in text and ledger.worst in text and "<table>" in page
    assert max(map(len, text.splitlines())) < 160
    assert all(part in page for part in ("weights", "logits", "optimizer"))


@pytest.mark.parametrize("bad", ["eight", "8TB", "-1", "0GB", "", "GB"])
def test_gpu_sizes_that_are_none(bad):
    with pytest.raises(FtkitError, match="such as 8GB"): memory_bytes(bad)


@pytest.mark.parametrize("text,n", [("8GB", 8*2**30), ("8 gib", 8*2**30), ("24", 24*2**30), (24, 24*2**30), (8*2**30, 8*2**30),
                                    ("0.5g", 2**29), ("512MB", 2**29)])
def test_gpu_sizes(text, n): assert memory_bytes(text) == n


@pytest.mark.parametrize("changes,words", [
    (dict(optimizer="sgd"), "optimizer"), (dict(attn="flash"), "attn"), (dict(bits=3), "4 or 8"),
    (dict(batch_size=0), "at least 1"), (dict(learned=2.), "between 0 and 1"),
    (dict(start="pisa"), "unknown start"), (dict(r=0), "rank"),
    (dict(precision="fp8"), "precision"), (dict(lenght=3), "length"), (dict(length="x"), "expected int")])
def test_settings_that_make_no_sense(changes, words):
    with pytest.raises(FtkitError, match=words): predict_memory("nano", "lora", **changes)


# ------------------------------------------------------------ shapes and recipes

def test_shapes_of_unknown_models():
    with pytest.raises(FtkitError, match="llama2_7b"): shape_config("llama2_7")
    with pytest.raises(FtkitError, match="hub"): shape_config("nobody/nothing-at-all")
    assert known_shape("openai-community/gpt2") is None


def test_all_shapes_can_be_counted():
    for name in shape_names():
        assert predict_memory(name, "full", length=16).peak > 5e9, name


def test_a_folder_is_enough(tmp_path):
    (tmp_path/"config.json").write_text(json.dumps(config("llama").to_dict()))
    assert predict_memory(tmp_path, "lora").parts == predict_memory(config("llama"), "lora").parts


def test_recipes():
    r = ft.load_recipe("llama2_7b_qlora_alpaca_e3")
    s = recipe_setting(r)
    assert (s.bits, s.lora.r, s.lora.dropout, s.length, s.checkpointing) == (4, 64, 0.1, 2048, True)
    assert s.weights == s.precision == "bf16" and s.mask
    assert recipe_setting(ft.load_recipe("llama2_7b_full_alpaca_e3")).weights == "fp32"
    assert recipe_setting(r.set(precision="fp16")).weights == "fp16"
    assert recipe_setting(r.set(**{"optim.optimizer": "adamw_8bit"})).optimizer == "adamw_8bit"


# ------------------------------------------------------------ the command

def command(*args):
    return subprocess.run([sys.executable, "-m", "ftkit", "memory", *args], capture_output=True,
                          text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_the_command_says_what_fits(capsys):
    done = command("llama2_7b_qlora_alpaca_e3", "--gpu", "24GB")
    assert done.returncode == 0, done.stderr
    assert "weights" in done.stdout and done.stdout.rstrip().endswith("fits")
    from ftkit.cli import main
    assert main(["memory", "llama2_7b_full_alpaca_e3", "--gpu", "24GB", "--set", "train.batch_size=2"]) == 1
    out, err = capsys.readouterr()
    assert "does not fit" in out and "_qlora_" in out and err == ""


@pytest.mark.parametrize("args,words", [
    (["llama2_7b_qlora_alpaca"], "recipe"), (["nano_lora_colors_e4", "--gpu", "huge"], "8GB"),
    (["nano_lora_colors_e4", "--set", "lora.rr=3"], "lora.r")])
def test_the_command_explains_errors(args, words, capsys):
    from ftkit.cli import main
    assert main(["memory", *args]) == 1
    out, err = capsys.readouterr()
    assert words in err and "Traceback" not in err and out == ""


def test_whole_weights_at_the_start_are_counted():
    "PiSSA and LoftQ read the weights before they become four bits."
    for start in "pissa", "loftq_iter_2":
        ledger = predict_memory("llama2_7b", "qlora", start=start, gpu="8GB")
        assert ledger.worst == "start" and ledger.peak > 2*6.7e9 and not ledger.fits
    assert "start" not in predict_memory("llama2_7b", "qlora").moments
    assert "start" not in predict_memory("llama2_7b", "lora", start="pissa").moments
