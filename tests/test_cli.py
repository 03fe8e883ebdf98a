"The command: in processes of its own where that matters, else `main` in this process."
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

import ftkit
from ftkit.cli import VERBS, main, overview

torch.set_num_threads(1)
RECIPE = "nano_lora_colors_e4"
COMMAND = [str(Path(sys.executable).with_name("ftkit"))]
if not Path(COMMAND[0]).exists(): COMMAND = [sys.executable, "-m", "ftkit"]


def run(*args, **how):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    "The folder of a run of three steps, trained by the command itself."
    home = tmp_path_factory.mktemp("cli")
    done = run("train", RECIPE, "--work-dir", "mine", "--seed", 7, "--set", "train.max_steps=3",
               cwd=home)
    assert done.returncode == 0, done.stderr
    assert "The first row" in done.stderr and "step 3/3" in done.stderr
    assert "ftkit chat mine" in done.stderr and done.stdout == ""
    return home/"mine"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys):
    "Run a command in this process; it must fail with one paragraph that holds all of some words."
    def check(line, *words, code=1):
        args = line.split() if isinstance(line, str) else list(map(str, line))
        assert main(args) == code
        out, err = capsys.readouterr()
        assert err.startswith("ftkit") and "Traceback" not in err, err
        assert len(err.strip().splitlines()) <= 2, err
        for w in words: assert w in err, err
        return err
    return check


# ------------------------------------------------------------ help and speed

def test_help_is_quick_and_loads_nothing_heavy():
    def seconds():
        start = time.perf_counter()
        assert run("--help").stdout == overview() + "\n"
        return time.perf_counter() - start
    seconds()
    assert min(seconds() for _ in range(3)) < 0.5
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "ftkit", "list-cfg"],
                          capture_output=True, text=True)
    assert RECIPE in done.stdout.split() and "torch" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"ftkit {VERBS[verb].example}" in out and VERBS[verb].about in out
    assert verb in overview()


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_can_be_read(verb):
    from shlex import split
    from ftkit.cli import read_line
    assert read_line(split(VERBS[verb].example))[0] is VERBS[verb]


def test_version(capsys):
    for line in ["version"], ["--version"], ["-v"]:
        assert main(line) == 0
        assert ftkit.__version__ in capsys.readouterr().out


# ------------------------------------------------------------ the way through

def test_train_left_a_whole_run(tuned):
    assert sorted(p.name for p in tuned.iterdir() if p.name[0] != ".") == \
           ["checkpoint-000003", "log.jsonl", "recipe.py"]
    assert ftkit.load_recipe(tuned/"recipe.py") == ftkit.recipe(RECIPE).set(**{"train.max_steps": 3, "train.seed": 7})


def test_chat_prints_the_answer_and_nothing_else(tuned):
    done = run("chat", tuned, "--prompt", "dark teal", "--temperature", 0, "--max-new-tokens", 8)
    assert done.returncode == 0 and done.stderr == ""
    talk = ftkit.load_chat(tuned, device="cpu", temperature=0., max_new_tokens=8)
    assert done.stdout == talk.ask("dark teal") + "\n"


def test_chat_takes_several_prompts_as_one_chat(tuned, capsys):
    how = ["--max-new-tokens", "4", "--temperature", "0"]
    assert main(["chat", str(tuned), "--prompt", "red", "--prompt", "lighter", *how]) == 0
    talk = ftkit.load_chat(tuned, device="cpu", temperature=0., max_new_tokens=4)
    assert capsys.readouterr().out == talk.ask("red") + "\n" + talk.ask("lighter") + "\n"


def test_merge_and_chat_with_the_result(tuned, here, capsys):
    assert main(["convert", "merge", "nano", str(tuned), "merged", "--max-shard-size", "4MB"]) == 0
    assert capsys.readouterr().out == "merged\n"
    assert (here/"merged/model.safetensors.index.json").exists()
    assert main(["chat", "merged", "--prompt", "red", "--max-new-tokens", "4"]) == 0
    assert main(["convert", "pth_to_hf", RECIPE, str(tuned), "adapter"]) == 0
    assert (here/"adapter/adapter_config.json").exists()


