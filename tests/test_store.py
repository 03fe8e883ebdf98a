"Data that is encoded once: what is kept, what makes it another, and what happens when things break."
import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ftkit
from ftkit.core import FtkitError
from ftkit.data import store as store_room
from ftkit.data.dataset import DataConfig, load_data
from ftkit.data.encode import IGNORE
from ftkit.data.files import Source
from ftkit.data.mixture import LazyRows, draw, hold_out, plan_rows
from ftkit.data.packing import collate
from ftkit.data.store import (StoreWriter, arrays_of, clear_cache, key_of, stored,
                              tokenizer_print)
from ftkit.data.tokens import EncodedBatch
from ftkit.nano.base import nano_path
from ftkit.sft import SupervisedTuning
from ftkit.training.loop import Trainer
from ftkit.training.plan import TrainConfig
from ftkit.training.run import Callback

ROOT = Path(__file__).parent.parent
NANO = AutoTokenizer.from_pretrained(nano_path())


def fresh(): return AutoTokenizer.from_pretrained(nano_path())


def write(path, n=40, start=0):
    "Questions and answers of uneven length."
    rows = [dict(instruction=f"Count to {i}.", output=" ".join(map(str, range(i % 17 + 1))))
            for i in range(start, start + n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def file(tmp_path): return write(tmp_path/"data.jsonl")


def load(path, cache, tokenizer=NANO, **options):
    "A data set and what was said about it."
    with contextlib.redirect_stderr(io.StringIO()) as told:
        data = load_data(DataConfig(str(path), cache=str(cache), **options), tokenizer)
    data.told = told.getvalue()
    return data


def entries(cache): return sorted(p.parent.name for p in Path(cache).glob("*/meta.json"))


# --- what goes in comes out -----------------------------------------------------------------------

@st.composite
def encoded_batches(draw):
    out, source = [], 0
    for _ in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 9), max_size=5))
        n = sum(lengths)
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n))
        marks = draw(st.lists(st.integers(0, 255), min_size=n, max_size=n))
        places = draw(st.sets(st.integers(0, n - 1))) if n else ()
        odd = [(p, 7) for p in sorted(places) if marks[p] >= 128]
        sources = [source := source + draw(st.integers(0, 2)) for _ in lengths]
        weights = draw(st.lists(st.sampled_from([1., .5]), min_size=len(lengths),
                                max_size=len(lengths)))
        out.append(EncodedBatch(np.array(ids, np.int32), np.array(marks, np.uint8),
                                np.cumsum([0, *lengths]), np.array(sources, np.int64),
                                np.array(weights, np.float32), odd))
    return out


@settings(max_examples=60, deadline=None)
@given(batches=encoded_batches())
def test_a_store_gives_back_what_was_put_in(batches, tmp_path_factory):
    memory, files, folder = StoreWriter(), StoreWriter(), tmp_path_factory.mktemp("s")/"store"
    for b in batches: memory.add(b)
    wanted = [e for b in batches for e in b]
    stores = [memory.in_memory({}), store_room._write(files, iter(batches), {}, folder)]
    for s in stores:
        assert len(s) == len(wanted) and list(s) == wanted
        assert s.lengths.tolist() == [len(e) for e in wanted]
        assert s.learned.tolist() == [e.learned for e in wanted]
    if wanted: assert stores[0][-1] == wanted[-1] and stores[1][-len(wanted)] == wanted[0]
    shutil.rmtree(folder)


def test_digests_know_duplicates_and_parts():
    ids = np.array([1, 2, 1, 2, 3, 4, 5], np.int32)
    b = EncodedBatch(ids, np.zeros(7, np.uint8), np.array([0, 2, 4, 6, 7]), np.array([0, 1, 2, 2]),
                     np.ones(4, np.float32), [])
    writer = StoreWriter()
    writer.add(b)
    writer.add(EncodedBatch(ids[4:6], np.zeros(2, np.uint8), np.array([0, 2]), np.array([2]),
                            np.ones(1, np.float32), []))        # goes on in the next batch
    a, same, long, part, more = writer.in_memory({}).digests.tolist()
    assert a == same != long == part == more


