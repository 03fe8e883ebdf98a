"Recipes: every name, every file, and whole runs from them."
import dataclasses, json, os, re, shutil

import pytest
import torch

import ftkit
from ftkit.recipes import _base_model, _dtype, render
from ftkit.training.run import read_log

torch.set_num_threads(1)
TINY = {"train.max_steps": 2, "data.max_length": 128, "data.eval_path": None, "metric": None,
        "prompts": ()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ftkit.list_recipes()[::199])
def test_a_recipe_survives_its_file(name, tmp_path):
    r = ftkit.recipe(name)
    file = ftkit.copy_recipe(name, tmp_path)
    assert ftkit.load_recipe(file) == r
    assert file.name == f"{name}_copy.py" and f"ftkit train {file.name}" in file.read_text()


def test_a_written_recipe_has_every_option_with_its_comment():
    r = ftkit.recipe("nano_lora_colors_e4")
    lines = [x for x in render(r).split("recipe = Recipe(")[1].splitlines() if "=" in x]
    assert len(lines) == len(r.options()) + 5
    bare = [x for x in lines if not re.search(r"=.*\S  ?#? ?.*# \S", x)]
    assert not bare


def test_a_changed_recipe_survives_its_file(here):
    r = ftkit.recipe("nano_lora_colors_e4").set(
        targets="q_proj,v_proj", betas="0.8,0.9", trackers=["tensorboard"], eval_every=5,
        system='say "hi"\n{name} 🙂', **{"data.path": "C:\\data\\x.jsonl"})
    (here/"r.py").write_text(render(r), encoding="utf-8")
    assert ftkit.load_recipe("r.py") == r


def test_full_and_lora_differ_in_what_they_should():
    full, lora = ftkit.recipe("nano_full_colors_e3"), ftkit.recipe("nano_lora_colors_e3")
    assert full.lora is None and lora.lora.r > 0 and lora.optim.lr > full.optim.lr
    assert full.data == lora.data and full.train == lora.train


@pytest.mark.parametrize("epochs", [1, 9, 10, 123])
def test_any_number_of_epochs(epochs):
    assert ftkit.recipe(f"llama3_8b_instruct_lora_custom_e{epochs}").train.epochs == epochs


@pytest.mark.parametrize("name", [
    "", "nano", "nano_lora_colors_e", "nano_lora_colors_e-1", "nano_lora_colors_e1.5",
    "nano_lora_colors_e1 ", "NANO_lora_colors_e1"])
def test_what_is_no_name(name):
    with pytest.raises(ftkit.FtkitError, match="unknown recipe|no such"): ftkit.recipe(name)


def test_a_file_of_that_name_is_suggested(here):
    (here/"mine.py").write_text("")
    with pytest.raises(ftkit.FtkitError, match="mine.py"): ftkit.recipe("mine")


def test_options_cover_every_field():
    r = ftkit.recipe("nano_lora_colors_e3")
    parts = [r, r.model, r.lora, r.data, r.optim, r.train]
    assert len(r.options()) == sum(len(dataclasses.fields(p)) for p in parts) - 5


def test_weights_that_are_trained_are_float32():
    full, lora = ftkit.recipe("nano_full_colors_e3"), ftkit.recipe("nano_lora_colors_e3")
    assert _dtype(full) == "fp32" and _dtype(full.set("model.dtype", "bf16")) == "bf16"
    assert _dtype(lora.set(precision="fp16")) == "fp16"
    assert _dtype(lora.set(precision="bf16")) == "auto"


def test_from_scratch_has_the_shapes_but_not_the_weights():
    random = _base_model(ftkit.recipe("nano_scratch_full_colors_e1"))
    real = _base_model(ftkit.recipe("nano_full_colors_e1"))
    assert {n: p.shape for n, p in random.named_parameters()} == \
           {n: p.shape for n, p in real.named_parameters()}
    assert not torch.equal(random.lm_head.weight, real.lm_head.weight)


def test_a_run_resumes_bit_for_bit_from_its_own_recipe_file(here):
    first = ftkit.train("nano_lora_colors_e4", "a", save_every=1, **TINY)
    saved = sorted(p.name for p in (here/"a").glob("check*"))
    assert saved == ["checkpoint-000001", "checkpoint-000002"]
    shutil.rmtree(here/"a/checkpoint-000002")
    again = ftkit.train("a/recipe.py", "a", resume=True)
    losses = [r["loss"] for r in first.history if r["event"] == "train"]
    assert [r["loss"] for r in again.history if r["event"] == "train"] == losses
    assert [r["loss"] for r in read_log(here/"a/log.jsonl") if r["event"] == "train"] == losses


def test_the_seed_decides_everything(here):
    def losses(seed, folder):
        run = ftkit.train("nano_lora_colors_e4", folder, seed=seed, dropout=0.1, **TINY)
        return [r["loss"] for r in run.history if r["event"] == "train"]
    a, b, c = losses(1, "a"), losses(1, "b"), losses(2, "c")
    assert a == b != c


def test_own_data_own_metric_and_numbered_folders(here):
    rows = [dict(instruction=f"Say {i}", output=str(i)) for i in range(12)]
    (here/"data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (here/"my_metric.py").write_text("def exact(said, right):\n"
        "    return {'exact': sum(a == b for a, b in zip(said, right))/len(right)}\n")
    options = {**TINY, "metric": "my_metric:exact", "data.path": "data.jsonl",
               "eval_fraction": 0.25, "answer_tokens": 4}
    for folder in "runs/nano_full_custom_e1", "runs/nano_full_custom_e1-2":
        run = ftkit.train("nano_full_custom_e1", **options)
        assert run.work_dir.as_posix() == folder
    evals = [r for r in run.history if r["event"] == "eval"]
    assert len(evals) == 2 and all(0 <= r["exact"] <= 1 for r in evals)
    scores = ftkit.test("nano_full_custom_e1", run.work_dir, **options)
    assert list(scores.scores) == ["tuned", "untuned"] and len(scores.questions) == 3
    assert scores.scores["tuned"]["exact"] == evals[-1]["exact"]
    assert scores.scores["untuned"]["exact"] == evals[0]["exact"]


