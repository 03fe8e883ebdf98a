"What people bring and what they do with it: trees, odd messages, endless texts, terminals, typing errors."
import io
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
from ftkit.cli import main
from ftkit.core import FtkitError
from ftkit.data import formats
from ftkit.data.check import check_data
from ftkit.data.dataset import DataConfig, load_data
from ftkit.data.files import read_rows
from ftkit.data.formats import find_layout, to_messages
from ftkit.data.messages import Message
from ftkit.data.pairs import to_feedback, to_pairs
from ftkit.data.preview import preview
from ftkit.models.load import load_tokenizer

ROOT = Path(__file__).parents[1]


def u(text): return Message("user", text)
def a(text, loss=None): return Message("assistant", text, loss)
def talk(*texts): return [dict(role=r, content=t) for r, t in zip(("user", "assistant")*9, texts)]


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path/"cache"))
    return tmp_path


def load(path, **options):
    return load_data(DataConfig(path=str(path), **options), load_tokenizer("nano"), progress=False)


# --- trees as OpenAssistant exports them: one a row, the answers inside ---------------------------

def node(i, role, text, *replies, rank=None, **more):
    return dict(message_id=i, text=text, role=role, lang="en", review_count=3, review_result=True,
                deleted=False, rank=rank, synthetic=False, model_name=None, emojis={}, labels={},
                replies=list(replies), **more)


def tree(root): return dict(message_tree_id=root.get("message_id"), tree_state="ready_for_export",
                            prompt=root)


TREES = [
    tree(node("1", "prompter", "q",
              node("2", "assistant", "bad", rank=1),
              node("3", "assistant", "y", node("4", "prompter", "r", node("5", "assistant", "z")),
                   rank=0, parent_id="1"))),
    tree(node("6", "prompter", "alone")),
    tree(node("1", "prompter", "again", node("2", "assistant", "same ids"), parent_id=None))]


def test_a_row_may_be_a_whole_tree(here):
    rows = read_rows(lines(here/"ready.trees.jsonl", TREES))
    assert find_layout(rows) == "oasst1_tree"
    best = to_messages(rows)
    assert best == [[u("q"), a("y"), u("r"), a("z")], [u("again"), a("same ids")]]
    assert best.skipped == 1 and best.place(1) == f"{here/'ready.trees.jsonl'}, line 3"
    assert to_messages(rows, "oasst1_tree_all") == [best[0], [u("q"), a("bad")], best[1]]
    data = load("ready.trees.jsonl")
    assert data.layout == "oasst1_tree" and list(data.samples) == list(best)


def test_the_check_gathers_trees(here):
    flat = [dict(message_id=i, parent_id=p, text=t, role=r, rank=k) for i, p, t, r, k in [
        ("1", None, "q", "prompter", None), ("2", "1", "y", "assistant", 0),
        ("3", "1", "n", "assistant", 1), ("4", None, "alone", "prompter", None)]]
    for file in lines(here/"flat.jsonl", flat), lines(here/"whole.jsonl", TREES[:2]):
        report = check_data(file, progress=False)
        assert (report.samples, report.skipped, report.bad) == (1, 1, [])
        assert report.rows == len(file.read_text().splitlines()) and not report.documents
    report = check_data("flat.jsonl", "oasst1_tree_all", progress=False)
    assert (report.samples, report.skipped) == (2, 1)


@pytest.mark.parametrize("broken, word", [
    (tree(node("7", "prompter", "q", "a text")), "found 'a text'"),
    (tree(node("7", "prompter", "q") | {"replies": "none"}), "list of 'replies'"),
    (tree(node(None, "prompter", "q")), "'message_id' is missing"),
    (tree(node("7", "user", "q", node("8", "assistant", "y"))), "unknown role 'user'"),
    (tree(node("7", "prompter", "q", node("7", "assistant", "y"))), "occurs twice"),
    (tree({}), "'text' is missing")])
