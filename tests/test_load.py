"Loading and saving: every kind of folder, whole and damaged; what others read of what ftkit wrote."
import errno, json, shutil
import pytest
import torch
from peft import LoraConfig as PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          MixtralConfig, MixtralForCausalLM)
from ftkit.core import FtkitError
from ftkit.data.encode import encode_prompt
from ftkit.data.families import template
from ftkit.lora.inject import LoraConfig, add_lora, lora_layers
from ftkit.models import load
from ftkit.models.load import (load_model, load_template, load_tokenizer, read_notes, resolve,
                               save_model, stored_dtype)

IDS = torch.arange(5, 30)[None]


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer("nano")


def tiny(tied=False, seed=0, **changes):
    torch.manual_seed(seed)
    config = dict(vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def with_lora(model, seed=1, **how):
    torch.manual_seed(seed)
    add_lora(model, LoraConfig(r=4, **how))
    for layer in lora_layers(model).values(): torch.nn.init.normal_(layer.B, std=0.3)
    return model


def logits(model, ids=IDS):
    with torch.no_grad(): return model(ids).logits


@pytest.fixture
def base(tmp_path, tokenizer):
    "A whole base model in shards, and what it answers."
    model = tiny()
    save_model(model, tokenizer, None, tmp_path/"base", max_shard_size="100KB")
    return tmp_path/"base"


@pytest.fixture
def nothing_loaded(monkeypatch):
    "Fail if a check that should have come first let the weights be read."
    def loaded(*args): pytest.fail("the weights were read")
    monkeypatch.setattr(load, "_load_base", loaded)


# ------------------------------------------------------------ whole folders

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", ["5GB", "60KB"])
def test_full_model_comes_back(tmp_path, tokenizer, tied, size):
    model = tiny(tied)
    save_model(model, tokenizer, None, tmp_path/"m", max_shard_size=size)
    shards = list((tmp_path/"m").glob("*.safetensors"))
    assert (len(shards) > 2) == (size == "60KB")
    names = load.weight_headers(tmp_path/"m")
    assert ("lm_head.weight" in names) == (not tied)
    ours,theirs = load_model(tmp_path/"m", device="cpu"),AutoModelForCausalLM.from_pretrained(tmp_path/"m")
    for m in ours, theirs:
        assert_close(logits(m), logits(model), rtol=0, atol=0)
        assert (m.lm_head.weight is m.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad is False for p in ours.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stored_dtype_is_that_of_the_files(tmp_path, tokenizer, dtype):
    wanted = load.pick_dtype(dtype)
    save_model(tiny().to(wanted), tokenizer, None, tmp_path/"m")
    config = json.loads((tmp_path/"m/config.json").read_text())
    (tmp_path/"m/config.json").write_text(json.dumps({**config, "dtype": "float64"}))  # it may lie
    assert stored_dtype(tmp_path/"m") == wanted
    assert load_model(tmp_path/"m", dtype, "cpu").dtype == wanted


def test_experts_that_transformers_fuses_are_not_missing(tmp_path, tokenizer):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)).eval()
    save_model(model, tokenizer, None, tmp_path/"moe")
    assert_close(logits(load_model(tmp_path/"moe", device="cpu")), logits(model))


