"Reading: every kind of file gives back what was written, and damage is named, never passed on."
import bz2
import csv
import gc
import gzip
import io
import json
import lzma
import os
import random
import string
import time
import tracemalloc
import zipfile
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from ftkit.core import FtkitError
from ftkit.data import files, readers
from ftkit.data.files import Source, media_path, read_rows, source
from ftkit.data.readers import read_csv, read_json, read_jsonl, read_text

GOOD = '{"instruction": "a", "output": "b"}'


def zstandard(content): return pa.compress(content, codec="zstd", asbytes=True)


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": zstandard}


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- what was written comes back ------------------------------------------------------------------

names = st.text(string.ascii_letters + "_", min_size=1, max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False,
                                                                allow_infinity=False)
values = st.recursive(scalars | st.text(max_size=30),
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v,
                                                                          max_size=4), max_leaves=8)
json_rows = st.lists(st.dictionaries(st.text(max_size=8), values, max_size=4), min_size=1,
                     max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows=json_rows, escaped=st.booleans(), ends=st.sampled_from(["\n", "\r\n", "\n\n  \n"]),
       last=st.booleans(), bom=st.booleans())
def test_json_lines_come_back(rows, escaped, ends, last, bom):
    text = ends.join(json.dumps(r, ensure_ascii=escaped) for r in rows) + ends*last
    found = list(read_jsonl(io.BytesIO(b"\xef\xbb\xbf"*bom + text.encode()), "x"))
    assert [r for r, _ in found] == rows
    lines = [n for n, line in enumerate(text.split("\n"), 1) if line.strip(" \t\r")]
    assert [place for _, place in found] == [("x, line", n) for n in lines]


@settings(max_examples=60, deadline=None)
@given(rows=json_rows, escaped=st.booleans(), indent=st.sampled_from([None, 0, 3]),
       size=st.sampled_from([1, 2, 5, 17, 100, 2**18]), wrapped=st.booleans())
def test_lists_come_back(rows, escaped, indent, size, wrapped):
    whole = {"version": 1.5e3, "rows": rows, "end": {"of": "it"}} if wrapped else rows
    text = json.dumps(whole, ensure_ascii=escaped, indent=indent)
    found = list(read_json(io.BytesIO(text.encode()), "x", size))
    assert [r for r, _ in found] == rows
    assert [place for _, place in found] == [("x, row", n + 1) for n in range(len(rows))]


cells = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), head=st.lists(names, min_size=2, max_size=5, unique=True),
       delimiter=st.sampled_from(",;\t|"), ends=st.sampled_from(["\n", "\r\n"]),
       bom=st.booleans(), quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_tables_come_back(data, head, delimiter, ends, bom, quoting):
    line = st.lists(cells, min_size=len(head), max_size=len(head)).filter(
        lambda cs: any(c.strip() for c in cs))
    lines = data.draw(st.lists(line, min_size=1, max_size=6))
    if (ends, quoting) == ("\n", csv.QUOTE_MINIMAL):    # a cell "\r" is not quoted: ambiguous
        lines = [[c.replace("\r", "") or "x" for c in cs] for cs in lines]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=ends, quoting=quoting).writerows(
        [head, *lines])
    content = b"\xef\xbb\xbf"*bom + out.getvalue().encode()
    found = [r for r, _ in read_csv(io.BytesIO(content), "x")]
    assert found == [{k: c for k, c in zip(head, cs) if c} for cs in lines]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0\r\ufeff", exclude_categories=["Cs"]),
                    max_size=300), part=st.integers(20, 400))
def test_prose_comes_back(text, part):
    found = [r["text"] for r, _ in read_text(io.BytesIO(text.encode()), "x", part)]
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(len(t) <= part and t.strip() for t in found)
    if len(found) == 1 and len(text) <= part: assert found == [text]


TALKS = [{"instruction": f"Name {i}.", "output": "blue 颜色 \"x\"\n"*(i % 4) + str(i),
          "messages": [{"role": "user", "content": "a"*i, "loss": None}]} for i in range(40)]
PLAIN = [{k: r[k] for k in ("instruction", "output")} for r in TALKS]