def test_a_broken_tree_is_one_bad_row(broken, word, here):
    file = lines(here/"a.jsonl", [TREES[0], broken, TREES[2]])
    with pytest.raises(FtkitError, match=word) as e: load(file)
    assert e.value.where == f"{file}, line 2"
    assert load(file, skip_bad_rows=True).bad == 1
    report = check_data(file, progress=False)
    assert (report.rows, report.samples, len(report.bad)) == (3, 2, 1)
    assert report.bad[0].where == f"{file}, line 2"


# --- messages ------------------------------------------------------------------------------------

@pytest.mark.parametrize("key", ["thinking", "reasoning", "reasoning_content", "files", "refusal",
                                 "code_interpreter_call", "audio"])
def test_nothing_of_a_message_is_lost_in_silence(key):
    said = [dict(role="user", content="q"), {"role": "assistant", "content": "y", key: "more"}]
    with pytest.raises(FtkitError, match=f"row 1: message 2 has '{key}', which would be lost"):
        to_messages([dict(messages=said)])
    said[1][key] = None                                     # a gap that Arrow filled
    assert to_messages([dict(messages=said)]) == [[u("q"), a("y")]]
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "y", key: "more"}]
    with pytest.raises(FtkitError, match=f"row 1: turn 2 has '{key}', which would be lost"):
        to_messages([dict(conversations=said)])


@pytest.mark.parametrize("row, words", [
    (dict(messages=[*talk("q"), dict(role="assistant", content=7)]),
     "message 2: the key 'content' holds int, not text"),
    (dict(messages=[*talk("q", "y"), dict(content="z")]), "message 3: the key 'role' is missing"),
    (dict(messages=[dict(role="user", content=[dict(type="text")]), *talk("q", "y")]),
     "message 1: the key 'text' is missing; found 'type'"),
    (dict(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "text": "y"}]),
     "turn 2: the key 'value' is missing; found 'from', 'text'"),
    (dict(conversation=[dict(input="q", output="y"), dict(input="q", output=["y"])]),
     "turn 2: the key 'output' holds list, not text")])
def test_errors_name_the_message_and_its_key(row, words, here):
    file = lines(here/"a.jsonl", [dict(messages=talk("q", "y")), row])
    layout = find_layout([row])
    with pytest.raises(FtkitError) as e: to_messages(read_rows(file)[1:], layout, where=file)
    assert words in str(e.value) and f"Layout {layout} expects" in str(e.value)


