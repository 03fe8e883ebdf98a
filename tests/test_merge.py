"Merging: the same answers before and after, in the base's own type; XTuner's files; nothing half-written."
import errno, json, sys, types
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from ftkit.convert import merge, pth_to_hf, read_pth
from ftkit.core import FtkitError
from ftkit.data.families import template
from ftkit.lora.inject import LoraConfig, add_lora, lora_layers
from ftkit.lora.io import adapter_state
from ftkit.models.load import (load_model, load_tokenizer, read_notes, save_model, stored_dtype,
                               weight_headers)

IDS = torch.arange(5, 60)[None]
tokenizer = load_tokenizer("nano")
chatml = template("qwen_chat", tokenizer)


def make_base(folder, dtype=torch.float32, tied=False, size="5GB"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        initializer_range=0.1)).to(dtype)
    return save_model(model, tokenizer, None, folder, max_shard_size=size)


def make_adapter(folder, base, std=0.1, **how):
    model = load_model(base, device="cpu")
    torch.manual_seed(1)
    add_lora(model, LoraConfig(**{**dict(r=4), **how}))
    for layer in lora_layers(model).values(): torch.nn.init.normal_(layer.B, std=std)
    return save_model(model, tokenizer, chatml, folder, base=base, system="Be brief.")


def logits(path, theirs=False, **how):
    if theirs: model = AutoModelForCausalLM.from_pretrained(path)
    else: model = load_model(path, device="cpu", **how)
    with torch.no_grad(): return model(IDS).logits.float()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("how", [{}, dict(rslora=True, targets=["q_proj", "down_proj"])])
def test_float32_answers_alike(tmp_path, tied, size, how):
    base = make_base(tmp_path/"base", tied=tied, size=size)
    adapter = make_adapter(tmp_path/"adapter", base, **how)
    before = logits(adapter)
    assert (before - logits(base)).abs().max() > 0.05
    out = merge(base, adapter, tmp_path/"out", max_shard_size=size)
    assert_close(logits(out), before, atol=1e-5, rtol=1e-5)
    assert_close(logits(out, theirs=True), before, atol=1e-5, rtol=1e-5)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.no_grad(): theirs = peft.merge_and_unload()(IDS).logits
    assert_close(theirs, before, atol=1e-5, rtol=1e-5)
    assert weight_headers(out) == weight_headers(base)  # the same names, types and shapes
    assert (len(list(out.glob("*.safetensors"))) > 2) == (size == "100KB")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_costs_little(tmp_path, dtype):
    base = make_base(tmp_path/"base", dtype)
    adapter = make_adapter(tmp_path/"adapter", base)
    out = merge(None, adapter, tmp_path/"out")
    assert stored_dtype(out) == dtype and weight_headers(out) == weight_headers(base)
    exact,plain = logits(adapter, dtype="fp32"),logits(base, dtype="fp32")
    off = logits(out, dtype="fp32") - exact  # both computed in float32: rounding of the weights alone
    bound = {torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]  # of what the adapter changes
    assert 0 < off.norm() < bound*(exact - plain).norm()


def test_result_is_complete(tmp_path):
    base = make_base(tmp_path/"base", torch.bfloat16)
    out = merge(base, make_adapter(tmp_path/"adapter", base), tmp_path/"out")
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16 and type(theirs) is LlamaForCausalLM
    assert theirs.generation_config.eos_token_id == chatml.stop_ids(tokenizer)
    talk = [dict(role="user", content="dark teal")]
    text = AutoTokenizer.from_pretrained(out).apply_chat_template(talk, tokenize=False,
                                                                  add_generation_prompt=True)
    assert text == chatml.render(talk, add_generation_prompt=True).text
    assert read_notes(out) == dict(format=1, base=str(base), template="qwen_chat", system="Be brief.")
    assert not any(out.glob("adapter*"))


def test_checkpoints_and_work_folders(tmp_path):
    base = make_base(tmp_path/"base")
    make_adapter(tmp_path/"run/checkpoint-000005", base, std=0.2)
    newest = make_adapter(tmp_path/"run/checkpoint-000020", base)
    (newest/"trainer").mkdir(); (newest/"trainer/state.json").write_text("{}")
    for n,source in enumerate((tmp_path/"run", newest)):
        out = merge(base, source, tmp_path/f"out{n}")
        assert_close(logits(out), logits(newest), atol=1e-5, rtol=1e-5)
        assert not (out/"trainer").exists()
    (tmp_path/"empty").mkdir()
    merge(base, newest, tmp_path/"empty")
    assert_close(logits(tmp_path/"empty"), logits(newest), atol=1e-5, rtol=1e-5)


def test_the_built_in_model(tmp_path):
    adapter = make_adapter(tmp_path/"adapter", "nano", std=0.02)
    out = merge("nano", adapter, tmp_path/"out")
    assert stored_dtype(out) == torch.bfloat16 and read_notes(out)["base"] == "nano"
    assert json.loads((adapter/"adapter_config.json").read_text())["base_model_name_or_path"] == "nano"


@pytest.mark.parametrize("change, match", [
    (dict(adapter="base"), "a whole model, not an adapter"),
    (dict(base="adapter"), "is an adapter itself"),
    (dict(out="base"), "not empty"), (dict(out="file"), "a file of this name"),
    (dict(max_shard_size="big"), "'big' is not a size"), (dict(base="other"), "adapter_model.safetensors"),
    (dict(base="gone"), "no such folder"), (dict(adapter="gone"), "no such folder"),
    (dict(device="gpu"), "not a device")])
