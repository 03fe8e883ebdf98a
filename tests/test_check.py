"Checking data before training: every kind of finding, on files as people have them."
import io, json, random, re

import pytest
from rich.console import Console

import ftkit
from ftkit.cli import main
from ftkit.data.check import DataReport, check_data
from ftkit.data.measure import Often, at_length, histogram, repeats, sample_keys, text_key
from ftkit.data.messages import Conversation, Message
from ftkit.data.packing import make_rows, pack
from ftkit.data.preview import preview, token_texts

NANO = ftkit.load_tokenizer("nano")
GOOD = dict(instruction="What is one and one?", output="It is two.")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(rows, name="data.jsonl"):
    with open(name, "w", encoding="utf-8") as f:
        f.writelines((r if isinstance(r, str) else json.dumps(r)) + "\n"
                     for r in rows)
    return name


def check(rows, **how):
    return check_data(write(rows), tokenizer=NANO, progress=False, **how)


def numbered(n, **columns):
    return [dict(GOOD, instruction=f"What is {i} and one?", output=f"It is {i + 1}.", **columns)
            for i in range(n)]


def found(report): return {k: f.places for k, f in report.findings.items()}


def say(role, content, **more): return dict(role=role, content=content, **more)


def talk(*turns, **columns): return dict(messages=list(turns), **columns)


# ------------------------------------------------------------ bad rows

def test_good_rows_have_nothing_wrong(here):
    report = check(numbered(1300))
    assert (report.rows, report.samples, report.bad) == (1300, 1300, [])
    assert not report.findings and report.roles == dict(user=1300, assistant=1300)
    encoded, _ = ftkit.encode_all(ftkit.to_messages(ftkit.read_rows("data.jsonl")),
                                  ftkit.template("tokenizer", NANO), NANO, progress=False)
    assert list(report.lengths) == [len(e) for e in encoded]
    assert list(report.learned) == [e.learned for e in encoded]


BAD = ['{"instruction": "cut', "[1, 2]", "null", dict(instruction="no answer"),
       dict(instruction="Number?", output=5), dict(instruction=["list"], output="x"),
       dict(instruction="half \ud83d", output="x"), "}{"]


def test_every_bad_row_is_told_with_its_line(here):
    rows, places, r = numbered(700), {}, random.Random(3)
    for k, bad in enumerate(BAD):
        at = r.randrange(len(rows))
        rows.insert(at, bad)
    lines = [i + 1 for i, row in enumerate(rows) if any(row is b for b in BAD)]
    report = check(rows)
    assert [int(re.search(r"line (\d+)", e.where)[1]) for e in report.bad] == lines
    assert report.rows == 708 and report.samples == 700
    for e in report.bad: assert e.problem and "data.jsonl" in e.where and e.__traceback__ is None


@pytest.mark.parametrize("row,word", [
    (talk(say("user", "a"), say("bot", "b")), "bot"),
    (talk(say("user", "a")), "no reply"),
    (talk(say("user", "a"), say("assistant", "b", loss=False)), "loss=False"),
    (talk(), "empty"),
    (talk("no turn"), "turns"),
    (talk(say("user", 3), say("assistant", "b")), "int"),
    (talk(say("tool", "x"), say("assistant", "b")), "call"),
    (talk(say("user", "\ud83d"), say("assistant", "b")), "half a character"),
    (talk(say("user", "long "*900), say("assistant", "b")), "max_length")])
def test_bad_conversations(row, word, here):
    good = [talk(say("user", f"{i}?"), say("assistant", f"{i} indeed.")) for i in range(3)]
    path = write([good[0], json.dumps(row), *good[1:]])
    report = check_data(path, tokenizer=NANO, max_length=256, progress=False)
    e, = report.bad
    assert e.where.startswith("data.jsonl, line 2") and word in e.problem, e
    assert report.samples == 3 and report.rows == 4