def contents():
    "The same rows in every kind of file."
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in TALKS).encode()
    table, out = pa.Table.from_pylist(TALKS), {}
    out["a.jsonl"] = out["a.ndjson"] = out["lines.json"] = lines
    out["a.json"] = out["list.jsonl"] = json.dumps(TALKS, indent=1).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, ["instruction", "output"])
    writer.writeheader()
    writer.writerows(PLAIN)
    out["a.csv"] = text.getvalue().encode()
    for compression in "snappy", "none":
        file = io.BytesIO()
        pq.write_table(table, file, row_group_size=15, compression=compression)
        out[f"{compression}.parquet"] = file.getvalue()
    for name, make in ("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file):
        file = io.BytesIO()
        with make(file, table.schema) as w: w.write_table(table, max_chunksize=15)
        out[name] = file.getvalue()
    return out


CONTENTS = contents()


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_and_wrapping(name, ending, tmp_path):
    path = put(tmp_path/(name + ending), PACK[ending](CONTENTS[name]))
    rows = read_rows(path)
    assert rows == (PLAIN if name == "a.csv" else TALKS)
    assert rows.place(0).startswith(f"{path}, ") and len(rows.places) == len(rows) == 40
    with zipfile.ZipFile(tmp_path/"a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr(f"in/{path.name}", path.read_bytes())
    assert read_rows(tmp_path/"a.zip") == rows
    assert read_rows(path, limit=3) == rows[:3]


def test_packed_files_in_several_pieces(tmp_path):
    "Tools that append write one packed piece after the other."
    for ending in ".gz", ".bz2", ".xz", ".zst":
        pieces = [PACK[ending](f'{{"text": "{i}"}}\n'.encode()) for i in range(3)]
        assert len(read_rows(put(tmp_path/f"a.jsonl{ending}", b"".join(pieces)))) == 3


def test_kinds_by_upper_case_names(tmp_path):
    assert read_rows(put(tmp_path/"A.V2.JSONL.GZ", gzip.compress(GOOD.encode())))


# --- damage ---------------------------------------------------------------------------------------

SQUARES = '{"a": ' + "["*50_000
BAD = {
    "a cut line": ("x.jsonl", f'{GOOD}\n\n{{"output": "a', "x.jsonl, line 3, column 12: .*cut short"),
    "a cut word": ("x.jsonl", f'{GOOD}\n{{"output": tr', "x.jsonl, line 2, column 12: .*cut short"),
    "a broken line": ("x.jsonl", f'{{"a": "b\n{GOOD}\n', "line 1, column 9: .*never closed. Repair"),
    "a cut list": ("x.json", f'[{GOOD},\n{{"output": "a', "x.json, line 2, column 12: .*row 2.*cut"),
    "a list without end": ("x.json", f"[{GOOD}", "in row 1: expecting ','.*cut short"),
    "a comma too many": ("x.json", f"[{GOOD},]", "line 1, column 38: .*comma after the last row"),
    "two lists": ("x.json", '{"a": [], "b": []}', "2 lists and the keys 'a', 'b'"),
    "columns": ("x.json", '{"text": {"0": "a"}}', "0 lists and the keys 'text'.*one a line.*orient='records'"),
    "a list, then more": ("x.json", f"[{GOOD}]\n[{GOOD}]", "x.json, line 2, column 1: .*extra data.*one JSON"),
    "a row of numbers": ("x.json", "[3]", "x.json, row 1: expected an object .*found int"),
    "a row that is null": ("x.json", "[null]", "x.json, row 1: expected an object .*found null"),
    "null": ("x.jsonl", "null", "x.jsonl, line 1: expected an object, found null"),
    "a list for a row": ("x.jsonl", f"{GOOD}\n[1]", "x.jsonl, line 2: expected an object .* list"),
    "Latin-1": ("x.jsonl", f'{GOOD}\n{{"text": "café"}}'.encode("latin-1"),
                "x.jsonl, line 2: not UTF-8 text: byte 14 of the line is 0xe9"),
    "GBK": ("x.jsonl", '{"text": "颜色"}'.encode("gbk"), "line 1: not UTF-8 .* byte 11 .*0xd1"),
    "Latin-1 in a list": ("x.json", f'[{GOOD},\n{{"text": "café"}}]'.encode("latin-1"),
                          "x.json, line 2, row 2: the column 'text' holds the byte 0xe9"),
    "Latin-1 outside of texts": ("x.json", b"[\xe9]", "x.json, line 1, column 2: not UTF-8 text"),
    "Latin-1 in a table": ("x.csv", "a,b\nq,café\n".encode("latin-1"),
                           "x.csv, line 2: the column 'b' holds the byte 0xe9"),
    "Latin-1 in prose": ("x.txt", "a\ncafé".encode("latin-1"), "x.txt, line 2: .*byte 0xe9"),
    "UTF-16": ("x.jsonl", GOOD.encode("utf-16"), "x.jsonl: this is UTF-16 text. Save it as UTF-8"),
    "UTF-16 without mark": ("x.json", GOOD.encode("utf-16-be"), "x.json: this is UTF-16 text"),
    "NUL bytes": ("x.jsonl", GOOD.encode() + b"\n\0\0\0\0", "x.jsonl, line 2, column 1: NUL bytes"),
    "NUL in a text": ("x.jsonl", b'{"text": "a\0b"}', "line 1, column 12: NUL bytes"),
    "NUL in a list": ("x.json", b'[{"text": "a\0b"}]', "line 1, column 13: NUL bytes in row 1"),
    "NUL in a table": ("x.csv", b"a,b\n1,\0", "x.csv, line 2: the column 'b' holds a NUL"),
    "NUL in prose": ("x.md", b"a\n\n\0", "x.md, line 3: a NUL byte"),
    "only NUL": ("x.jsonl", bytes(5000), "x.jsonl, line 1, column 1: NUL bytes"),
    "NaN": ("x.jsonl", '{"a": 1, "input": NaN}', "line 1: the column 'input' holds NaN"),
    "Infinity": ("x.json", '[{"a": -Infinity}]', "row 1: the column 'a' holds -Infinity"),
    "half an emoji": ("x.jsonl", '{"m": [{"c": "\\ud83d"}]}', r"line 1: the column 'm\[0\].c' .*half"),
    "half an emoji in a name": ("x.json", '[{"\\ude00": 1}]', "row 1: the column .* half a char"),
    "a key twice": ("x.jsonl", '{"m": {"a": 1, "a": 2}}', "line 1: the key 'a' occurs twice"),
    "a key twice in a list": ("x.json", '[{"a": 1, "a": 2}]', "row 1: the key 'a' occurs twice"),
    "too deep": ("x.jsonl", SQUARES, "x.jsonl, line 1: nested too deeply"),
    "too deep in a list": ("x.json", f"[{SQUARES}", "x.json, line 1, column 2: nested too deeply"),
    "endless digits": ("x.jsonl", f'{{"a": {"1"*5000}}}', "line 1: not valid JSON: .*digits"),
    "endless digits in a list": ("x.json", f'[{{"a": {"1"*5000}}}]', "line 1.*digits"),
    "Python, not JSON": ("x.jsonl", "{'a': 'b'}", "line 1, column 2: .*double quotes; json.dumps"),
    "nothing": ("x.jsonl", "", "there are no rows"),
    "a byte order mark": ("x.jsonl", b"\xef\xbb\xbf", "there are no rows"),
    "blank lines": ("x.json", " \n\n", "there are no rows"),
    "an empty list": ("x.json", "[]", "there are no rows"),
    "a header": ("x.csv", "a,b\n", "there are no rows"),
    "blank prose": ("x.txt", " \n", "there are no rows"),
    "too many cells": ("x.csv", "a,b\n1,2\n1,2,3\n", "x.csv, line 3: found 3 cells.* names 2"),
    "too few cells": ("x.tsv", "a\tb\n1\n", "x.tsv, line 2: found 1 cells, and the header names 2"),
    "a column twice": ("x.csv", "a,a\n1,2", "x.csv, line 1: two columns are called 'a'"),
    "a column without name": ("x.csv", "a,\n1,2", "x.csv, line 1: column 2 has no name"),
    "open quotes": ("x.csv", 'a,b\n1,"2\n3,4\n', "x.csv, line 2: quotes are opened and never"),
    "quotes inside": ("x.csv", 'a,b\n"1"x,2\n', "x.csv, line 2: not a row of a table"),
    "a web page": ("x.json", "<!DOCTYPE html><html>", "x.json: this is a web page"),
    "a pointer": ("x.jsonl", "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "a picture": ("x.txt", b"\x89PNG\r\n\x1a\n", "x.txt: this is a picture"),
    "random bytes": ("x.jsonl", random.Random(0).randbytes(999), "x.jsonl, line 1: not UTF-8 text"),
    "gzip under another name": ("x.jsonl", gzip.compress(b"{}"), "x.jsonl: this is a gzip file"),
    "Parquet under another name": ("x.jsonl", CONTENTS["none.parquet"], "this is a Parquet file"),
    "not gzip": ("x.jsonl.gz", GOOD, "x.jsonl.gz: cannot be read: Not a gzipped file"),
    "not bzip2": ("x.jsonl.bz2", GOOD, "x.jsonl.bz2: cannot be read: Invalid data stream"),
    "not xz": ("x.jsonl.xz", GOOD, "x.jsonl.xz: cannot be unpacked"),
    "not Zstandard": ("x.jsonl.zst", GOOD, "x.jsonl.zst: cannot be read: ZSTD"),
    "not zip": ("x.zip", GOOD, "x.zip: cannot be unpacked: File is not a zip file"),
    "not Parquet": ("x.parquet", GOOD*9, "x.parquet: the end of the Arrow stream is missing"),
    "empty Parquet": ("x.parquet", b"", "x.parquet: damaged after row 0"),
    "empty gzip": ("x.jsonl.gz", b"", "there are no rows"),
    "something packed": ("x.gz", gzip.compress(b"{}"), "doesn't say what is packed.*data.jsonl.gz"),
    "an unknown kind": ("x.xlsx", "a", "'.xlsx' are not read; expected .json, .jsonl.*to_json"),
    "no ending": ("x", "a", "files without an ending are not read"),
}


@pytest.mark.parametrize("name", BAD)
def test_damage_is_named(name, tmp_path):
    file, content, match = BAD[name]
    path = put(tmp_path/file, content)
    with pytest.raises(FtkitError, match=match) as e: read_rows(path)
    assert "\n" not in str(e.value) and str(e.value).endswith((".", "?")) and file in str(e.value)
    str(e.value).encode()


def test_what_is_odd_and_still_data(tmp_path):
    for name, content, rows in (
            ("a.jsonl", '\ufeff{"a": "\u2028\x85"}\r\n \t\r\n{"b": "\\u0000"}',
             [{"a": "\u2028\x85"}, {"b": "\0"}]),
            ("b.jsonl", '{"a": "\\ud83d\\ude00"}\n\ufeff{"a": "cat a b"}', None),
            ("c.csv", ",text\n0,a\n1,b\n", [{"text": "a"}, {"text": "b"}]),
            ("d.csv", "\ufeff\r\na ;b\r\n;\r\n;x\r\n", [{"b": "x"}]),
            ("e.txt", "\ufeffa\r\nb", [{"text": "a\nb"}]),
            ("page.txt", "<html>", [{"text": "<html>"}]),
            ("f.json", '\ufeff {"a": 1}\n\n {"a": 2}\n', [{"a": 1}, {"a": 2}]),
            ("g.json", '{"data": [{"a": [1]}]}', [{"a": [1]}]),
            ("h.jsonl", f'\n [{GOOD}]', [json.loads(GOOD)])):
        rows = rows or [{"a": "\U0001f600"}, {"a": "cat a b"}]
        assert read_rows(put(tmp_path/name, content)) == rows, name


def test_bad_rows_are_skipped_only_when_asked(tmp_path):
    path = put(tmp_path/"a.jsonl", b'{"n": 1}\n{"n": \n[2]\n{"n": "\xe9"}\n{"n": NaN}\n{"n": 3}\n')
    with pytest.raises(FtkitError, match="a.jsonl, line 2"): list(source(path))
    made = source(path, skip_bad_rows=True)
    for _ in range(2):
        assert [r for r, _ in made] == [{"n": 1}, {"n": 3}]
        assert [e.where.split(", ", 1)[1] for e in made.bad] == ["line 2, column 8", "line 3",
                                                                 "line 4", "line 5"]
    assert made.head(1) == [{"n": 1}] and not made.bad
    rows = read_rows(path, skip_bad_rows=True)
    assert rows.skipped == 4 and rows.place(1) == f"{path}, line 6"
    for error in made.bad: assert not (error.__cause__ or error.__context__ or error.__traceback__)
    put(path, "[1]\nx\n\n3")
    path = put(tmp_path/"b.jsonl", "1\nx")
    with pytest.raises(FtkitError, match="none of its 2 rows can be read; the first: .*found int"):
        read_rows(path, skip_bad_rows=True)


def test_skipping_in_lists_and_tables(tmp_path):
    path = put(tmp_path/"a.json", b'[{"n": 1}, 2, {"n": "\xe9"}, {"n": NaN}, {"n": 3}]')
    made = source(path, skip_bad_rows=True)
    assert [r for r, _ in made] == [{"n": 1}, {"n": 3}] and len(made.bad) == 3
    path = put(tmp_path/"a.csv", b'a,b\n1,2\n"3"x,4\n5\n\xe9,6\n"7\n"x,8\n9,9')
    made = source(path, skip_bad_rows=True)
    assert [r["a"] for r, _ in made] == ["1", "9"] and len(made.bad) == 4
    assert "line 6 to 7: not a row" in str(made.bad[-1])


@pytest.mark.parametrize("name, content", [
    ("a.json", f"[{GOOD}, {{"), ("a.jsonl.gz", gzip.compress(GOOD.encode()*99)[:-9]),
    ("a.csv", 'a,b\n1,2\n"3,4\n'), ("a.parquet", CONTENTS["none.parquet"][:-9])])
def test_the_rest_of_a_file_is_never_skipped(name, content, tmp_path):
    with pytest.raises(FtkitError): read_rows(put(tmp_path/name, content), skip_bad_rows=True)


def test_errors_that_are_kept_hold_no_rows(tmp_path):
    put(tmp_path/"a.jsonl", GOOD + "\n" + ('{"text": ' + "x"*10_000 + "\n")*300)
    gc.collect()
    tracemalloc.start()
    made = source(tmp_path/"a.jsonl", skip_bad_rows=True)
    assert sum(1 for _ in made) == 1 and len(made.bad) == 300
    assert tracemalloc.get_traced_memory()[0] < 1e6
    tracemalloc.stop()


def test_no_permission(tmp_path, monkeypatch):
    path = put(tmp_path/"a.jsonl", GOOD)
    def refuse(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setitem(files.__dict__, "open", refuse)
    for use in lambda: list(source(path)), source(path).fingerprint:
        with pytest.raises(FtkitError, match="a.jsonl: cannot be read: Permission denied"): use()


def test_a_very_long_line(tmp_path, monkeypatch):
    with open(tmp_path/"a.jsonl", "wb") as f:
        f.write(b'{"text": "' + b"sky "*25_000_000 + b'"}\n{"text": "b"}\n')
    assert [len(r["text"]) for r, _ in source(tmp_path/"a.jsonl")] == [100_000_000, 1]
    monkeypatch.setattr(readers, "LONGEST", 1000)
    text = json.dumps([{"text": "a"}, {"text": "b"*600_000}])
    for name, content in (("b.jsonl", text[1:-1].replace(", {", "\n{")), ("b.json", text)):
        with pytest.raises(FtkitError, match="b.json"):
            for row, _ in source(put(tmp_path/name, content)): assert row == {"text": "a"}


# --- mutations ------------------------------------------------------------------------------------

def mutate(content, rng):
    content, kind = bytearray(content), rng.choice("cut flip flip zero drop insert".split())
    at = rng.randrange(len(content))
    if kind == "cut": return bytes(content[:at]), kind
    if kind == "flip":
        for _ in range(rng.choice([1, 2, 20])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zero": content[at:at + 20] = bytes(rng.randrange(25))
    elif kind == "drop": del content[at:at + rng.randrange(1, 40)]
    else: content[at:at] = rng.randbytes(rng.randrange(1, 10))
    return bytes(content), kind


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "a.json", "a.csv", "none.parquet",
                                  "snappy.parquet", "stream.arrow", "file.arrow", "a.jsonl.gz",
                                  "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.zip"])
def test_mutated_files_give_errors_of_ours(name, tmp_path):
    rng, path = random.Random(name), tmp_path/name
    content = CONTENTS.get(name)
    if name == "a.zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("a.jsonl", CONTENTS["a.jsonl"])
        content = path.read_bytes()
    elif content is None: content = PACK[path.suffix](CONTENTS["a.jsonl"])
    for i in range(60):
        mutated, kind = mutate(content, rng)
        path.write_bytes(mutated)
        for skip in False, True:
            try: found = [r for r, _ in source(path, skip)]
            except FtkitError as e:
                assert "\n" not in str(e) and str(path) in str(e)
                continue
            assert all(isinstance(r, dict) for r in found)
            if kind != "cut" or skip: continue
            # only between two rows can a cut go unnoticed, and in the last cell of a table
            whole = PLAIN if name == "a.csv" else TALKS
            assert name in ("a.jsonl", "lines.json", "a.csv"), "a cut was not noticed"
            assert found[:-1] == whole[:len(found) - 1]
            if name != "a.csv": assert found == whole[:len(found)]
            else: assert whole[len(found) - 1]["output"].startswith(found[-1].get("output", ""))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_every_cut(name):
    content = CONTENTS[name][:2500] if name == "a.jsonl" else json.dumps(TALKS[:8]).encode()
    read = read_jsonl if name == "a.jsonl" else read_json
    for cut in range(1, len(content)):
        try:
            found = [r for r, _ in read(io.BytesIO(content[:cut]), "x")]
            if bad := [r for r in found if isinstance(r, FtkitError)]: raise bad[0]
        except FtkitError: continue
        assert name == "a.jsonl" and found == TALKS[:len(found)] and content[:cut][-2:] in (
            b"}]", b"]}", b"}\n")


# --- which files ----------------------------------------------------------------------------------

def texts(path): return [r["text"] for r, _ in source(path)]


def test_folders_and_patterns(tmp_path):
    for name in ("b.jsonl", "a/c.jsonl", "a/b/d.jsonl.gz", ".hidden.jsonl", ".git/x.jsonl",
                 "a/__MACOSX/x.jsonl", "README.md", "LICENSE.txt", "a/dataset_info.json",
                 "a/state.json", "notes.docx", "z.png"):
        content = json.dumps({"text": name}).encode()
        put(tmp_path/name, gzip.compress(content) if name.endswith("gz") else content)
    every = ["a/b/d.jsonl.gz", "a/c.jsonl", "b.jsonl"]
    made = source(tmp_path)
    assert texts(tmp_path) == every and [f.relative_to(tmp_path).as_posix()
                                         for f in made.files] == every
    assert made.root == tmp_path and repr(made) == f"Source({str(tmp_path)!r}, 3 files)"
    assert texts(f"{tmp_path}/*") == ["b.jsonl"] and texts(f"{tmp_path}/**/*.jsonl") == every[1:]
    assert texts(f"{tmp_path}/a/[a-c].jsonl") == ["a/c.jsonl"]
    assert source(f"{tmp_path}/a/[a-c].jsonl").root == tmp_path/"a"
    assert source(tmp_path/"b.jsonl").root == tmp_path
    for path, match in ((tmp_path/"none.json", "there is no such file or folder"),
                        (f"{tmp_path}/*.parquet", "no data file matches this pattern"),
                        (tmp_path/"a/__MACOSX/../../.git", None)):
        if match is None: assert texts(path)
        else:
            with pytest.raises(FtkitError, match=match): source(path)
    (tmp_path/"empty").mkdir()
    with pytest.raises(FtkitError, match="no data file in this folder; looked for .json"):
        source(tmp_path/"empty")
    put(tmp_path/"sp [1].jsonl", '{"text": "brackets"}')
    assert texts(tmp_path/"sp [1].jsonl") == ["brackets"]       # a file before a pattern
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path/"pipe.jsonl")
        with pytest.raises(FtkitError, match="neither a file nor"): source(tmp_path/"pipe.jsonl")


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path/"a.jsonl", '{"text": "home"}')
    assert texts("~/a.jsonl") == texts("~/*.jsonl") == ["home"]


def test_splits_are_not_mixed(tmp_path):
    for name in "train-00.jsonl", "train-01.jsonl": put(tmp_path/name, '{"text": "a"}')
    assert len(texts(tmp_path)) == 2
    put(tmp_path/"test.jsonl", '{"text": "secret"}')
    with pytest.raises(FtkitError, match=r"several splits \(test.jsonl, train-00.jsonl\)"):
        source(tmp_path)
    assert texts(f"{tmp_path}/train*") == ["a", "a"]
    with zipfile.ZipFile(tmp_path/"a.zip", "w") as z:
        for name in "train/a.csv", "validation/a.csv": z.writestr(name, "text\na")
    with pytest.raises(FtkitError, match="this archive holds several splits"):
        read_rows(tmp_path/"a.zip")


def test_archives_stay_closed(tmp_path):
    inside = tmp_path/"in"
    with zipfile.ZipFile(put(inside/"a.zip", b""), "w") as z:
        for name in "../../evil.jsonl", "/abs.jsonl", "a\nb.jsonl", "__MACOSX/x.jsonl", "x.exe":
            z.writestr(name, f'{{"text": {json.dumps(name)}}}')
        z.writestr("deep/b.jsonl.gz", gzip.compress(b'{"text": "packed"}'))
        z.writestr("deep/none/", "")
    before = sorted(tmp_path.rglob("*"))
    assert texts(inside/"a.zip") == ["../../evil.jsonl", "/abs.jsonl", "a\nb.jsonl", "packed"]
    assert before == sorted(tmp_path.rglob("*")) and not Path("/abs.jsonl").exists()
    assert all("\n" not in where for _, (where, _) in source(inside/"a.zip"))
    with zipfile.ZipFile(inside/"b.zip", "w") as z: z.writestr("x.exe", "")
    with pytest.raises(FtkitError, match="no data file in this archive"): read_rows(inside/"b.zip")


def test_prose_in_parts(tmp_path):
    paragraph = "The sky is blue. "*60 + "\n\n"
    path = put(tmp_path/"long.txt", paragraph*2000)
    rows = read_rows(path)
    assert len(rows) > 1 and "".join(r["text"] for r in rows) == paragraph*2000
    assert all(len(r["text"]) <= 2**20 and r["text"].endswith("\n\n") for r in rows)
    assert rows.place(1) == f"{path}, part 2"
    assert read_rows(put(tmp_path/"short.md", "# A")).places == [(str(tmp_path/"short.md"), None)]


def test_built_in(tmp_path):
    made = source("builtin:colors/test")
    assert made.root is None and made.files == [] and len(list(made)) == len(list(made)) > 100
    assert made.head(2).place(1) == "builtin:colors/test, row 2"
    with pytest.raises(FtkitError, match="Did you mean 'colors/train'"):
        read_rows("builtin:colours/train")


# --- a source is read one row at a time -----------------------------------------------------------

def big_files(folder, rows, long=400):
    row = {"instruction": "Name a sky. "*10, "output": "The sky is blue. 颜色 "*long}
    lines = [json.dumps({**row, "n": i}, ensure_ascii=False) for i in range(rows)]
    yield put(folder/"a.jsonl", "\n".join(lines))
    yield put(folder/"a.json", "[" + ",\n".join(lines) + "]")
    yield put(folder/"w.json", '{"rows": [' + ",".join(lines) + "]}")
    with open(folder/"a.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([list(row), *[row.values()]*rows])
    yield folder/"a.csv"
    yield put(folder/"a.txt", "\n".join(lines))
    pq.write_table(pa.Table.from_pylist([row]*rows), folder/"a.parquet", row_group_size=1000)
    yield folder/"a.parquet"


def test_memory_does_not_grow(tmp_path):
    peaks = []
    for rows in 600, 1_800:             # 6 and 18 MB
        peaks.append([])
        for path in big_files(tmp_path/str(rows), rows):
            gc.collect()
            tracemalloc.start()
            for row, place in source(path): pass
            peaks[-1].append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    for small, large in zip(*peaks): assert large < small + 2e5 and large < 25e6


def test_speed(tmp_path):
    "As fast as `json.loads` on each line; a machine that is busy gets some slack."
    path = next(big_files(tmp_path, 10_000, 40))
    def clock(work):
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)
    def plainly():
        with open(path, "rb") as f:
            for line in f: json.loads(line)
    assert clock(lambda: [None for _ in source(path)]) < 2*clock(plainly)


def test_head_reads_no_further(tmp_path):
    path = put(tmp_path/"a.jsonl", f"{GOOD}\n{GOOD}\nbroken")
    assert len(source(path).head(2)) == len(read_rows(path, limit=2)) == 2
    with pytest.raises(FtkitError, match="line 3"): source(path).head(3)
    made = source(path)
    first, second = iter(made), iter(made)
    assert next(first)[1] == next(second)[1] == (f"{path}, line", 1)


def test_fingerprint(tmp_path, monkeypatch):
    a, b = put(tmp_path/"a.jsonl", "1"), put(tmp_path/"x/other.jsonl", "1")
    mark = source(a).fingerprint()
    assert mark == source(b).fingerprint() and len(mark) == 32
    assert mark != source(put(tmp_path/"a.json", "1")).fingerprint()    # read in another way
    assert mark != source(put(b, "2")).fingerprint()
    f = tmp_path/"f"
    put(f/"a.jsonl", "12"), put(f/"b.jsonl", "3")
    mark = source(f).fingerprint()
    put(f/"a.jsonl", "1"), put(f/"b.jsonl", "23")
    assert mark != source(f).fingerprint()
    monkeypatch.setattr(files, "LARGE", 10)
    put(a, bytes(range(250))*4000)
    mark = source(a).fingerprint()
    assert mark == source(a).fingerprint()
    os.utime(a, ns=(5, 5))
    assert mark != (touched := source(a).fingerprint())
    put(a, bytes(range(250))*3999 + bytes(250))
    os.utime(a, ns=(5, 5))
    assert touched != source(a).fingerprint()
    assert source("builtin:colors").fingerprint() != source("builtin:small_talk").fingerprint()


# --- the hub --------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub with one data set, and a list of what was asked of it."
    import datasets
    asked = []
    def load_dataset(*args, **options):
        asked.append((args, options))
        if args[0] != "owner/set": raise FileNotFoundError(f"'{args[0]}' doesn't exist\non the hub")
        if options["split"] != "train": raise ValueError(f'Unknown split "{options["split"]}".')
        made = datasets.Dataset.from_list([{"text": "a", "n": None}, {"text": "b", "n": 1}])
        return made.to_iterable_dataset() if options["streaming"] else made
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub(hub):
    assert read_rows("hub:owner/set") == [{"text": "a", "n": None}, {"text": "b", "n": 1}]
    rows = read_rows("hub:owner/set:small@train", limit=1)
    assert rows == [{"text": "a", "n": None}]
    assert rows.place(0) == "hub:owner/set:small@train, row 1"
    assert hub == [(("owner/set", None), dict(split="train", streaming=False)),
                   (("owner/set", "small"), dict(split="train", streaming=True))]
    assert source("hub:owner/set").fingerprint() == source("hub:owner/set").fingerprint()
    assert source("hub:owner/set").root is None
    for name, match in (("hub:owner/none", "hub:owner/none: .*'owner/none' doesn't exist. "),
                        ("hub:owner/set@test", 'Unknown split "test"'),
                        ("hub:", "expected hub:owner/name"), ("hub:a@", "expected hub:owner")):
        with pytest.raises(FtkitError, match=match) as e: read_rows(name)
        assert "\n" not in str(e.value)


def test_hub_through_datasets(tmp_path, monkeypatch):
    "A folder stands in for a repository of the hub."
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")
    put(tmp_path/"repo/train.jsonl", f"{GOOD}\n{GOOD}\n")
    put(tmp_path/"repo/test.jsonl", f"{GOOD}\n")
    made = source(f"hub:{tmp_path}/repo")
    assert [r for r, _ in made] == [json.loads(GOOD)]*2 and len(made.head(1)) == 1
    assert len(read_rows(f"hub:{tmp_path}/repo@test")) == 1
    assert made.fingerprint() == source(f"hub:{tmp_path}/repo").fingerprint()
    with pytest.raises(FtkitError, match="can't be read"): read_rows(f"hub:{tmp_path}/none")


def test_a_saved_dataset_is_a_folder(tmp_path):
    import datasets
    datasets.Dataset.from_list(TALKS).save_to_disk(tmp_path/"one")
    assert read_rows(tmp_path/"one") == TALKS
    datasets.DatasetDict(train=datasets.Dataset.from_list(TALKS), test=datasets.Dataset.from_list(
        TALKS)).save_to_disk(tmp_path/"two")
    with pytest.raises(FtkitError, match="several splits"): read_rows(tmp_path/"two")
    assert read_rows(tmp_path/"two/train") == TALKS


# --- paths inside of data -------------------------------------------------------------------------

ROOT_PARTS = st.sampled_from(["..", ".", "", "a", "out", "in", "loop", "etc", "~", "C:", "\\", "/",
                              "\\..", "...", "http:", "file:", "a b", "颜"])


@pytest.fixture(scope="module")
def media_root(tmp_path_factory):
    base = tmp_path_factory.mktemp("media")
    root = base/"root"
    (root/"a").mkdir(parents=True)
    (base/"secret.txt").write_text("secret")
    (root/"out").symlink_to(base)
    (root/"in").symlink_to(root/"a")
    (root/"loop").symlink_to(root/"loop")
    return root


@settings(max_examples=300, deadline=None)
@given(path=st.lists(ROOT_PARTS, min_size=1, max_size=5).map("/".join) | st.text(max_size=12))
def test_paths_stay_in_their_folder(media_root, path):
    try: found = media_path(media_root, path)
    except FtkitError: return
    assert found.is_relative_to(media_root.resolve()) and found == found.resolve()


def test_paths_by_name(media_root):
    for good in "a/cat.jpg", "in/cat.jpg", "./a/x", "a/...", "~/x", "颜.png":
        assert media_path(media_root, good).is_relative_to(media_root.resolve())
    for bad, match in (("../x", "'..'"), ("a/../../x", "'..'"), ("a\\..\\..\\x", "'..'"),
                       ("/etc/passwd", "absolute"), ("\\\\host\\x", "absolute"), ("C:/x", "drive"),
                       ("out/secret.txt", "a link"), ("http://a/b.png", "address"),
                       ("data:image/png;base64,", "address"), ("file:///etc", "address"),
                       ("", "expected the path"), (None, "expected the path"), ("\0", "expected")):
        with pytest.raises(FtkitError, match=match): media_path(media_root, bad)
    with pytest.raises(FtkitError, match="no folder"): media_path(None, "a.jpg")
    with pytest.raises(FtkitError, match="expected a path"): source("")


def test_it_is_one_type():
    assert isinstance(source("builtin:colors"), Source)