# --- kept by content ------------------------------------------------------------------------------

OTHER = {"template": dict(template="qwen_chat"), "max_length": dict(max_length=100),
         "learn": dict(learn="last"), "system": dict(system="Be brief."), "long": dict(long="drop"),
         "context": dict(long="split", context=4), "on_masked": dict(on_masked="drop"),
         "skip_bad_rows": dict(skip_bad_rows=True), "max_samples": dict(max_samples=20),
         "layout": dict(layout="alpaca")}
SAME = {"packing": dict(packing=False), "eval_fraction": dict(eval_fraction=.2),
        "weights": dict(weights=(2,)), "seed": dict(draw_seed=5), "workers": dict(workers=0),
        "group_by_length": dict(group_by_length=True)}


def test_a_second_start_reads_nothing_and_says_so(file, tmp_path, monkeypatch):
    first = load(file, tmp_path/"cache")
    assert not first.cached and "cache" not in first.told
    monkeypatch.setattr(Source, "__iter__", None)
    monkeypatch.setattr(Source, "head", None)
    again = load(file, tmp_path/"cache")
    assert again.cached and f"{len(first.encoded)} encoded samples come from the cache" in again.told
    assert list(again.encoded) == list(first.encoded) and again.report == first.report
    assert again.statistics == first.statistics and repr(again) == repr(first)
    assert [r.ids.tolist() for r in again.rows] == [r.ids.tolist() for r in first.rows]
    monkeypatch.undo()
    assert again.samples == first.samples and again.samples.places == first.samples.places


@pytest.mark.parametrize("name", OTHER)
def test_whatever_decides_the_ids_makes_another_store(file, tmp_path, name):
    load(file, tmp_path/"cache")
    assert not load(file, tmp_path/"cache", **OTHER[name]).cached
    assert len(entries(tmp_path/"cache")) == 2
    assert load(file, tmp_path/"cache", **OTHER[name]).cached and load(file, tmp_path/"cache").cached


@pytest.mark.parametrize("name", SAME)
def test_whatever_does_not_decide_them_reads_the_same(file, tmp_path, name):
    load(file, tmp_path/"cache")
    assert load(file, tmp_path/"cache", **SAME[name]).cached


def test_the_seed_decides_where_samples_are_drawn(file, tmp_path):
    load(file, tmp_path/"cache", max_samples=20)
    assert not load(file, tmp_path/"cache", max_samples=20, draw_seed=1).cached


def test_content_decides_and_not_the_name(file, tmp_path):
    load(file, tmp_path/"cache")
    shutil.copy(file, tmp_path/"copy.jsonl")
    assert load(tmp_path/"copy.jsonl", tmp_path/"cache").cached
    text = file.read_text()
    file.write_text(text.replace("Count to 3.", "Count to 4."))
    assert not load(file, tmp_path/"cache").cached
    file.write_text(text)
    assert load(file, tmp_path/"cache").cached