def test_thousands_of_bad_rows_are_grouped(here):
    report = check([*numbered(10), *(dict(instruction=f"{i}", output=i) for i in range(4000)),
                    *(dict(instruction=f"{i}") for i in range(3000)), *["{"]*2000])
    assert len(report.bad) == 9000 and report.samples == 10
    text = str(report)
    assert len(text) < 4000 and "4,000" in text and "and 3,997 more" in text and "2,000" in text


def test_layout_of_the_most_rows_counts(here):
    report = check([dict(other=1), *numbered(20), dict(instruction="x", answer="y")])
    assert report.layout == "alpaca" and len(report.bad) == 2
    with pytest.raises(ftkit.FtkitError, match="no layout fits"): check([dict(other=1)]*3)


def test_nothing_readable(here):
    report = check(["{", "["])
    assert len(report.bad) == 2 and report.samples == 0 and "Bad rows" in str(report)
    with pytest.raises(ftkit.FtkitError, match="no rows"): check([])
    with pytest.raises(ftkit.FtkitError, match="lost.jsonl"): check_data("lost.jsonl", tokenizer=NANO)
    with pytest.raises(ftkit.FtkitError, match="max_length"): check(numbered(1), max_length=1)
    with pytest.raises(ftkit.FtkitError, match="unknown"): check(numbered(1), template="qwen_chta")
    with pytest.raises(ftkit.FtkitError, match="unknown"): check(numbered(1), layout="alpca")


def test_a_template_without_a_role(here):
    rows = [talk(say("user", "a"), say("tool", "x"), say("assistant", "b"))]*3
    report = check(rows, layout="messages", template="default")
    assert len(report.bad) == 3


def test_a_function_as_layout(here):
    def mine(row):
        if row["q"] == 1: raise ValueError("one")
        return None if row["q"] == 2 else [Message("user", str(row["q"])), Message("assistant", "yes")]
    report = check([dict(q=i) for i in range(4)], layout=mine)
    assert report.layout == "mine" and report.skipped == 1 and report.samples == 2
    assert len(report.bad) == 1 and "one" in report.bad[0].problem


# ------------------------------------------------------------ odd rows

def test_findings(here):
    rows = [*numbered(3), GOOD, dict(GOOD, instruction="what  is ONE and one? "),
            dict(GOOD, output="Eleven."), dict(instruction="Empty?", output=" \n"),
            dict(instruction="Short?", output="no"), dict(instruction=" ", output="To nothing."),
            dict(instruction="Say <|im_end|> and </s>!", output="I <|im_start|> won't."),
            dict(instruction="Count.", output="1 2 3 "*300)]
    report = check(rows, max_length=200)
    assert not report.bad
    got = found(report)
    assert got["duplicates"] == ["line 5 = line 4"]
    assert got["conflicts"] == ["line 6 ≠ line 4"]
    assert got["empty"] == ["line 7"] and got["short"] == ["line 8"] and got["blank"] == ["line 9"]
    assert got["cut"] == ["line 11"] and report.cut_tokens > 1000
    assert got["special"] == ["line 10"]*2
    assert set(report.special) == {"<|im_end|>", "</s>", "<|im_start|>"}


def test_frequent_replies(here):
    report = check([*numbered(100), *(dict(instruction=f"Q {i}", output="Sorry, no.")
                                      for i in range(30))])
    assert found(report)["often"] == ["30 times 'Sorry, no.'"]


def test_skipped_rows_and_facts(here):
    report = check([*numbered(3, system="Be brief."), dict(instruction="x", output="<nooutput>")])
    assert report.skipped == 1 and report.having["a system message"] == 3
    assert "1 without an answer" in str(report)
    rows = [talk(say("user", "a"), say("assistant", "b", loss=False), say("user", "c"),
                 say("assistant", "d"))]
    report = check(rows)
    assert report.having["replies that are not learned"] == 1 and list(report.replies) == [2]