def test_mistakes_cost_nothing(tmp_path, change, match):
    base = make_base(tmp_path/"base")
    make_adapter(tmp_path/"adapter", base)
    torch.manual_seed(0)
    other = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2)
    save_model(LlamaForCausalLM(other), tokenizer, None, tmp_path/"other")
    (tmp_path/"file").touch()
    options = dict(base=tmp_path/"base", adapter=tmp_path/"adapter", out=tmp_path/"out")
    options |= {k: tmp_path/v if k in options else v for k,v in change.items()}
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(FtkitError, match=match): merge(**options)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
def test_full_disk_leaves_nothing(tmp_path, monkeypatch, error):
    from transformers import modeling_utils
    base = make_base(tmp_path/"base")
    adapter = make_adapter(tmp_path/"adapter", base)
    before,write,calls = sorted(p.name for p in tmp_path.iterdir()),modeling_utils.safe_save_file,[]
    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3: raise error
        return write(*args, **kwargs)
    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(FtkitError, match="out: the disk is full"):
        merge(base, adapter, tmp_path/"out", max_shard_size="100KB")
    assert len(calls) == 3 and sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_adapter_that_breaks_the_type_is_not_written(tmp_path):
    base = make_base(tmp_path/"base", torch.float16)
    adapter = make_adapter(tmp_path/"adapter", base, std=1e6)
    with pytest.raises(FtkitError, match="not finite"): merge(base, adapter, tmp_path/"out")
    assert not (tmp_path/"out").exists()


# ------------------------------------------------------------ XTuner's files

class Curve:
    "Written under the name of mmengine's class, which is not there when the file is read."
    def __init__(self): self.max_length,self._log_history = 10,np.array([2.5, 1.5])


def write_pth(file, state, **more):
    names = "mmengine", "mmengine.logging", "mmengine.logging.history_buffer"
    Curve.__module__,Curve.__qualname__,Curve.__name__ = names[2],"HistoryBuffer","HistoryBuffer"
    module = types.ModuleType(names[2])
    module.HistoryBuffer = Curve
    for name in names: sys.modules[name] = module
    curves = {"train/loss": Curve(), "lr": Curve()}
    hub = dict(log_scalars=curves, runtime_info=dict(iter=7), resumed_keys={})
    torch.save(dict(meta=dict(cfg="x = 1"), state_dict=state, message_hub=hub, **more), file)
    for name in names: del sys.modules[name]
    return file


@pytest.mark.parametrize("wrapper, ending, dtype", [
    ("llm.", "", torch.float32), ("llm.", ".default", torch.float16), ("", "", torch.bfloat16)])
def test_pth_becomes_an_adapter_that_everybody_reads(tmp_path, wrapper, ending, dtype):
    base = make_base(tmp_path/"base")
    made = make_adapter(tmp_path/"adapter", base, targets=["q_proj", "up_proj"], alpha=16)
    model = load_model(made, device="cpu")
    state = {f"{wrapper}{k.removesuffix('.weight')}{ending}.weight": t.to(dtype)
             for k,t in adapter_state(model).items()}
    lora = LoraConfig(r=4, alpha=16, dropout=0.1)
    out = pth_to_hf(write_pth(tmp_path/"e.pth", state), tmp_path/"out", str(base), lora, "qwen_chat")
    loose = 1e-5 if dtype == torch.float32 else 0.05
    assert_close(logits(out), logits(made), atol=loose, rtol=loose)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    with torch.no_grad(): assert_close(peft(IDS).logits, logits(out))
    config = json.loads((out/"adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16, ["q_proj", "up_proj"])
    assert read_notes(out)["template"] == "qwen_chat" and read_notes(out)["base"] == str(base)
    assert_close(logits(merge(None, out, tmp_path/"merged")), logits(out), atol=1e-5, rtol=1e-5)


class Evil:
    def __reduce__(self): return open, (Evil.target, "w")


def test_foreign_code_in_a_pth_does_not_run(tmp_path):
    Evil.target = str(tmp_path/"ran")
    write_pth(tmp_path/"evil.pth", {"a": torch.ones(1)}, optimizer=Evil())
    with pytest.raises(FtkitError, match="more than tensors.*state_dict"): read_pth(tmp_path/"evil.pth")
    assert not (tmp_path/"ran").exists()


def test_checkpoint_of_ftkit_is_copied(tmp_path, capsys):
    base = make_base(tmp_path/"base")
    newest = make_adapter(tmp_path/"run/checkpoint-000020", base)
    (newest/"trainer").mkdir(); (newest/"trainer/state.json").write_text("{}")
    out = pth_to_hf(tmp_path/"run", tmp_path/"out")
    assert "needed no conversion" in capsys.readouterr().err
    files = {p.name: p.read_bytes() for p in newest.iterdir() if p.is_file()}
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    with pytest.raises(FtkitError, match="not empty"): pth_to_hf(tmp_path/"run", tmp_path/"out")
    (newest/"adapter_model.safetensors").unlink()
    with pytest.raises(FtkitError, match="complete checkpoint"): pth_to_hf(tmp_path/"run", tmp_path/"new")
    assert not (tmp_path/"new").exists()