def test_pre_training_from_random_weights(here):
    rows = [dict(text=f"The colour {i} of the sea is blue.\n"*9) for i in range(40)]
    (here/"text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"data.path": "text.jsonl", "batch_size": 2, "max_steps": 2, "eval_fraction": 0.1}
    run = ftkit.train("nano_scratch_full_nano_text_e1", "p", **options)
    first = next(r["loss"] for r in run.history if r["event"] == "train")
    assert abs(first - torch.tensor(2048.).log()) < 1
    assert ftkit.load_model("p", device="cpu").num_parameters() == run.model.num_parameters()


def test_what_fails_fails_before_anything_is_loaded(here, monkeypatch):
    monkeypatch.setattr(ftkit, "load_model", None)
    monkeypatch.setattr(ftkit, "load_data", None)
    bad = [("nano_lora_custom_e1", {}, "data.path"),
           ("nano_lora_colors_e1", {"metric": "nope"}, "metric"),
           ("nano_lora_colors_e1", {"precision": "fp64"}, "precision"),
           ("nano_lora_colors_e1", {"schedule": "cosin"}, "cosine"),
           ("nano_lora_colors_e1", {"eval_path": None}, "held-out"),
           ("nano_lora_colors_e1", {"objective": "dpo"}, "objective"),
           ("nano_full_colors_e1", {"bits": 4}, "model.bits=4.*_qlora_"),
           ("nano_full_colors_e1", {"bits": "8"}, "model.bits=8"),
           ("nano_lora_colors_e1", {"bits": 5}, "Use 4, 8 or None"),
           ("nano_lora_colors_e1", {"bits": 0}, "Use 4, 8 or None"),
           ("nano_lora_colors_e1", {"scratch": True}, "scratch.*_full_"),
           ("nano_lora_colors_e1", {"attn": "sdap"}, "Did you mean 'sdpa'"),
           ("nano_lora_colors_e1", {"model.dtype": "fp61"}, "unknown dtype"),
           ("nano_lora_colors_e1", {"device": "gpu"}, "not a device"),
           ("nano_lora_colors_e1", {"lora.dtype": "fp61"}, "unknown dtype"),
           ("nano_lora_colors_e1", {"r": -4}, "rank"),
           ("nano_lora_colors_e1", {"alpha": -1}, "alpha"),
           ("nano_lora_colors_e1", {"dropout": 1.5}, "dropout"),
           ("nano_lora_colors_e1", {"start": "pisa"}, "unknown start"),
           ("nano_lora_colors_e1", {"targets": ""}, "all-linear"),
           ("nano_lora_colors_e1", {"targets": "(q|v_proj"}, "not a regular expression"),
           ("nano_lora_colors_e1", {"betas": "0.9"}, "optim.betas"),
           ("nano_lora_colors_e1", {"betas": "0.9,1.5"}, "optim.betas"),
           ("nano_lora_colors_e1", {"lr": "inf"}, "optim.lr")]
    for name, options, match in bad:
        with pytest.raises(ftkit.FtkitError, match=match): ftkit.train(name, **options)
    assert os.listdir(here) == []


def test_a_base_in_four_bits_is_not_trained_in_full(here):
    ftkit.quantize_model(ftkit.load_model("nano"), 4).save_pretrained("small")
    ftkit.load_tokenizer("nano").save_pretrained("small")
    with pytest.raises(ftkit.FtkitError, match="small: weights in 4 or 8 bits are frozen"):
        ftkit.train("nano_full_colors_e1", **{**TINY, "model.path": "small", "max_samples": 20})
    run = ftkit.train("nano_lora_colors_e1", **{**TINY, "model.path": "small", "max_samples": 20})
    assert run.history


def test_one_target_by_its_name(here):
    targets = {text: ftkit.recipe("nano_lora_colors_e1").set(targets=text).lora.targets
               for text in ("[q_proj]", "['q_proj']", ".*[qv]_proj", "[a-z.0-9_]*[qv]_proj[s]?")}
    assert [*targets.values()] == [("q_proj",), ("q_proj",), *[*targets][2:]]


@pytest.mark.parametrize("token", [10**8, -1])
def test_ids_of_tokens_that_cannot_be(token):
    model, tokenizer = ftkit.load_model("nano"), ftkit.load_tokenizer("nano")
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ftkit.FtkitError, match=f"there is no token {token}"):
        ftkit.add_lora(model, ftkit.LoraConfig(tokens=(token,)), tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize("said, ended", [
    (dict(warmup_steps=100), dict(warmup_ratio=None)), ({"optim.warmup_steps": "100"}, dict(warmup_ratio=None)),
    (dict(min_lr="1e-6"), dict(min_lr_ratio=0.)), (dict(warmup_ratio=0.2), dict(warmup_steps=None))])
def test_who_names_one_of_two_words_for_a_thing_means_it(said, ended):
    tutorial = ftkit.recipe("nano_lora_colors_e4").set(**said)
    assert tutorial.optim.check() and {k: getattr(tutorial.optim, k) for k in ended} == ended
    with pytest.raises(ftkit.FtkitError, match="warmup"):
        ftkit.recipe("nano_lora_colors_e4").set(warmup_steps=3, warmup_ratio=0.1).optim.check()