def test_auto_map_beside_a_known_type_is_ignored_without_a_question(base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    config = json.loads((base/"config.json").read_text())
    (base/"config.json").write_text(json.dumps(
        {**config, "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}))
    (base/"modeling_evil.py").write_text("raise SystemExit('foreign code ran')")
    assert type(load_model(base, device="cpu")) is LlamaForCausalLM


def test_old_pickled_weights_still_load(base, tmp_path):
    model = load_model(base, device="cpu")
    shutil.copytree(base, tmp_path/"old", ignore=shutil.ignore_patterns("model*"))
    torch.save(model.state_dict(), tmp_path/"old/pytorch_model.bin")
    assert_close(logits(load_model(tmp_path/"old", device="cpu")), logits(model), rtol=0, atol=0)
    assert stored_dtype(tmp_path/"old") == torch.float32


# ------------------------------------------------------------ adapters

def test_adapter_is_read_by_peft_and_ours_reads_peft(base, tmp_path, tokenizer):
    tuned = with_lora(load_model(base, device="cpu"))
    save_model(tuned, tokenizer, template("default", tokenizer), tmp_path/"ours")
    wanted = logits(tuned)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path/"ours")
    assert_close(logits(theirs), wanted)
    assert_close(logits(load_model(tmp_path/"ours", device="cpu")), wanted, rtol=0, atol=0)

    torch.manual_seed(2)
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(base), PeftConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "down_proj"],
        task_type="CAUSAL_LM"))
    for n,p in made.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.3)
    made.eval().save_pretrained(tmp_path/"theirs")
    loaded = load_model(tmp_path/"theirs", device="cpu", trainable_adapter=True)
    assert_close(logits(loaded), logits(made))
    trainable = {n for n,p in loaded.named_parameters() if p.requires_grad}
    assert trainable and all(n.endswith((".A", ".B")) for n in trainable)
    assert load_tokenizer(tmp_path/"theirs").get_vocab() == tokenizer.get_vocab()  # the base's
    assert load_template(tmp_path/"theirs", tokenizer).name == "tokenizer"


def test_adapter_remembers_its_base_from_another_folder(base, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned = with_lora(load_model("base", device="cpu"))
    save_model(tuned, tokenizer, None, "adapter")
    (tmp_path/"elsewhere").mkdir()
    monkeypatch.chdir(tmp_path/"elsewhere")
    assert_close(logits(load_model("../adapter", device="cpu")), logits(tuned), rtol=0, atol=0)


def test_adapter_without_base_or_with_a_wrong_one(base, tmp_path, tokenizer, nothing_loaded):
    tuned = with_lora(tiny())
    save_model(tuned, tokenizer, None, tmp_path/"adapter", base=tmp_path/"gone")
    with pytest.raises(FtkitError, match="base model of this adapter.*gone.*no such folder"):
        load_model(tmp_path/"adapter")
    save_model(tiny(hidden_size=48), tokenizer, None, tmp_path/"wide")
    save_model(tiny(num_hidden_layers=1), tokenizer, None, tmp_path/"short")
    for wrong in "wide", "short":
        with pytest.raises(FtkitError, match="adapter_model.safetensors"):
            load_model(tmp_path/wrong, adapter=tmp_path/"adapter")


def test_damaged_adapter(base, tmp_path, tokenizer, nothing_loaded):
    save_model(with_lora(tiny()), tokenizer, None, tmp_path/"adapter", base=base)
    weights = tmp_path/"adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(FtkitError, match="adapter_model.safetensors: the file has"):
        load_model(tmp_path/"adapter")
    weights.unlink()
    with pytest.raises(FtkitError, match="expected adapter_model.safetensors"):
        load_model(tmp_path/"adapter")
    weights.with_suffix(".bin").write_bytes(b"x")
    with pytest.raises(FtkitError, match="pickle"): load_model(tmp_path/"adapter")
    (tmp_path/"adapter/adapter_config.json").write_text('{"r": 4,')
    with pytest.raises(FtkitError, match="adapter_config.json, line 1"): load_model(tmp_path/"adapter")


def test_adapter_of_an_adapter(base, tmp_path, tokenizer):
    save_model(with_lora(tiny()), tokenizer, None, tmp_path/"one", base=base)
    save_model(with_lora(tiny()), tokenizer, None, tmp_path/"two", base=tmp_path/"one")
    with pytest.raises(FtkitError, match="is an adapter as well"): load_model(tmp_path/"two")


# ------------------------------------------------------------ damaged folders

def cut(path): path.write_bytes(path.read_bytes()[:-1])
def drop(path): path.unlink()
def break_json(path): path.write_text(path.read_text()[:-5])


def add_to_index(path):
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name, change, match", [
    ("model-00002-of-*", drop, r"index.json: 1 of \d+ weight files are missing, e.g. model-00002"),
    ("model-00002-of-*", cut, r"model-00002-of-\d+.safetensors: the file has .* promises"),
    ("model-00002-of-*", lambda p: p.write_bytes(p.read_bytes()[:5]), "not a safetensors file"),
    ("model.safetensors.index.json", break_json, r"index.json, line \d+"),
    ("model.safetensors.index.json", drop, "there are no weights here: expected model.safetensors"),
    ("model.safetensors.index.json", add_to_index, "1 tensors are in none of its files, e.g. model.ex"),
    ("model.safetensors.index.json", lambda p: p.write_text("{}"), "0 of 0 weight files"),
    ("config.json", drop, "config.json is missing"),
    ("config.json", break_json, r"config.json, line \d+"),
    ("config.json", lambda p: p.write_text('{"model_type": "t5"}'), "unknown model type 't5'"),
    ("config.json", lambda p: p.write_text('{"model_type": "qwen", "auto_map": {}}'), "does not run"),
    ("config.json", lambda p: p.write_text('{"hidden_size": 8}'), "names no model_type"),
])
def test_damage_is_found_before_the_weights_are_read(base, monkeypatch, name, change, match):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("read"))
    change(next(base.glob(name)))
    with pytest.raises(FtkitError, match=match): load_model(base, device="cpu")