def test_test_prints_scores_and_draws(tuned, here, capsys):
    assert main(["test", RECIPE, "--checkpoint", str(tuned), "--picture", "colors.png"]) == 0
    out = capsys.readouterr().out
    for who in "tuned", "untuned", "best constant", "ridge on letters": assert who in out
    assert (here/"colors.png").read_bytes()[:4] == b"\x89PNG"


def test_log_dataset_shows_what_is_learned(capsys):
    assert main(["log-dataset", RECIPE, "--set", "data.packing=off"]) == 0
    out = capsys.readouterr().out
    first = ftkit.color_rows("train")[0]
    assert f"⟦{first['color']}<|im_end|>⟧" in out and "-100" in out
    assert [x for x in out.splitlines() if x.startswith("--- ")] == \
           ["--- text", "--- input_ids", "--- masked_text", "--- labels"]


def test_log_dataset_shows_any_row_and_any_file(here, capsys, fails):
    rows = ftkit.color_rows("train")
    for n in 1, len(rows):
        line = ["log-dataset", RECIPE, "--set", "data.packing=off", "--show", "text", "--row", str(n)]
        assert main(line) == 0
        assert rows[n-1]["color"] in capsys.readouterr().out
    fails(f"log-dataset {RECIPE} --row 9999", "no row 9999")
    (here/"mine.jsonl").write_text(row(instruction="Say one.", output="It is one."))
    assert main(["log-dataset", "mine.jsonl", "--show", "masked_text"]) == 0
    assert "⟦It is one.<|im_end|>⟧" in capsys.readouterr().out
    fails("log-dataset lost.jsonl", "lost.jsonl")


def test_list_dataset_format(capsys, fails):
    assert main(["list-dataset-format"]) == 0
    out = capsys.readouterr().out
    for name in ftkit.layouts(): assert f"\n{name} " in f"\n{out}"
    assert main(["list-dataset-format", "alpaca"]) == 0
    assert "auto finds it" in capsys.readouterr().out
    fails("list-dataset-format alpca", "'alpaca'")