def test_documents(here):
    (here/"t").mkdir()
    for i in range(3): (here/f"t/{i}.txt").write_text(f"text {i} "*400)
    report = check_data("t", tokenizer=NANO, max_length=64, progress=False)
    assert report.template == "text" and report.documents and report.samples == 3
    assert found(report) == dict(split=["0.txt", "1.txt", "2.txt"])
    assert report.at_lengths()[0]["lost"] == 0 and "continued" in str(report)
    rows = check([dict(text="a b c "*20)]*2)
    assert "conflicts" not in rows.findings and "duplicates" in rows.findings


def test_other_lengths_are_what_training_does(here):
    r = random.Random(0)
    rows = [dict(instruction="word "*r.randrange(1, 60), output="answer "*r.randrange(1, 90))
            for _ in range(200)]
    report = check(rows)
    samples = ftkit.to_messages(ftkit.read_rows("data.jsonl"))
    t = ftkit.template("tokenizer", NANO)
    for n in 64, 100, 128:
        encoded, counted = ftkit.encode_all(samples, t, NANO, n, on_masked="drop", progress=False)
        import numpy as np
        got = at_length(*(np.array(a) for a in (report.lengths, report.first, report.last)), n)
        assert got["useless"] == counted.dropped and got["cut"] == counted.truncated
        assert got["rows"] == len(pack([len(e) for e in encoded], n))
        assert got["fill"] == pytest.approx(sum(map(len, encoded))/got["rows"]/n)


# ------------------------------------------------------------ measures

def test_keys():
    assert text_key("A  b\n") == text_key(" a B") != text_key("ab")
    one = Conversation([Message("user", "x"), Message("assistant", "y")])
    two = Conversation(one, tools=[dict(type="function", function=dict(name="f"))])
    assert sample_keys(one) != sample_keys(two) and sample_keys(one)[0] != 0
    assert sample_keys([Message("text", "x")])[0] == 0
    assert sample_keys([Message("user", "x"), Message("user", "y")]) != \
           sample_keys([Message("user", "x\0user\0y")])


def test_repeats_and_often():
    import numpy as np
    r = random.Random(1)
    keys = np.array([r.randrange(500) for _ in range(2000)], np.uint64)
    groups = repeats(keys)
    assert sum(map(len, groups)) == sum(1 for k in keys if (keys == k).sum() > 1)
    assert [g[0] for g in groups] == sorted(g[0] for g in groups)
    assert repeats(np.array([], np.uint64)) == []
    often = Often(room=50)
    for i in range(5000): often.add("often" if i % 20 == 0 else str(r.random()))
    (n, text), = often.top()
    assert text == "often" and 250 - 5000/50 <= n <= 250 and len(often.kept) <= 50


@pytest.mark.parametrize("lengths", [[1], [7]*5, [1, 100_000], list(range(1, 300)), [12, 13, 999]])
def test_histogram_counts_all(lengths):
    bins = histogram(lengths)
    assert sum(n for *_, n in bins) == len(lengths) and len(bins) <= 25
    for a, b, n in bins: assert n == sum(a <= x <= b for x in lengths)
    assert [a for a, _, _ in bins[1:]] == [b + 1 for _, b, _ in bins[:-1]]


# ------------------------------------------------------------ how it is shown

def test_all_three_views_are_harmless(here):
    evil = "<script>alert(1)</script>[red]\x1b[31m"
    report = check([*[dict(instruction=f"{i}", output=evil) for i in range(9)],
                    dict(instruction="x", **{evil: "y"}), talk(say(evil, "x"))], layout="alpaca")
    file = io.StringIO()
    Console(file=file, width=300).print(report)
    html = report._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html
    for text in file.getvalue(), str(report), html: assert "\x1b" not in text and "[red]" in text
    assert html.count("<td") == html.count("</td>")


def test_as_dict_is_json_and_whole(here):
    report = check([*numbered(5), "{", GOOD, GOOD])
    got = json.loads(json.dumps(report.as_dict()))
    assert got["rows"] == 8 and got["samples"] == 7 and len(got["bad"]) == 1
    assert got["bad"][0]["where"].startswith("data.jsonl, line 6")
    assert got["findings"]["duplicates"]["count"] == 1 and got["messages"]["user"] == 7
    assert [x["max_length"] for x in got["max_lengths"]] == [512, 1024, 2048, 4096, 8192]
    assert got["length"]["min"] == min(report.lengths) and got["tokens"] == sum(report.lengths)
    assert json.loads(json.dumps(DataReport("x", "a", "t", 9).as_dict()))["max_lengths"] == []