@pytest.mark.parametrize("value, match", [("many", "cannot use this configuration"), (5, "cannot")])
def test_a_configuration_that_makes_no_sense(base, value, match):
    config = json.loads((base/"config.json").read_text())
    (base/"config.json").write_text(json.dumps({**config, "num_attention_heads": value}))
    with pytest.raises(FtkitError, match=match): load_model(base, device="cpu")


@pytest.mark.parametrize("change, match", [
    (lambda s: s.pop("model.norm.weight"), "1 are missing, e.g. model.norm.weight"),
    (lambda s: s.pop("lm_head.weight"), "1 are missing, e.g. lm_head.weight"),
    (lambda s: s.update({"model.layers.9.x": torch.ones(1)}), "1 are unknown.*layers.9"),
    (lambda s: s.update({"model.norm.weight": torch.ones(3)}), "another shape.*model.norm.weight"),
])
def test_weights_that_do_not_belong_to_the_config(tmp_path, tokenizer, change, match):
    save_model(tiny(), tokenizer, None, tmp_path/"m")
    state = load_file(tmp_path/"m/model.safetensors")
    change(state)
    save_file(state, tmp_path/"m/model.safetensors", {"format": "pt"})
    with pytest.raises(FtkitError, match=match): load_model(tmp_path/"m", device="cpu")


def test_options_that_do_not_exist(base):
    for wrong in dict(dtype="bf61"), dict(device="gpu"), dict(attn="sdpaa"):
        with pytest.raises(FtkitError): load_model(base, **{"device": "cpu", **wrong})


def test_tokenizer_files(base, tmp_path, tokenizer):
    break_json(base/"tokenizer.json")
    with pytest.raises(FtkitError, match="cannot load this tokenizer"): load_tokenizer(base)
    (base/"tokenizer.json").unlink()
    with pytest.raises(FtkitError, match="there is no tokenizer here"): load_tokenizer(base)


def test_names_that_are_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for what in load_model, load_tokenizer:
        with pytest.raises(FtkitError, match="nano2: there is no such folder, and the hub did not"):
            what("nano2")
    for path,match in (("./nano2", "no such folder"), ("a/b/c", "no such folder"), ("/nano2", "no such")):
        with pytest.raises(FtkitError, match=match): load_model(path)
    (tmp_path/"x.pth").touch()
    with pytest.raises(FtkitError, match="pth_to_hf"): load_model("x.pth")


# ------------------------------------------------------------ work folders

def test_work_folder_means_the_newest_whole_checkpoint(base, tmp_path, tokenizer, capsys):
    run = tmp_path/"run"
    for step in (2, 10, 9):
        save_model(with_lora(tiny(), seed=step), tokenizer, None, run/f"checkpoint-{step:06d}", base=base)
    (run/"checkpoint-best").mkdir(); (run/".checkpoint-000011.7.tmp").mkdir()
    wanted = logits(with_lora(tiny(), seed=10))
    assert_close(logits(load_model(run, device="cpu")), wanted, rtol=0, atol=0)
    cut(run/"checkpoint-000010/adapter_model.safetensors")
    assert resolve(run).name == "checkpoint-000009"
    assert "passing over" in capsys.readouterr().err
    for step in (2, 9): drop(run/f"checkpoint-{step:06d}/adapter_model.safetensors")
    with pytest.raises(FtkitError, match="nor a complete checkpoint"): load_model(run)