def test_the_tokenizer_decides(file, tmp_path):
    load(file, tmp_path/"cache")
    assert load(file, tmp_path/"cache", fresh()).cached
    def asks(t): t.chat_template += "{# another #}"
    def word(t): t.add_tokens(["Count"])
    def special(t): t.add_special_tokens({"pad_token": "<|other|>"})
    def lower(t):
        from tokenizers.normalizers import Lowercase
        t.backend_tokenizer.normalizer = Lowercase()
    for change in asks, word, special, lower:
        tokenizer = fresh()
        change(tokenizer)
        assert not load(file, tmp_path/"cache", tokenizer).cached, change
    padded = fresh()
    padded(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert load(file, tmp_path/"cache", padded).cached
    assert tokenizer_print(padded) == tokenizer_print(NANO)


def test_the_code_decides(file, tmp_path, monkeypatch):
    load(file, tmp_path/"cache")
    monkeypatch.setattr("ftkit.data.dataset.code_print", lambda: "another version")
    assert not load(file, tmp_path/"cache").cached


def test_a_function_of_ones_own(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "def read(row): return [dict(role='user', content=row['instruction']),\n" \
           "                       dict(role='assistant', content=row['output'])]\n"
    (tmp_path/"my_layout.py").write_text(code)
    first = load(file, tmp_path/"cache", layout="my_layout:read")
    assert not first.cached and load(file, tmp_path/"cache", layout="my_layout:read").cached
    (tmp_path/"my_layout.py").write_text(code + "# another thought\n")
    assert not load(file, tmp_path/"cache", layout="my_layout:read").cached
    before = entries(tmp_path/"cache")
    found = [load(file, tmp_path/"cache", layout=lambda row: [
        dict(role="user", content=row["instruction"]), dict(role="assistant", content=end)])
        for end in ("a", "b")]      # the same code, and yet another function
    assert entries(tmp_path/"cache") == before and list(found[0].encoded) != list(found[1].encoded)


def test_small_sets_and_built_in_ones_are_not_kept(file, tmp_path, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path/"home"))
    for _ in range(2):
        assert not load(file, "auto").cached
        assert not load("builtin:colors/test", "auto").cached
        assert not load(file, "off").cached
    assert not (tmp_path/"home").exists()
    monkeypatch.setattr(store_room, "SMALL", 100)
    for cached in False, True: assert load(file, "auto").cached == cached
    assert entries(tmp_path/"home/data")


def test_where_nothing_can_be_kept(file, tmp_path, monkeypatch):
    (tmp_path/"home").write_text("a file is in the way")
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path/"home"))
    monkeypatch.setattr(store_room, "SMALL", 100)
    data = load(file, "auto")
    assert "cannot be used" in data.told and not data.cached
    assert list(data.encoded) == list(load(file, "off").encoded)
    home = Path(data.encoded.home.name)
    assert home.exists()
    del data
    assert not home.exists()
    with pytest.raises(FtkitError, match="cannot keep encoded data here.*data.cache"):
        load(file, tmp_path/"home")


# --- when things break ----------------------------------------------------------------------------