def test_picture(here):
    assert len(check(numbered(30)).picture().axes) == 1
    assert check(numbered(1)).picture()


# ------------------------------------------------------------ on the command line

def test_command_exit_codes(here, capsys):
    write([*numbered(5)])
    assert main(["check-custom-dataset", "data.jsonl"]) == 0
    write([*numbered(5), "{"])
    assert main(["check-custom-dataset", "data.jsonl"]) == 1
    assert main(["check-custom-dataset", "data.jsonl", "--skip-bad-rows"]) == 0
    assert "1 of them bad" in capsys.readouterr().out
    write(["{"])
    assert main(["check-custom-dataset", "data.jsonl", "--skip-bad-rows"]) == 1
    assert main(["check-custom-dataset", "lost.jsonl"]) == 1


def test_command_json(here, capsys):
    write([*numbered(5), "{"])
    assert main(["check-custom-dataset", "data.jsonl", "--json", "--max-length", "512"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["max_length"] == 512 and err == ""


# ------------------------------------------------------------ preview

def rows_of(*talks, **how):
    t = ftkit.template("qwen_chat" if how.get("qwen") else "internlm2_chat")
    return make_rows([ftkit.encode(x, t, NANO) for x in talks], 512)


TALK = [Message("system", "Be\nbrief."), Message("user", "Sky? 🌞"), Message("assistant", "Blue.\n\nYes.")]


def test_roles_of_a_packed_row():
    row, = rows_of(TALK, TALK[1:])
    view = preview(row, NANO)
    roles = [t.role for t in view.tokens if t.sample]
    assert [t.sample for t in view.tokens if t.sample] == [1, 2] and len(roles) == 2
    said = {r: "".join(t.text for t in view.tokens if t.role == r) for r in ("system", "user", "assistant")}
    assert "Be\nbrief." in said["system"] and said["user"].count("Sky? 🌞") == 2
    assert said["assistant"].count("Blue.") == 2
    assert {t.role for t in view.tokens if t.learned} == {"assistant"}
    learned = "".join(t.text for t in view.tokens if t.learned)
    assert learned == "Blue.\n\nYes.<|im_end|>"*2
    assert sum(len(t.ids) for t in view.tokens) == len(row)
    lines = str(view).splitlines()
    assert sum("┼" in line for line in lines) == 1 and "   system │ <|im_start|>system⏎" in lines
    html = view._repr_html_()
    assert ">sample 2<" in html and html.count("<span") == html.count("</span>")
    assert html.count("<div") == html.count("</div>") and "· user · not learned" in html


def test_learned_is_not_told_by_colour_alone():
    row, = rows_of(TALK)
    view = preview(row, NANO)
    spans = [(s.style, view.__rich__().plain[s.start:s.end]) for s in view.__rich__().spans]
    underlined = "".join(text for style, text in spans if "underline" in str(style))
    assert underlined == "Blue.⏎⏎Yes.<|im_end|>"
    assert "border-bottom:2px solid" in view._repr_html_()


def test_any_part_of_a_long_row():
    long = [Message("user", "x"), Message("assistant", "word "*12_000)]
    e = ftkit.encode(long, ftkit.template("internlm2_chat"), NANO)
    assert len(e) > 10_000
    view = preview(e, NANO, max_tokens=100, start=5000)
    assert sum(len(t.ids) for t in view.tokens) <= 100 and view.before == 5000
    assert view.before + view.more + sum(len(t.ids) for t in view.tokens) == len(e)
    assert f"{len(e) - 100:,} more tokens not shown" in str(view)
    assert all(t.learned for t in view.tokens)
    assert preview(e, NANO, start=len(e) + 9).more == 0