def test_a_text_without_an_end_is_a_bad_row(here, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_TEXT", 1000)
    for name, long, good in (("chat", dict(messages=talk("q", "y"*1001)),
                              dict(messages=talk("q", "y"*1000))),
                             ("text", dict(text="y"*1001), dict(text="y"*1000))):
        file = lines(here/f"{name}.jsonl", [good, long, good])
        with pytest.raises(FtkitError, match="has 1,001 characters; expected at most 1,000") as e:
            load(file)
        assert e.value.where == f"{file}, line 2" and "Cut it into several rows" in e.value.fix
        data = load(file, skip_bad_rows=True)
        assert data.bad == 1 and len(data.samples) == 2
        report = check_data(file, progress=False)
        assert report.samples == 2 and [b.where for b in report.bad] == [f"{file}, line 2"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_line_of_100_megabytes_is_told_in_little_memory(here):
    lines(here/"a.jsonl", [dict(instruction="q", output=x) for x in ("y", "y"*100_000_000, "z")])
    done = subprocess.run([sys.executable, "-c", "import sys; from ftkit.cli import main\n"
                           "code = main(['check-custom-dataset', 'a.jsonl'])\n"
                           "print(open('/proc/self/status').read(), file=sys.stderr)\n"
                           "sys.exit(code)"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and "100,000,000 characters" in done.stdout
    assert "line 2" in done.stdout and "samples   2" in done.stdout
    peak = next(int(l.split()[1]) for l in done.stderr.splitlines() if l.startswith("VmHWM"))
    assert peak < 2_000_000, peak       # kB; the whole of it encoded would be 18 GB


# --- judged replies ------------------------------------------------------------------------------

def test_judged_replies_in_a_table_are_not_tuned_on(here):
    for name in "label", "kto_tag":
        (here/"a.csv").write_text(f"prompt,completion,{name}\nq,y,True\nq,n,False\n")
        rows = read_rows("a.csv")
        with pytest.raises(FtkitError, match="judged replies.*to_feedback"): find_layout(rows)
        assert [f.good for f in to_feedback(rows, "label")] == [True, False]
    assert find_layout([dict(prompt="q", completion="y", label="positive")]) == "prompt_completion"


def test_entries_of_a_description_that_hold_judgements(here):
    (here/"dataset_info.json").write_text(json.dumps(dict(
        kto=dict(columns=dict(prompt="prompt", response="completion", kto_tag="label")),
        dpo=dict(ranking=True, columns=dict(prompt="q", chosen="c", rejected="r")))))
    for name, use in ("kto", "to_feedback"), ("dpo", "to_pairs"):
        with pytest.raises(FtkitError, match=f"Use {use}"):
            to_messages([dict(a=1)], f"dataset_info.json:{name}")
        with pytest.raises(FtkitError, match="Leave the layout out"):   # not: use what was used
            to_pairs([dict(prompt="q", chosen="y", rejected="n")], f"dataset_info.json:{name}")


# --- files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, words", [
    ("a.json", json.dumps(dict(instruction="q", output="y")), ["Put a single row in brackets"]),
    ("a.json", json.dumps(dict(messages=talk("q", "y"))),
     ["each row is one turn of a conversation", "Write one conversation a row"]),
    ("a.jsonl", '{"from": "human", "value": "q"}\n{"from": "gpt", "value": "y"}\n',
     ["each row is one turn of a conversation"]),
    ("data", "{}", ["files without an ending are not read"]),
    ("a.jsonl", '{"a": "b"}\n'.encode("utf-32"), ["this is UTF-32 text", "Save it as UTF-8"])])
def test_files_that_are_nearly_right(name, content, words, here):
    (here/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FtkitError) as e: check_data(name, progress=False)
    for w in words: assert w in str(e.value)


# --- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_terminal_will_do(encoding, here, monkeypatch, capsys):
    lines(here/"a.jsonl", [dict(instruction="Größe? 你好", output="— 🐦")]*2)
    def run(*words):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as m:
            m.setattr(sys, "stdout", out)
            assert main(list(words)) == 0, capsys.readouterr().err
        return out.buffer.getvalue().decode(encoding)
    assert "the same sample again" in run("check-custom-dataset", "a.jsonl")
    shown = run("log-dataset", "a.jsonl")
    assert ("Größe" in shown) == (encoding != "ascii") and ("🐦" in shown) == (encoding == "utf-8")
    assert "lawyer" in run("list-dataset-format", "law_reference")
    found = json.loads(run("check-custom-dataset", "a.jsonl", "--json"))
    assert found["findings"]["duplicates"]["count"] == 1


def test_log_dataset_of_files(here, capsys):
    lines(here/"a.jsonl", [dict(instruction="q", output="y"), dict(instruction="q")])
    def run(*words):
        code = main(["log-dataset", *words, "--show", "text"])
        out, err = capsys.readouterr()
        return code, out, err
    code, out, _ = run("*.jsonl", "--skip-bad-rows")
    assert code == 0 and out.count("<|im_start|>user\nq<|im_end|>") == 1
    lines(here/"two.ndjson", [dict(prompt="p", completion="c", question="q", answer="a")])
    code, out, err = run("two.ndjson")
    assert code == 1 and "two layouts fit" in err
    code, out, err = run("two.ndjson", "--layout", "question_answer")
    assert code == 0 and "user\nq<|im_end|>" in out
    code, _, err = run("a.jsonl")
    assert code == 1 and "a.jsonl, line 2: the column 'output' is missing" in err
    for name in "b.jsonl", "./b", "*.csv":
        code, _, err = run(name)
        assert code == 1 and "recipe" not in err and name.removeprefix("./") in err, err
    code, _, err = run("nano_lora_colours_e4")
    assert code == 1 and "Did you mean 'nano_lora_colors_e4'" in err


# --- the preview ---------------------------------------------------------------------------------

def test_the_preview_of_a_conversation_tells_its_weight():
    c, = to_messages([dict(messages=talk("q", "y"), sample_weight=.5)])
    view = preview(c, load_tokenizer("nano"))
    assert "with weight 0.5" in str(view) and "· learned · counts 0.5" in view._repr_html_()
    assert {t.weight for t in view.tokens if t.learned} == {.5}


def test_the_preview_ends_with_a_whole_character():
    nano = load_tokenizer("nano")
    c, = to_messages([dict(messages=talk("q", "你好🐦"*40))])
    whole = preview(c, nano)
    for n in range(1, 60):
        view = preview(c, nano, max_tokens=n)
        assert "\ufffd" not in str(view) and n - 4 < sum(len(t.ids) for t in view.tokens) <= n
        assert view.more + sum(len(t.ids) for t in view.tokens) == sum(
            len(t.ids) for t in whole.tokens)
        assert "".join(t.text for t in whole.tokens).startswith("".join(t.text for t in view.tokens))
    c, = to_messages([dict(messages=talk("q", "\ufffd"*90))])     # a text that has this sign
    assert sum(len(t.ids) for t in preview(c, nano, max_tokens=50).tokens) > 46


# --- a function of one's own ---------------------------------------------------------------------

OWN = "def read(row): return [dict(role='user', content=row['q']),\n" \
      "                       dict(role='assistant', content=row['a'])]\n"


@pytest.mark.parametrize("layout", ["own_rows.py:read", "sub/own_rows.py:read", "own_rows:read"])
def test_a_layout_of_ones_own_is_one_argument(layout, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "own_rows", raising=False)
    (here/"sub").mkdir()
    for folder in here, here/"sub": (folder/"own_rows.py").write_text(OWN)
    lines(here/"a.jsonl", [dict(q="q", a="y")]*2)
    for cached in False, True:
        data = load("a.jsonl", layout=layout, cache=str(here/"kept"))
        assert list(data.samples) == [[u("q"), a("y")]]*2 and data.cached == cached
        assert data.layout == "read"
    assert main(["check-custom-dataset", "a.jsonl", "--layout", layout]) == 0


def test_another_content_of_the_function_encodes_again(here):
    lines(here/"a.jsonl", [dict(q="q", a="y")])
    for end, cached in ("", False), ("", True), ("\n# changed", False):
        (here/"f.py").write_text(OWN + end)
        assert load("a.jsonl", layout="f.py:read", cache=str(here/"kept")).cached == cached
    (here/"dataset_info.json").write_text(json.dumps(dict(mine=dict(columns=dict(
        prompt="q", response="a")))))
    for cached in False, True:
        data = load("a.jsonl", layout="dataset_info.json:mine", cache=str(here/"kept"))
        assert data.cached == cached and data.samples[0] == [u("q"), a("y")]


@pytest.mark.parametrize("layout, words", [
    ("none.py:read", "'none.py' can't be imported"), ("own.py:other", "no function 'other' in"),
    ("no_such_module:read", "'no_such_module' can't be imported"),
    ("own.py:fail", "line 1: fail raised ZeroDivisionError"),
    ("odd.py:read", "'odd.py' raised SyntaxError: .*line 1"),
    ("odd:read", "'odd' raised SyntaxError"),
    ("none.json:x", "none.json: there is no such file")])
def test_what_is_wrong_with_a_layout_of_ones_own(layout, words, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here/"odd.py").write_text("def read(row) return row")
    (here/"own.py").write_text(OWN + "def fail(row): return 1/0\n")
    lines(here/"a.jsonl", [dict(q="q", a="y")])
    with pytest.raises(FtkitError, match=words): load("a.jsonl", layout=layout)


def test_several_paths_are_checked_one_by_one(here):
    with pytest.raises(FtkitError, match="Check one after the other"): check_data("a.csv,b.csv")
    lines(here/"a,b.jsonl", [dict(instruction="q", output="y")])
    assert check_data("a,b.jsonl", progress=False).samples == 1