def damages(entry):
    "Ways to ruin a store, each undone before the next."
    for f in sorted(entry.iterdir()):
        whole = f.read_bytes()
        if whole: yield f"{f.name} cut", lambda: f.write_bytes(whole[:len(whole)//2])
        yield f"{f.name} longer", lambda: f.write_bytes(whole + b"12345678")
        yield f"{f.name} gone", lambda: f.unlink()
    meta = json.loads((entry/"meta.json").read_text())
    for odd in [], {}, 7, None, dict(sizes=3), dict(sizes={}), dict(meta, sizes={"ids.bin": 0}):
        yield f"meta {odd!r:.20}", lambda: (entry/"meta.json").write_text(json.dumps(odd))
    yield "a folder in the way", lambda: (shutil.rmtree(entry), entry.mkdir())


def test_damaged_stores_are_noticed_and_made_again(file, tmp_path):
    wanted = load(file, tmp_path/"cache")
    ids, (name,) = list(map(lambda e: e.ids.tolist(), wanted.encoded)), entries(tmp_path/"cache")
    seen = 0
    for what, ruin in damages(tmp_path/"cache"/name):
        ruin()
        again = load(file, tmp_path/"cache")
        assert not again.cached and "damaged and will be made again" in again.told, what
        assert [e.ids.tolist() for e in again.encoded] == ids, what
        assert load(file, tmp_path/"cache").cached
        seen += 1
    assert seen > 30


def test_a_cache_holds_no_code(file, tmp_path):
    load(file, tmp_path/"cache")
    arrays_of(dict(a=1), lambda: dict(x=np.arange(3)), tmp_path/"cache")
    kinds = {f.suffix for f in (tmp_path/"cache").rglob("*") if f.is_file()}
    assert kinds == {".bin", ".json", ".npy", ".lock"}
    evil = tmp_path/"cache"/key_of(dict(a=1))/"x.npy"
    size = evil.stat().st_size
    np.save(evil, np.array([print], dtype=object), allow_pickle=True)
    evil.write_bytes(evil.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(ValueError, match="allow_pickle=False|Python object"):
        arrays_of(dict(a=1), lambda: {}, tmp_path/"cache")


def test_a_full_disk_leaves_nothing(file, tmp_path, monkeypatch):
    put, left = StoreWriter.put, [4]
    def full(self, **columns):
        left[0] -= 1
        if not left[0]: raise OSError(errno.ENOSPC, "No space left on device")
        put(self, **columns)
    write(file, 2000)
    monkeypatch.setattr(StoreWriter, "put", full)
    with pytest.raises(FtkitError, match="the disk is full; nothing was left half-written"):
        load(file, tmp_path/"cache")
    monkeypatch.undo()
    assert not [p for p in (tmp_path/"cache").iterdir() if p.suffix != ".lock"]
    assert not load(file, tmp_path/"cache").cached and load(file, tmp_path/"cache").cached


def test_an_error_in_the_middle_leaves_nothing(file, tmp_path):
    write(file, 3000)
    with open(file, "a") as f: f.write('{"instruction": "cut')
    with pytest.raises(FtkitError, match="line 3001"): load(file, tmp_path/"cache")
    assert not [p for p in (tmp_path/"cache").iterdir() if p.suffix != ".lock"]


CHILD = """
import sys, time
from pathlib import Path
file, cache, mode, ready = sys.argv[1:]
from transformers import AutoTokenizer
from ftkit.nano.base import nano_path
from ftkit.data import dataset
tokenizer, real = AutoTokenizer.from_pretrained(nano_path()), dataset.encode_batches
def slow(*args, **kwargs):
    for n, batch in enumerate(real(*args, **kwargs)):
        yield batch
        Path(ready).write_text(str(n))
        time.sleep(60 if mode == "stall" else .2)
dataset.encode_batches = slow
if mode == "meet":
    Path(ready + ".here").touch()
    while len(list(Path(ready).parent.glob("*.here"))) < 2: time.sleep(.01)
data = dataset.load_data(dataset.DataConfig(file, cache=cache, workers=0), tokenizer, False)
print(data.cached, sum(int(e.ids.sum()) for e in data.encoded))
"""


def child(file, cache, mode, ready):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, (file, cache, mode, ready))],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def test_two_processes_at_once_encode_once(file, tmp_path):
    write(file, 3000)
    both = [child(file, tmp_path/"cache", "meet", tmp_path/f"ready{i}") for i in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    (first, total), (second, same) = sorted(out.split() for out, _ in said)
    assert (first, second) == ("False", "True") and total == same
    assert len(entries(tmp_path/"cache")) == 1 and load(file, tmp_path/"cache", workers=0).cached


def test_killed_in_the_middle(file, tmp_path):
    write(file, 3000)
    process, ready = child(file, tmp_path/"cache", "stall", tmp_path/"ready"), tmp_path/"ready"
    end = time.monotonic() + 120
    while not ready.exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not entries(tmp_path/"cache") and len(list((tmp_path/"cache").glob(".*.tmp"))) == 1
    data = load(file, tmp_path/"cache")     # the lock died with its owner
    assert not data.cached and not list((tmp_path/"cache").glob(".*"))
    assert load(file, tmp_path/"cache").cached


def test_clearing(file, tmp_path):
    load(file, tmp_path/"cache")
    name, = entries(tmp_path/"cache")
    (tmp_path/"cache"/f".{name}.77.tmp").mkdir()
    assert clear_cache(days=1, cache=tmp_path/"cache") == 0
    os.utime(tmp_path/"cache"/name/"meta.json", (0, 0))
    assert load(file, tmp_path/"cache").cached
    assert clear_cache(days=1, cache=tmp_path/"cache") == 0         # it was used just now
    size = sum(f.stat().st_size for f in (tmp_path/"cache"/name).iterdir())
    with store_room._locked(tmp_path/"cache"/name):                 # somebody is writing
        assert clear_cache(cache=tmp_path/"cache") == 0
    data = load(file, tmp_path/"cache")
    assert clear_cache(cache=tmp_path/"cache") == size and not entries(tmp_path/"cache")
    assert data.encoded[0].ids.tolist()                             # still mapped


def test_a_cache_that_is_cleared_while_it_is_opened(file, tmp_path, monkeypatch):
    wanted = load(file, tmp_path/"cache")
    whole = store_room._whole
    def cleared(folder):
        meta = whole(folder)
        monkeypatch.setattr(store_room, "_whole", whole)
        shutil.rmtree(folder)
        return meta
    monkeypatch.setattr(store_room, "_whole", cleared)
    again = load(file, tmp_path/"cache")
    assert not again.cached and list(again.encoded) == list(wanted.encoded)
    assert load(file, tmp_path/"cache").cached


def test_interrupted_by_hand(file, tmp_path, monkeypatch):
    def stop(self, batch): raise KeyboardInterrupt
    monkeypatch.setattr(StoreWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt): load(file, tmp_path/"cache")
    monkeypatch.undo()
    assert not [p for p in (tmp_path/"cache").iterdir() if p.suffix != ".lock"]
    assert not load(file, tmp_path/"cache").cached and load(file, tmp_path/"cache").cached


def test_the_same_size_and_time_and_yet_another_file(file, tmp_path):
    load(file, tmp_path/"cache")
    seen = file.stat()
    file.write_text(file.read_text().replace("Count to 3.", "Count to 4."))
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (seen.st_size, seen.st_mtime_ns)
    again = load(file, tmp_path/"cache")
    assert not again.cached and "Count to 4." in NANO.decode(again.encoded[3].ids)


# --- which samples --------------------------------------------------------------------------------

def contents(data): return [m[-2].content for m in data.samples]


def test_mixed_sets_with_layouts_of_their_own(tmp_path):
    a, b, c = tmp_path/"a.jsonl", tmp_path/"b.jsonl", tmp_path/"c.jsonl"
    write(a, 10)
    talks = [dict(messages=[dict(role="system", content="s"), dict(role="user", content=f"b{i}"),
                            dict(role="assistant", content="yes")]) for i in range(10)]
    b.write_text("\n".join(map(json.dumps, talks)))
    c.write_text("\n".join(json.dumps(dict(text=f"Text {i}.")) for i in range(10)))
    data = load(f"{a},{b}", tmp_path/"cache")
    assert data.layout == "alpaca, messages" and len(data.encoded) == 20 and data.system is None
    assert contents(data) == [f"Count to {i}." for i in range(10)] + [f"b{i}" for i in range(10)]
    assert load(b, tmp_path/"cache").cached and load(b, tmp_path/"cache").system == "s"
    three = load_data(DataConfig((str(a), str(b), str(c)), ("auto", "messages", "text"),
                                 cache=str(tmp_path/"cache")), NANO)
    assert len(three.encoded) == 30 and three.template.name != "text"
    last = NANO.decode(three.encoded[29].ids)
    assert last == "Text 9.</s>" and all(l != IGNORE for l in three.encoded[29].labels[1:])
    with pytest.raises(FtkitError, match="2 layouts for 3 paths"):
        load_data(DataConfig((str(a), str(b), str(c)), "alpaca,messages"), NANO)
    odd = tmp_path/"x,y.jsonl"
    write(odd, 5)
    assert len(load(odd, tmp_path/"cache").encoded) == 5


def test_weights(tmp_path):
    a, b = write(tmp_path/"a.jsonl", 40), write(tmp_path/"b.jsonl", 20, start=100)
    def read(*weights, seed=0):
        return load(f"{a},{b}", tmp_path/"cache", weights=weights, draw_seed=seed)
    data = read(.5, 2)
    source = data.encoded.numbers.tolist()
    assert len(source) == 20 + 40 and sorted(source[20:]) == sorted([*range(40, 60)]*2)
    assert len(set(source[:20])) == 20 and max(source[:20]) < 40
    assert read(.5, 2).encoded.numbers.tolist() == source
    assert read(.5, 2, seed=1).encoded.numbers.tolist() != source
    assert data.statistics["samples"] == len(data.samples) == 20 + 20
    assert data.statistics["tokens"] == sum(map(len, data.rows)) == sum(map(len, data.encoded))
    assert data.statistics["learned"] == sum(e.learned for e in data.encoded)
    assert len(read(1.25, .1).encoded) == 50 + 2
    assert read(1, 1).encoded.numbers is None
    for weights in (1,), (1, 0), (1, 1, 1):
        with pytest.raises(FtkitError, match="one for each path"): read(*weights)


def test_max_samples(file, tmp_path):
    def read(seed=0, **options):
        return load(file, tmp_path/"cache", max_samples=10, draw_seed=seed, **options)
    found = contents(read())
    assert len(found) == 10 and found == contents(read()) != contents(read(seed=1))
    every = contents(load(file, tmp_path/"cache"))
    assert found == [x for x in every if x in found]            # in the order of the file
    assert contents(load(file, tmp_path/"cache", max_samples=1000)) == every


@settings(max_examples=40, deadline=None)
@given(copies=st.lists(st.integers(1, 6), min_size=2, max_size=40), seed=st.integers(0, 9),
       fraction=st.floats(.05, .6), parts=st.integers(1, 3))
def test_a_split_never_divides_what_belongs_together(copies, seed, fraction, parts):
    "Copies of a conversation, in two files, each in several parts."
    sources = [i for i, n in enumerate(copies) for _ in range(n)]
    random.Random(seed).shuffle(sources)
    stores = []
    for half in sources[::2], sources[1::2]:
        writer, content = StoreWriter(), np.repeat(half, parts).astype(np.int32)
        writer.add(EncodedBatch(content, np.full(len(content), 129, np.uint8),
                                np.arange(len(content) + 1), np.repeat(np.arange(len(half)), parts),
                                np.ones(len(content), np.float32), []))
        stores.append(writer.in_memory(dict(report=dict(rows=len(half)))))
    try: held = hold_out(stores, fraction, seed)
    except FtkitError as e:
        assert "nothing is left" in str(e)
        return
    side = {}
    for s, h in zip(stores, held):
        for content, is_held in zip(s.ids.tolist(), h.tolist()):
            assert side.setdefault(content, is_held) == is_held
    count = sum(h.sum() for h in held)/parts
    wanted = max(1, round(fraction*len(sources)))
    assert wanted <= count < wanted + max(copies)
    drawn = [draw(s, ~h, .5, seed) for s, h in zip(stores, held)]
    for s, h, d in zip(stores, held, drawn):
        assert not h[d].any() and len(set(d)) == len(d)
        assert len(d) == parts*round(.5*(~h).sum()/parts)       # whole conversations


def test_a_split_of_a_file_with_duplicates(tmp_path):
    file = write(tmp_path/"data.jsonl", 50)
    file.write_text(file.read_text()*3)
    data = load(file, tmp_path/"cache", eval_fraction=.2)
    train, held = set(contents(data)), set(contents(data.eval))
    assert not train & held and len(held) == 10 and len(data.eval.samples) == 30
    assert data.statistics["samples"] == 120 and "held out: 30" in repr(data)
    again = load(file, tmp_path/"cache", eval_fraction=.2)
    assert again.cached and contents(again.eval) == contents(data.eval)
    assert set(contents(load(file, tmp_path/"cache", eval_fraction=.2, draw_seed=1).eval)) != held
    file.write_text(file.read_text().splitlines()[0] + "\n" + file.read_text().splitlines()[0])
    with pytest.raises(FtkitError, match="nothing is left to train on"):
        load(file, tmp_path/"cache", eval_fraction=.5)


def test_parts_of_long_texts_stay_together(tmp_path):
    texts = [f"Number {i}. "*(40 + i) for i in range(30)]
    (tmp_path/"t.jsonl").write_text("\n".join(json.dumps(dict(text=t)) for t in texts))
    data = load(tmp_path/"t.jsonl", tmp_path/"cache", max_length=64, eval_fraction=.3)
    assert data.report.split == 30 and len(data.eval.samples) == 9 and len(data.samples) == 21
    sources = [set(d.encoded.source.tolist()) for d in (data, data.eval)]
    assert not sources[0] & sources[1] and len(sources[0] | sources[1]) == 30


def test_bad_rows_are_counted_and_named(tmp_path):
    good = [json.dumps(dict(messages=[dict(role="user", content=f"q{i}"),
                                      dict(role="assistant", content="a")])) for i in range(4)]
    lines = [good[0], '{"messages": [{"role": "us', good[1], '{"messages": [{"role": "bot"}]}',
             good[2], "7", json.dumps(dict(messages=[dict(role="user", content="only")])), good[3]]
    (tmp_path/"x.jsonl").write_text("\n".join(lines))
    with pytest.raises(FtkitError, match="line 2"): load(tmp_path/"x.jsonl", tmp_path/"cache")
    for cached in False, True:
        data = load(tmp_path/"x.jsonl", tmp_path/"cache", skip_bad_rows=True)
        assert data.cached == cached and contents(data) == [f"q{i}" for i in range(4)]
        assert data.bad == 3 == data.statistics["bad"] and data.report.dropped == 1
        assert "3 bad rows were left out. The first: " in data.told and "line" in data.told
        assert [data.samples.places[i][1] for i in range(4)] == [1, 3, 5, 8]
    (tmp_path/"y.jsonl").write_text("\n".join(lines[1:2]*3))
    with pytest.raises(FtkitError, match="3 rows"):
        load(tmp_path/"y.jsonl", tmp_path/"cache", skip_bad_rows=True)


def test_a_role_that_the_template_refuses_is_a_bad_row(tmp_path):
    tokenizer = fresh()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    rows = [dict(instruction=q, output="a") for q in ("yes", "no", "yes")]
    (tmp_path/"x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(FtkitError, match="line 2"):
        load(tmp_path/"x.jsonl", tmp_path/"cache", tokenizer)
    data = load(tmp_path/"x.jsonl", tmp_path/"cache", tokenizer, skip_bad_rows=True)
    assert data.bad == 1 and contents(data) == ["yes", "yes"] and "not this" in data.told


# --- rows and training ----------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=80), block=st.integers(1, 90))
def test_plans_in_blocks_lose_nothing(lengths, block):
    plan = plan_rows(np.array(lengths), 20, block)
    assert sorted(plan["samples"].tolist()) == list(range(len(lengths)))
    for a, b in zip(plan["starts"], plan["starts"][1:]):
        assert 0 < sum(lengths[i] for i in plan["samples"][a:b]) <= 20


def test_rows_are_those_of_the_list(file, tmp_path):
    data = load(file, tmp_path/"cache", max_length=128)
    wanted = ftkit.make_rows(list(data.encoded), 128)
    assert [r.ids.tolist() for r in data.rows] == [r.ids.tolist() for r in wanted]
    assert [r.labels.tolist() for r in data.rows] == [r.labels.tolist() for r in wanted]
    assert data.rows.lengths.tolist() == [len(r) for r in wanted]
    assert [len(r) for r in data.rows[1:3]] == [len(r) for r in wanted[1:3]]
    single = load(file, tmp_path/"cache", max_length=128, packing=False)
    assert [r.ids.tolist() for r in single.rows] == [e.ids.tolist() for e in data.encoded]


class Stop(Callback):
    order = 100
    def __init__(self, step): self.at = step
    def after_step(self, trainer):
        if trainer.step == self.at: raise KeyboardInterrupt


def trainer(data, work=None, *callbacks, **cfg):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(NANO), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, attention_dropout=.1, max_position_embeddings=128))
    cfg = TrainConfig(batch_size=2, precision="fp32", **cfg)
    return Trainer(model, SupervisedTuning(), data.rows, cfg, callbacks=callbacks, work_dir=work,
                   collate=partial(collate, pad_id=0, mask=None), eval_rows=data.eval.rows,
                   save=lambda folder: torch.save(0, folder/"nothing") and None,
                   lengths=data.rows.lengths if data.config.group_by_length else None)


@pytest.mark.parametrize("options", [dict(), dict(packing=False, group_by_length=True)])
def test_a_run_resumes_exactly_with_and_without_the_cache(file, tmp_path, options):
    options = dict(max_length=64, eval_fraction=.2, weights=(1.5,), **options)
    plain = load(file, "off", **options)
    assert not plain.cached
    whole = [r.get("loss") for r in trainer(plain, epochs=2).fit().history]
    made, kept = (load(file, tmp_path/"cache", **options) for _ in range(2))
    assert kept.cached and not made.cached
    prints = [trainer(d, epochs=2).fingerprint() for d in (plain, made, kept)]
    assert prints[0] == prints[1] == prints[2]
    assert prints[0]["tokens"] == sum(map(len, list(plain.rows)))
    with pytest.raises(KeyboardInterrupt):
        trainer(plain, tmp_path/"run", Stop(3), epochs=2, save_every=2).fit()
    run = trainer(kept, tmp_path/"run", epochs=2, save_every=2).fit(resume="auto")
    assert [r.get("loss") for r in run.history if r["event"] != "save"] == whole


def test_recipes_take_several_paths_and_group_by_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/"a.jsonl", 20)
    write(tmp_path/"b.jsonl", 20, start=50)
    r = ftkit.recipe("nano_full_custom_e1").set(**{
        "data.path": "a.jsonl,b.jsonl", "data.weights": "1,2", "data.packing": "false",
        "data.group_by_length": "true", "max_steps": "2", "batch_size": "4",
        "data.cache": str(tmp_path/"cache"), "data.max_samples": "10", "eval_fraction": ".2"})
    assert r.data.weights == (1, 2) and r.data.path in ("a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl"))
    run = ftkit.train(r, "run")
    assert len([e for e in run.history if e["event"] == "train"]) == 2
    assert ftkit.load_recipe("run/recipe.py") == r
    assert len(entries(tmp_path/"cache")) == 2