# ------------------------------------------------------------ saving

TALKS = [[("user", "dark teal")], [("system", "Be brief."), ("user", "dark teal")],
         [("user", "a"), ("assistant", "#00ff00"), ("user", "{b} %s {{x}}"), ("assistant", "é 🙂"),
          ("user", "  white\nspace ")],
         [("system", "S"), ("user", "猫"), ("assistant", "no"), ("user", "why?")]]


@pytest.mark.parametrize("name", ["default", "qwen_chat", "internlm2_chat", "tokenizer"])
@pytest.mark.parametrize("adapter", [True, False])
def test_chat_template_of_what_was_saved_gives_the_ids_of_training(tmp_path, tokenizer, name, adapter):
    t,model = template(name, tokenizer),tiny()
    before = tokenizer.chat_template,model.generation_config
    save_model(with_lora(model) if adapter else model, tokenizer, t, tmp_path/"m", system="S.")
    assert (tokenizer.chat_template, model.generation_config) == before
    theirs = AutoTokenizer.from_pretrained(tmp_path/"m")
    for talk in TALKS:
        messages = [dict(role=r, content=c) for r,c in talk]
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == encode_prompt(messages, t, tokenizer)
    notes = json.loads((tmp_path/"m/generation_config.json").read_text())
    assert notes["eos_token_id"] == t.stop_ids(tokenizer)
    assert read_notes(tmp_path/"m")["system"] == "S."
    assert load_template(tmp_path/"m", load_tokenizer(tmp_path/"m")).name == name


def test_generation_config_of_the_base_cannot_spoil_a_save(tmp_path, tokenizer):
    model = tiny()
    model.generation_config.temperature = 0.6  # without do_sample: transformers refuses to save it
    save_model(model, tokenizer, None, tmp_path/"m")
    assert "temperature" not in json.loads((tmp_path/"m/generation_config.json").read_text())
    assert model.generation_config.temperature == 0.6


def test_folders_that_are_taken(base, tmp_path, tokenizer):
    (base/"ftkit.json").unlink()
    kept = sorted((p.name, p.read_bytes()) for p in base.iterdir())
    with pytest.raises(FtkitError, match="another model is in this folder"):
        save_model(tiny(), tokenizer, None, base)
    assert sorted((p.name, p.read_bytes()) for p in base.iterdir()) == kept
    save_model(with_lora(tiny()), tokenizer, None, tmp_path/"m", base=base)
    save_model(tiny(seed=3), tokenizer, None, tmp_path/"m")  # its own: replaced, nothing is left over
    assert not (tmp_path/"m/adapter_config.json").exists()
    assert_close(logits(load_model(tmp_path/"m", device="cpu")), logits(tiny(seed=3)), rtol=0, atol=0)


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("there_before", [True, False])
def test_full_disk_leaves_things_as_they_were(tmp_path, tokenizer, monkeypatch, error, there_before):
    if there_before: save_model(tiny(), tokenizer, None, tmp_path/"m")
    def full(*args, **kwargs): raise error
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(FtkitError, match="m: the disk is full"):
        save_model(tiny(seed=1), tokenizer, None, tmp_path/"m")
    assert [p.name for p in tmp_path.iterdir()] == (["m"] if there_before else [])
    if there_before: assert_close(logits(load_model(tmp_path/"m", device="cpu")), logits(tiny()))


def test_full_disk_while_the_tokenizer_is_written(tmp_path, tokenizer, monkeypatch):
    def full(*args, **kwargs): raise Exception("No space left on device (os error 28)")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full)
    with pytest.raises(FtkitError, match="the disk is full"):
        save_model(with_lora(tiny()), tokenizer, None, tmp_path/"m", base="nano")
    assert not list(tmp_path.iterdir())


def test_files_can_be_read_by_whoever_may_read_the_folder(base):
    assert len({p.stat().st_mode for p in base.iterdir()}) == 1


def test_notes_of_a_later_version(base):
    (base/"ftkit.json").write_text('{"format": 2}')
    with pytest.raises(FtkitError, match="ftkit.json: this version does not know the format"):
        read_notes(base)