def test_check_of_a_huge_number_of_bad_rows(here, capsys):
    with open("bad.jsonl", "w") as f:
        f.write(GOOD + "\n")
        for i in range(6_000): f.write('{"instruction": %d}\n' % i if i % 2 else "{\n")
    assert main(["check-custom-dataset", "bad.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "6,000 of them bad" in out and len(out) < 3000 and "and 2,997 more" in out
    assert main(["check-custom-dataset", "bad.jsonl", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["bad"]) == 6_000


def test_check_of_other_encodings(here, capsys):
    (here/"bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert main(["check-custom-dataset", "bom.jsonl"]) == 0
    (here/"latin.jsonl").write_bytes(b"\n".join([GOOD.encode()]*3)
                                     + '\n{"instruction": "café", "output": "x"}'.encode("latin-1"))
    assert main(["check-custom-dataset", "latin.jsonl"]) == 1
    out, err = capsys.readouterr()
    assert "latin.jsonl" in out + err and "UTF-8" in out + err


def test_a_report_may_be_piped_to_head(here):
    with open("many.jsonl", "w") as f:
        for i in range(3000): f.write('{"instruction": %d}\n' % i)
        f.write(GOOD)
    command = " ".join([*COMMAND, "check-custom-dataset", "many.jsonl", "--json",
                       "--layout", "alpaca"])
    done = subprocess.run(f"{command} | head -2", shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("{") and done.stderr == ""


def test_check_custom_dataset_counts(here, capsys):
    (here/"d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ftkit.color_rows("test")))
    assert main(["check-custom-dataset", "d.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "layout colors, template tokenizer" in out and "bad" not in out
    assert re.search(f"samples +{len(ftkit.color_rows('test'))}\n", out)


# ------------------------------------------------------------ names and options

def test_unknown_names(fails, here):
    fails(f"train {RECIPE.replace('colors', 'colours')}", f"'{RECIPE}'")
    fails("train llama3_8b_instruct_qlora_custom_e3", "data.path")
    fails("train internlm2_chat_1_8b_dpo_full", "DPO", "does not have")
    fails("trian x", "Did you mean train", code=2)
    fails("convert mrege", "merge or pth_to_hf", code=2)
    fails(f"train {RECIPE} --workdir x", "--work-dir", code=2)
    fails(f"train {RECIPE} --set optim.lrate=1", "'optim.lr'")
    fails(f"train {RECIPE} --set lr=fast", "optim.lr", "expected float", "'fast'")
    fails(f"train {RECIPE} --set lr", "KEY=VALUE")
    fails(f"train --set lr=1 {RECIPE}", "RECIPE", code=2)
    fails(f"train {RECIPE} --set data.template=qwen_chta", "'qwen_chat'")
    fails(f"train {RECIPE} --set data.layout=colours", "'colors'")
    fails("chat nano --prompt x --template defualt", "'default'")
    fails(f"log-dataset {RECIPE} --show txt", "'text'")
    fails("list-cfg -p zzz", "zzz")
    fails(f"train {RECIPE} --deepspeed zero2", "--deepspeed", "not have it yet")
    fails(f"train {RECIPE} --sequence-parallel 2", "--sequence-parallel", "not have it yet")
    fails("train lost.py", "lost.py", "no such file")
    assert os.listdir(here) == []


def test_flags_are_short_for_options(monkeypatch):
    seen = {}
    def train(*args, **options):
        seen.update(args=args, options=options)
        return ftkit.Run([], Path("x"))
    monkeypatch.setattr(ftkit, "train", train)
    line = "train NAME --bf16 --gradient-checkpointing --skip-bad-rows --resume --cfg-options a=b=c"
    assert main(line.split()) == 0
    assert seen == dict(args=("NAME", None, "auto", None), options={
        "a": "b=c", "train.precision": "bf16", "train.gradient_checkpointing": True,
        "data.skip_bad_rows": True})


# ------------------------------------------------------------ bad data

def row(**columns): return json.dumps(columns)


def say(role, content, **more): return dict(role=role, content=content, **more)


GOOD = row(instruction="Say one.", output="one")
BAD = [
    ("not JSON", ["data.jsonl, line 2", "not valid JSON"], [GOOD, '{"instruction": "a",}']),
    ("missing column", ["line 2", "'output' is missing", "'instruction', 'answer'"],
     [GOOD, row(instruction="a", answer="b")]),
    ("not text", ["line 2", "'output' holds int"], [GOOD, row(instruction="a", output=5)]),
    ("not an object", ["line 2", "expected an object"], [GOOD, "[1, 2]"]),
    ("empty conversation", ["line 1", "is empty"], [row(messages=[])]),
    ("all masked", ["line 1", "nothing would be learned"],
     [row(messages=[say("user", "a"), say("assistant", "b", loss=False)])]),
    ("too long a question", ["line 2", "max_length"],
     [GOOD, row(instruction="word "*400, output="b")]),
]


@pytest.mark.parametrize("what,words,lines", BAD, ids=[b[0] for b in BAD])
def test_bad_rows(what, words, lines, here, fails):
    (here/"data.jsonl").write_text("\n".join(lines))
    layout = "messages" if "messages" in lines[0] else "alpaca"
    data = f"data.path=data.jsonl data.layout={layout} data.max_length=128"
    fails(f"train nano_lora_custom_e1 --set {data}", "data.jsonl", *words)
    assert not (here/"runs").exists()


@pytest.mark.parametrize("what,words,lines", BAD, ids=[b[0] for b in BAD])
def test_bad_rows_are_found_by_the_check(what, words, lines, here, capsys):
    (here/"data.jsonl").write_text("\n".join([*lines, GOOD.replace("one", "two")]))
    layout = "messages" if "messages" in lines[0] else "alpaca"
    line = f"check-custom-dataset data.jsonl --layout {layout} --max-length 128"
    assert main(line.split()) == 1
    out = capsys.readouterr().out
    for w in words: assert w.removeprefix("data.jsonl, ") in out, out
    assert re.search(r"[12] of them bad", out)


def test_bad_files(here, fails):
    base = "train nano_lora_custom_e1 --set data.path="
    fails(base + "lost.jsonl", "lost.jsonl", "no such file")
    (here/"a.csv").write_text("a,b")
    fails(base + "a.csv", "a.csv", "no rows")
    (here/"e.json").write_text("[\n{\"a\": 1,}\n]")
    fails(base + "e.json", "e.json, line 2")
    (here/"latin.jsonl").write_bytes(row(instruction="a", output="b").encode() + b"\xff")
    fails(base + "latin.jsonl", "latin.jsonl", "UTF-8")
    (here/"empty.jsonl").write_text("")
    fails(base + "empty.jsonl", "empty.jsonl", "no rows")
    (here/"odd.jsonl").write_text(row(question="a", reply="b"))
    fails(base + "odd.jsonl", "'question', 'reply'", "question_answer: question, answer")
    fails("check-custom-dataset lost.jsonl", "lost.jsonl")
    fails("train nano_lora_custom_e1", "data.path", "--set data.path=my.jsonl")
    assert not (here/"runs").exists()


# ------------------------------------------------------------ bad models and folders

def test_bad_models(here, fails, tuned):
    nano = ftkit.nano_path()
    shutil.copytree(nano, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    fails("chat bare --prompt x", "bare", "model.safetensors")
    fails(f"train {RECIPE} --set model.path=bare train.max_steps=1", "bare", "model.safetensors")
    shutil.copytree(nano, "cut")
    whole = Path("cut/model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(whole[:len(whole)//2])
    fails("chat cut --prompt x", "cut", "bytes")
    fails("chat ./nowhere --prompt x", "nowhere")
    fails("convert merge nano nano out", "nano", "not an adapter")
    shutil.copytree(tuned, "run")
    (here/"run/checkpoint-000003/adapter_model.safetensors").unlink()
    fails("chat run/checkpoint-000003 --prompt x", "adapter_model.safetensors")
    Path("out").mkdir(); Path("out/a").write_text("")
    fails(["convert", "merge", "nano", tuned, "out"], "out", "not empty")
    fails(["convert", "merge", "nano", tuned, "new", "--max-shard-size", "big"], "max_shard_size")
    assert not Path("new").exists()


def test_a_work_dir_with_a_run_in_it(fails, tuned):
    fails(["train", RECIPE, "--work-dir", tuned], str(tuned), "checkpoint-000003", "--resume")


def test_an_existing_file_is_not_overwritten(here, fails, capsys):
    assert main(["copy-cfg", RECIPE, "."]) == 0
    assert capsys.readouterr().out == f"{RECIPE}_copy.py\n"
    text = (here/f"{RECIPE}_copy.py").read_text()
    fails(f"copy-cfg {RECIPE} .", "exists already")
    assert (here/f"{RECIPE}_copy.py").read_text() == text


def test_mistakes_in_a_recipe_file(here, fails):
    (here/"a.py").write_text("from ftkit import Recipe\n\nrecipe = Recipe(name='a', lora=3\n")
    fails("train a.py", "a.py, line 3")
    (here/"b.py").write_text("from ftkit import Recipe\n\nrecipe = Recipe(nmae='a')\n")
    fails("train b.py", "b.py, line 3", "nmae")
    (here/"c.py").write_text("from ftkit import Recipe\nrecipe = Recipe('c', prompts='one')\n")
    assert ftkit.load_recipe("c.py").prompts == ("one",)
    (here/"d.py").write_text("import no_such_module\n")
    fails("train d.py", "d.py, line 1", "no_such_module")


# ------------------------------------------------------------ how it ends

def test_errors_have_a_traceback_only_with_debug():
    plain, debug = run("train", "nope"), run("train", "nope", "--debug")
    assert plain.returncode == 1 and debug.returncode == 1
    assert plain.stderr.count("\n") == 1 and plain.stderr.startswith("ftkit: unknown recipe 'nope'")
    assert "Traceback" in debug.stderr and "unknown recipe 'nope'" in debug.stderr


def test_a_closed_pipe_is_no_error():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([*COMMAND, "list-cfg"], **pipes) as p:
        p.stdout.close()
        assert p.stderr.read() == b"" and p.wait() == 0


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_saves_and_says_how_to_go_on(here):
    line = [*COMMAND, "train", RECIPE, "--set", "metric=none"]
    p = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    said = ""
    for line in p.stderr:
        said += line
        if line.startswith("step 1/"): break
    p.send_signal(signal.SIGINT)
    said += p.stderr.read()
    assert p.wait() == 130 and "Traceback" not in said, said
    command = re.search("Resume with: ftkit (train runs/.*--resume)", said)[1]
    step = int(re.search("after step ([0-9]+) of", said)[1])
    assert (here/f"runs/{RECIPE}/checkpoint-{step:06d}/adapter_model.safetensors").exists()
    assert command == f"train runs/{RECIPE}/recipe.py --work-dir runs/{RECIPE} --resume"