# --- larger than memory ---------------------------------------------------------------------------

def big(tokens, size=500):
    "Batches of samples that are made up as they are asked for."
    rng, n = np.random.default_rng(0), 64
    for first in range(0, tokens//size, n):
        yield EncodedBatch(rng.integers(0, 2000, n*size, np.int32), np.full(n*size, 131, np.uint8),
                           np.arange(0, n*size + 1, size), np.arange(first, first + n),
                           np.ones(n, np.float32), [])


def test_memory_does_not_grow_with_the_data(tmp_path):
    def peak(tokens):
        def make(meta):
            yield from big(tokens)
            meta["report"] = dict(rows=tokens//500)
        tracemalloc.start()
        s = stored(dict(tokens=tokens), make, tmp_path/"cache")
        rows = LazyRows(s, **plan_rows(s.lengths, 2048))
        for i in random.Random(0).sample(range(len(rows)), 50): rows[i]
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert abs(sum(rows.lengths) - tokens) < 64*500
        return top/2**20
    small, large = peak(2_000_000), peak(16_000_000)
    assert large - small < 8, (small, large)    # 28,000 more samples, 70 MB more on the disk


def test_a_set_that_is_not_kept_goes_to_a_temporary_place(monkeypatch):
    monkeypatch.setattr(store_room, "SPILL", 100_000)
    def make(meta): yield from big(300_000)
    s = stored(None, make)
    assert s.home and Path(s.home.name).exists() and len(s.ids) >= 300_000
    assert isinstance(s.ids.base, np.memmap)


@pytest.mark.parametrize("layout,column", [("text", "text"), ("pretrain", "text"),
                                           ("content", "content")])
def test_documents_are_rendered_as_text_under_any_layout(tmp_path, layout, column):
    file = tmp_path/"a.jsonl"
    rows = [{column: f"Tides follow the moon, {n} times."} for n in range(9)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for _ in range(2): # the second time from the cache
        data = load(file, tmp_path/"cache", layout=layout, template="tokenizer")
        assert data.template.name == "text" and data.report.learned == data.report.tokens - 9
