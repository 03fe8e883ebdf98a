"From files to packed rows: random text, bad input, speed and real samples."
import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from html import escape
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from ftkit.core import FtkitError
from ftkit.data.dataset import DataConfig, load_data
from ftkit.data.encode import (IGNORE, ROLE_NAMES, Encoded, EncodeReport, encode, encode_all,
                               encode_batches, encode_prompt, encode_stream)
from ftkit.data.formats import find_layout, read_rows
from ftkit.data.packing import collate, fill, make_rows, pack, pack_arrays
from ftkit.data.preview import preview, token_texts
from ftkit.data.messages import Conversation, Message, as_messages
from ftkit.data.families import template
from ftkit.nano.base import nano_path
from test_templates import SPECIAL, byte_level, content, conversations, turns

SHARED = Path(__file__).parents[2]/"shared/data"


def llama_like(scheme):
    "A tokenizer of the Llama family: a space in front, bytes for what it doesn't know."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if scheme == "legacy"
                                                 else scheme, split=scheme != "legacy")
    tok.train_from_iterator(["the sky is blue", "user assistant system"],
                            trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False))
    spec = json.loads(tok.to_str())
    spec["model"]["byte_fallback"], vocab = True, spec["model"]["vocab"]
    for b in range(256): vocab[f"<0x{b:02X}>"] = len(vocab)
    tok = Tokenizer.from_str(json.dumps(spec))
    if scheme == "legacy":
        tok.pre_tokenizer = None
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "),
                                     decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>",
                                   chat_template=template("qwen_chat").jinja)


NANO = AutoTokenizer.from_pretrained(nano_path())
BYTES = byte_level(chat_template=template("internlm2_chat").jinja)
SPACED = {s: llama_like(s) for s in ("first", "always", "legacy")}
TOKENIZERS = {"nano": NANO, "bytes": BYTES, **SPACED}
FORMS = [(tok, template(name, tok)) for tok in TOKENIZERS.values()
         for name in ("default", "qwen_chat", "internlm2_chat", "tokenizer")]


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stderr(io.StringIO()) as told: yield told


# --- encoding, on random conversations ------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_learned_is_each_reply_with_its_end(messages):
    replied = [m for m in messages if m["role"] == "assistant"]
    for tok, t in FORMS:
        if not any(m["loss"] is not False for m in replied):
            with pytest.raises(FtkitError,
                               match="nothing would be learned"): encode(messages, t, tok)
            continue
        e = encode(messages, t, tok)
        assert len(e.ids) == len(e.labels) and all(l in (IGNORE, i) for i,
                                                   l in zip(e.ids, e.labels))
        if tok in SPACED.values(): continue     # these drop the first space of whatever they decode
        expected = "".join(m["content"] + t.stop[0] for m in replied if m["loss"] is not False)
        assert tok.decode([l for l in e.labels if l != IGNORE],
                          clean_up_tokenization_spaces=False) == expected
        assert tok.decode(e.ids, clean_up_tokenization_spaces=False) == t.render(messages).text


@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_prompt_ids_are_the_beginning_of_training_ids(messages):
    unmarked = [{**m, "loss": None} for m in messages]
    for tok, t in FORMS:
        if not any(m["role"] == "assistant" for m in messages): continue
        ids = encode(unmarked, t, tok).ids
        for i, m in enumerate(messages):
            if m["role"] != "assistant": continue
            prompt = encode_prompt(messages[:i], t, tok)        # `loss` must not change the ids
            assert ids[:len(prompt)] == prompt == encode_prompt(unmarked[:i], t, tok)


def test_loss_does_not_change_the_ids():
    tok = byte_level(texts=["<|Bot|>:-)"]*9)        # joins the end of the prompt with this reply
    assert len(tok("<|Bot|>:-)").input_ids) < len(tok("<|Bot|>:").input_ids + tok("-)").input_ids)
    for name in "default", "qwen_chat":
        talk = [dict(m, loss=None) for m in turns("a", "-)", "b", "-)")]
        unlearned = [talk[0], dict(talk[1], loss=False), *talk[2:]]
        a, b = (encode(m, template(name), tok) for m in (talk, unlearned))
        assert a.ids == b.ids and a.labels != b.labels
        prompt = encode_prompt(unlearned[:3], template(name), tok)
        assert prompt == encode_prompt(talk[:3], template(name), tok) == a.ids[:len(prompt)]


@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_look_alikes_stay_text(messages):
    harmless = [{**m, "content": "x"} for m in messages]
    for tok, t in FORMS:
        special = set(tok.all_special_ids)
        def found(m): return [i for i in encode_prompt(m, t, tok) if i in special]
        assert found(messages) == found(harmless)


@settings(max_examples=40, deadline=None)
@given(messages=conversations(), max_length=st.integers(2, 120))
def test_truncation_keeps_the_end(messages, max_length):
    for tok, t in FORMS[:5]:
        try: whole = encode(messages, t, tok)
        except FtkitError as e:
            assert "no reply" in str(e) or "loss=False" in str(e)
            continue
        try: cut = encode(messages, t, tok, max_length)
        except FtkitError as e:
            first = next(i for i, l in enumerate(whole.labels) if l != IGNORE)
            assert "max_length" in str(e) and first >= max_length - 4   # not one character fits
            continue
        assert len(cut) <= max_length and cut.learned
        if len(whole) <= max_length: assert cut == whole
        else:
            end = t.stop_ids()[0]
            assert cut.ids[-1] == cut.labels[-1] == end and cut.ids[:-1] == whole.ids[:len(cut) - 1]
            assert "\ufffd" not in tok.decode(cut.ids) or "\ufffd" in tok.decode(whole.ids)


@settings(max_examples=40, deadline=None)
@given(text=content.filter(bool), max_length=st.integers(4, 40))
def test_documents_lose_nothing(text, max_length):
    for tok in NANO, BYTES:
        t = template("text", tok)
        parts, report = encode_all([[Message("text", text)]], t, tok, max_length)
        assert sum((p.ids for p in parts), []) == encode([Message("text", text)], t, tok).ids
        assert all(len(p) <= max_length for p in parts) and report.split == (len(parts) > 1)
        assert tok.decode(sum((p.ids for p in parts), [])) == text + "</s>"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_whole_text_where_nothing_was_cut(name):
    "Markup and contents give the ids of the whole text, except at the border of a reply."
    tok = TOKENIZERS[name]
    for form in "default", "internlm2_chat":
        messages = turns("the sky", "is blue", "  user\n\n", system="system")
        assert encode_prompt(messages[:2], template(form), tok) == tok(
            template(form, tok).render(messages[:2],
                                       True).text, add_special_tokens=False)["input_ids"]


def test_tokenizer_is_left_as_it_was():
    before = NANO("a</s>b")["input_ids"]
    encode_all([turns("</s>", "</s>")], template("default"), NANO)
    assert NANO("a</s>b")["input_ids"] == before and not NANO.backend_tokenizer.truncation
    NANO(["a", "b c d e"], padding=True, truncation=True,
         max_length=3)     # leaves its settings in the tokenizer
    assert encode_prompt(turns("a b c d e f"), template("default"), NANO) == encode_prompt(
        turns("a b c d e f"), template("default"), AutoTokenizer.from_pretrained(nano_path()))


def test_pad_is_end_and_first_id_is_real():
    tok = byte_level(["</s>"], pad_token="</s>")        # id 0 is the end token, and it pads
    assert tok.pad_token_id == tok.eos_token_id == 0
    rows = make_rows([encode(turns(q, a), template("default"), tok) for q,
                      a in (("sky", "blue"), ("a", "b"))], 64, False)
    batch = collate(rows, tok.pad_token_id)
    for k, row in enumerate(rows):
        labels = batch["labels"][k]
        assert (labels == 0).sum() == 1 and labels[:len(row)].tolist() == row.labels.tolist()
        assert (labels[len(row):] == IGNORE).all()


def test_end_token_that_is_not_marked_as_special():
    tok = byte_level(["<pad>", "</s>"])
    tok.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    ids = encode(turns("a<|im_end|><|im_end|>b", "c<|im_end|>"), template("qwen_chat"), tok).ids
    assert ids.count(tok.convert_tokens_to_ids("<|im_end|>")) == 3      # system, user, reply
    assert "a<|im_end|><|im_end|>b" in tok.decode(ids)


@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_preview_shows_all_of_the_text(messages):
    for tok, t in FORMS[:5]:
        ids = encode_prompt(messages, t, tok)
        found = token_texts(ids, tok)
        assert sum((i for _, i in found), []) == ids
        assert "".join(text for text, _ in found) == tok.decode(ids)
        html = preview(messages, tok, t)._repr_html_()
        assert "<script" not in html and html.count("<span") == html.count("</span>")


def test_preview_runs_nothing():
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[2J"
    view = preview(turns(evil, evil), NANO, template("default"))
    html = view._repr_html_()
    assert set(re.findall(r"<(/?\w+)", html)) == {"div", "/div", "span", "/span"}
    assert "".join(re.findall(r">([^<]*)</span>", html)).count(escape("<script>alert(1)")) == 2
    assert "\x1b" not in html + str(view) + view.__rich__().plain


def test_speed():
    "5,000 short samples a second were asked for; a machine that is busy gets some slack."
    samples = [turns(f"Name colour {i}", f"#{i:06x}") for i in range(6000)]
    encode_all(samples[:600], template("tokenizer", NANO), NANO, 128)
    start = time.process_time()
    encode_all(samples, template("tokenizer", NANO), NANO, 128)
    assert len(samples)/(time.process_time() - start) > 2500
    start = time.process_time()
    lengths = 1 + np.arange(500_000)*7919 % 2047
    samples, starts = pack_arrays(lengths, 2048, seed=0)
    assert time.process_time() - start < 3 and len(np.unique(samples)) == 500_000
    assert lengths.sum()/(2048*(len(starts) - 1)) > .999


# --- too long, and what is learned ----------------------------------------------------------------

def outcome(tok, t, messages, **options):
    "Samples and report, or None where nothing is to be learned."
    try: return encode_all([messages], t, tok, progress=False, on_masked="drop", **options)
    except FtkitError as e:
        assert "nothing would be learned" in str(e)


@settings(max_examples=40, deadline=None)
@given(messages=conversations(), max_length=st.integers(4, 60), context=st.integers(0, 3))
def test_splitting_learns_every_token_once(messages, max_length, context):
    options = dict(max_length=max_length, long="split", context=context)
    for tok, t in FORMS[:4]:
        if not (whole := outcome(tok, t, messages)): continue
        (e,), _ = whole
        parts, report = outcome(tok, t, messages, **options)
        wanted = [l for l in e.labels[1:] if l != IGNORE]
        assert [l for p in parts for l in p.labels[1:] if l != IGNORE] == wanted
        assert report.learned == e.learned and not report.truncated
        assert all(len(p) <= max_length and p.learned for p in parts)
        assert report.tokens == len(e) + report.repeated - report.unlearned
        assert report.split == (len(e) > max_length)
        for part in parts[1:]: assert part.labels[0] == IGNORE


@settings(max_examples=40, deadline=None)
@given(text=content.filter(bool), max_length=st.integers(5, 40), context=st.integers(0, 4))
def test_documents_go_on_with_context(text, max_length, context):
    t = template("text", BYTES)
    parts, report = encode_all([[Message("text", text)]], t, BYTES, max_length, progress=False,
                               context=context)
    whole = encode([Message("text", text)], t, BYTES).ids
    assert parts[0].ids + sum((p.ids[context:] for p in parts[1:]), []) == whole
    for a, b in zip(parts, parts[1:]): assert a.ids[len(a) - context:] == b.ids[:context]
    learned = sum(p.learned for p in parts)
    assert report.learned == learned == len(whole) - 1 - (not context)*(len(parts) - 1)


def test_policies_are_counted():
    long, short = turns("a", "sky "*60), turns("a", "b")
    kept, dropped = (encode_all([long, short, short], template("default"), NANO, 48, long=how,
                                progress=False)[1] for how in ("truncate", "drop"))
    assert (kept.rows, kept.truncated, kept.overlong, kept.source) == (3, 1, 0, [0, 1, 2])
    assert (dropped.rows, dropped.truncated, dropped.overlong, dropped.source) == (3, 0, 1, [1, 2])
    whole = encode(long, template("default"), NANO)
    assert kept.cut_tokens == len(whole) - 48 and dropped.dropped == 0


@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_last_reply_only(messages):
    for tok, t in FORMS[:4]:
        replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not replies: continue
        marked = [{**m, "loss": m["loss"] if i == replies[-1] else False}
                  for i, m in enumerate(messages)]
        a, b = outcome(tok, t, messages, learn="last"), outcome(tok, t, marked)
        assert a == b
        if a and messages[replies[-1]]["loss"] is not False:
            assert a[0][0].ids == encode([{**m, "loss": None} for m in messages], t, tok).ids


@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_roles_are_those_of_the_turns(messages):
    "The tokens of a role hold all of its contents, and only the assistant's are learned."
    for tok, t in FORMS[:8]:
        if not (found := outcome(tok, t, messages)): continue
        (e,), _ = found
        assert len(e.roles) == len(e.ids)
        texts = {}
        for i, role in zip(e.ids, e.roles): texts.setdefault(ROLE_NAMES[role], []).append(i)
        if tok in SPACED.values(): continue
        for role in {m["role"] for m in messages}:
            text = tok.decode(texts.get(role, []), clean_up_tokenization_spaces=False)
            for m in messages:
                if m["role"] == role: assert m["content"].strip() in text
        learned = {ROLE_NAMES[r] for r, l in zip(e.roles, e.labels) if l != IGNORE}
        assert learned == {"assistant"}


def test_another_label_at_a_token():
    "In Baichuan 2, the end of a reply is learned at the token that begins the next turn."
    tok = byte_level(["<pad>", "</s>", "<reserved_106>", "<reserved_107>"])
    t, talk = template("baichuan2_chat", tok), turns("a", "the deep sea", "c", "d "*30)
    end, turn = tok.convert_tokens_to_ids(["</s>", "<reserved_106>"])
    e = encode(talk, t, tok)
    place, = (i for i, (x, l) in enumerate(zip(e.ids, e.labels)) if l not in (IGNORE, x))
    assert (e.ids[place], e.labels[place]) == (turn, end) and e.ids.count(end) == 1
    assert ROLE_NAMES[e.roles[place]] == "user"
    begin = next(i for i, l in enumerate(e.labels) if l != IGNORE)
    for n in range(begin + 2, len(e)):      # wherever the row is cut, the end is learned
        cut = encode(talk, t, tok, n)
        assert cut.labels[-1] == end and len(cut) <= n
        assert cut.ids[-1] == (turn if len(cut) <= place + 1 else end)
    batch, = encode_batches([(talk, None)], t, tok, 30, long="split", workers=0)
    assert [label for _, label in batch.overrides] == [end]
    assert sum(x.learned for x in batch) == e.learned
    last, = encode_batches([(talk, None)], t, tok, learn="last", workers=0)
    assert not last.overrides


def test_images_and_weights():
    for wrong, match in ((Conversation(turns("a", "b"), images=["x.png"]), "images"),
                         (Conversation(turns("a", "b"), weight=-1), "weight should be")):
        with pytest.raises(FtkitError, match=f"row 2: .*{match}"):
            encode_all([turns("a", "b"), wrong], template("default"), NANO)
    half = as_messages(Conversation(turns("a", "b"), weight=.5))
    assert [e.weight for e in encode_all([half], template("default"), NANO)[0]] == [.5]


# --- many rows ------------------------------------------------------------------------------------

def many(n): return [(turns(f"q {i}", "a "*(i % 7)), ("rows.jsonl, line", i + 1)) for i in range(n)]


def test_stream_is_lazy_and_in_order():
    asked = []
    def source():
        for i, pair in enumerate(many(5000)): asked.append(i); yield pair
    stream = encode_stream(source(), template("default"), NANO)
    e, n = next(stream)
    assert n == 0 and len(asked) <= 600 and e == encode(turns("q 0", ""), template("default"), NANO)
    assert [n for _, n in stream] == list(range(1, 5000))


def test_workers_do_the_same():
    options = dict(max_length=24, on_masked="drop", long="split", context=1)
    reports = [EncodeReport(), EncodeReport()]
    serial, parallel = (list(encode_stream(iter(many(2500)), template("default"), NANO, workers=w,
                                           report=r, **options)) for w, r in zip((0, 2), reports))
    assert serial == parallel and reports[0] == reports[1] and reports[0].rows == 2500


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_keep_their_row(workers):
    rows = many(1500)
    rows[1030] = turns("no reply")[:1], rows[1030][1]
    def source():
        yield from rows[:1200]
        raise FtkitError("broken", where="rows.jsonl, line 1201")
    stream, got = encode_stream(source(), template("default"), NANO, workers=workers), []
    with pytest.raises(FtkitError, match="^rows.jsonl, line 1031: nothing would be learned"):
        for e, n in stream: got.append(n)
    assert got == list(range(1024))
    rows[1030], got = rows[0], []
    with pytest.raises(FtkitError, match="^rows.jsonl, line 1201: broken"):
        for e, n in encode_stream(source(), template("default"), NANO, workers=0): got.append(n)
    assert got == list(range(1200))


def children():
    "Processes that this one started and that still run."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            if int(parent) == os.getpid() and state != "Z": found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_killed_worker_is_an_error_and_nobody_is_left():
    before = set(children())
    stream = encode_stream(iter(many(20_000)), template("default"), NANO, workers=2)
    next(stream)
    for pid in set(children()) - before: os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(FtkitError, match="a worker process died .exit code -9"): list(stream)
    assert time.monotonic() - start < 20 and set(children()) == before
    stream = encode_stream(iter(many(20_000)), template("default"), NANO, workers=2)
    next(stream)
    stream.close()
    assert set(children()) == before


# --- packing --------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), max_size=60), extra=st.integers(0, 8),
       seed=st.none() | st.integers(0, 99))
def test_pack_keeps_samples_whole(lengths, extra, seed):
    room = max(lengths, default=1) + extra
    rows = pack(lengths, room, seed)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths))) and all(rows)
    used = [sum(lengths[i] for i in r) for r in rows]
    assert all(u <= room for u in used) and rows == pack(lengths, room, seed)
    assert sum(2*u <= room for u in used) <= 1          # two half-empty rows would have been one
    f = fill(lengths, room)
    assert f.rows == len(pack(lengths, room)) >= f.fewest and f.share <= f.best <= 1
    assert len(rows) == f.rows and f.share <= f.trimmed <= 1


def by_one(lengths, room):
    "Best fit, one sample at a time."
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [r for r in rooms if r >= n]
        left = min(fitting, default=room)
        if fitting: rooms.remove(left)
        rooms.append(left - n)
    return sorted(rooms)


@settings(max_examples=120, deadline=None)
@given(lengths=st.lists(st.integers(1, 24), max_size=80), extra=st.integers(0, 40))
def test_pack_does_as_best_fit_does_one_by_one(lengths, extra):
    room = max(lengths, default=1) + extra
    left = [room - sum(lengths[i] for i in r) for r in pack(lengths, room)]
    assert sorted(left) == by_one(lengths, room)


def unpacked(rows):
    "Samples of rows, by their ids."
    for r in rows:
        for a, b in zip(r.starts.tolist(), r.starts[1:].tolist()): yield r, slice(a, b)


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), seed=st.none() | st.just(3))
def test_unpacking_gives_the_samples_again(lengths, seed):
    def sample(k, n):
        ids = [100*k + i for i in range(n)]
        return Encoded(ids, [i if i % 3 else IGNORE for i in ids], [k % 9]*n, weight=float(k % 3))
    samples = [sample(k, n) for k, n in enumerate(lengths, 1)]
    rows, found = make_rows(samples, 12, seed=seed), {}
    for r, s in unpacked(rows):
        weights = np.ones(len(r)) if r.weights is None else r.weights
        ids, labels = r.ids[s].tolist(), r.labels[s].tolist()
        assert r.positions[s].tolist() == list(range(len(ids))) and len(set(weights[s])) == 1
        found[ids[0]] = Encoded(ids, labels, r.roles[s].tolist(), weights[s][0])
    assert len(found) == len(samples)
    for e in samples:
        e.labels[0] = IGNORE        # there is nothing before it
        assert found[e.ids[0]] == e
    batch = collate(rows, 7, torch.bool)
    assert (batch["labels"] != IGNORE).sum().item() == sum(s.learned for s in samples)
    assert batch["attention_mask"].diagonal(dim1=2, dim2=3).all()  # nobody sees nothing


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
       shape=st.sampled_from([None, 12, (9, 16)]))
def test_borders_are_those_of_the_positions(lengths, shape):
    samples = [Encoded([k]*n, [k]*n) for k, n in enumerate(lengths)]
    rows = make_rows(samples, 9)[:9]
    batch = collate(rows, 0, None, pad_to=shape)
    if shape == 12: shape = len(rows), 12
    assert tuple(batch["input_ids"].shape) == (shape or (len(rows), max(map(len, rows))))
    borders = batch["cu_seqlens"]
    assert borders.dtype == torch.int32 and borders[0] == 0
    assert borders[-1] == batch["input_ids"].numel() and (borders.diff() > 0).all()
    assert batch["max_seqlen"] == borders.diff().max().item()
    begins = (batch["position_ids"].flatten() == 0).nonzero()[:, 0]
    assert begins.tolist() == borders[:-1].tolist()
    assert "weights" not in batch and batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("attn,mask", [("sdpa", torch.float32), ("sdpa", torch.bool),
                                       ("eager", torch.float32)])
def test_samples_do_not_see_each_other(attn, mask):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4,
                         num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    g = torch.Generator().manual_seed(0)
    samples = [Encoded(*[torch.randint(64, (n,), generator=g).tolist()]*2)
               for n in (7, 3, 9, 5, 8, 2)]
    rows = make_rows(samples, 16)

    def run(rows):
        b = collate(rows, 0, mask)
        with torch.no_grad(): return model(b["input_ids"], b["attention_mask"],
                                           b["position_ids"]).logits
    base, spans = run(rows), [(k, a, b) for k, r in enumerate(rows) for a,
                              b in zip(r.starts, r.starts[1:])]
    assert not base.isnan().any()
    for k, a, b in spans:
        changed = make_rows(samples, 16)
        changed[k].ids[a:b] = (changed[k].ids[a:b] + 1) % 64
        out = run(changed)
        for k2, a2, b2 in spans: assert torch.equal(out[k2, a2:b2],
                                                    base[k2, a2:b2]) == ((k, a) != (k2, a2))
    by_ids = {tuple(r.ids[a:b].tolist()): base[k, a:b] for k, r in enumerate(rows) for a,
              b in zip(r.starts, r.starts[1:])}
    for s in samples:
        alone = run(make_rows([s], 16))[0]
        torch.testing.assert_close(by_ids[tuple(s.ids)], alone, atol=1e-6, rtol=1e-5)


def test_gradients_of_packed_rows_are_those_of_single_samples():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    samples = [encode(turns(f"sky {i}", "blue "*i), template("default"),
                      BYTES) for i in range(1, 7)]
    def grads(rows):
        model.zero_grad()
        for r in rows:
            b = collate([r], 0)
            logits = model(b["input_ids"], b["attention_mask"], b["position_ids"]).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), b["labels"][:, 1:].flatten(),
                                              reduction="sum").backward()
        return [p.grad.clone() for p in model.parameters()]
    packed, single = make_rows(samples, 128), make_rows(samples, 128, packing=False)
    assert len(packed) < len(single)
    for a, b in zip(grads(packed),
                    grads(single)): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# --- bad input ------------------------------------------------------------------------------------

GOOD = '{"instruction": "a", "output": "b"}'
ASKED, SAID = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "b"}'
UNLEARNED = ', "loss": "False"}'
LONG = json.dumps(dict(instruction="a b "*200, output="c"))
BAD = {
    "a line that is cut": ("x.jsonl", f'{GOOD}\n\n{{"instruction": "a', "x.jsonl, line 3, column"),
    "a comma too many": ("x.json", f"[{GOOD},]", "x.json, line 1, column"),
    "not a row": ("x.jsonl", f"{GOOD}\n7",
                  "x.jsonl, line 2: expected an object with named columns, found int"),
    "an object without a list": ("x.json", '{"a": 1}', "0 lists and the keys 'a'"),
    "an empty file": ("x.jsonl", "", "no rows"),
    "an unknown kind": ("x.xls", "a,b", "'.xls' are not read"),
    "not UTF-8": ("x.jsonl", b'{"text": "\xe9"}', "not UTF-8 text"),
    "a column missing": ("x.jsonl", f'{GOOD}\n{{"instruction": "a", "answer": "b"}}',
                         "x.jsonl, line 2: the column 'output' is missing; found 'instruction', "
                         "'answer'"),
    "a number for a text": ("x.jsonl", '{"instruction": "a", "output": 3}',
                            "x.jsonl, line 1: the column 'output' holds int"),
    "an empty conversation": ("x.jsonl", f'{{"messages": [{ASKED}, {SAID}]}}\n{{"messages": []}}',
                              "x.jsonl, line 2: the conversation in 'messages' is empty"),
    "an unknown role": ("x.jsonl", '{"messages": [{"role": "bot", "content": "a"}]}',
                        "x.jsonl, line 1: unknown role in message 1"),
    "no reply": ("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}',
                 "x.jsonl, line 1: nothing would be learned"),
    "no loss": ("x.jsonl", f'{{"messages": [{ASKED}, {SAID.replace("}", UNLEARNED)}]}}',
                "every reply has loss=False"),
    "too long a prompt": ("x.jsonl", LONG,
                          "of max_length=64 tokens, so no reply fits"),
    "half an emoji": ("x.jsonl", '{"instruction": "\\ud83d", "output": "b"}',
                      "x.jsonl, line 1: .* half a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    file, text, match = BAD[name]
    (tmp_path/file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with quiet(), pytest.raises(FtkitError, match=match) as e:
        load_data(DataConfig(str(tmp_path/file), max_length=64), NANO)
    assert "\n" not in str(e.value) and str(e.value).endswith((".", "?"))


def test_missing_file(tmp_path):
    for path, match in ((tmp_path/"nothere.json", "nothere.json: there is no such file or folder"),
                        (tmp_path, "no data file in this folder"),
                        ("builtin:colours/train", "Did you mean 'colors/train'")):
        with pytest.raises(FtkitError, match=match): read_rows(path)


def test_masked_rows_can_be_dropped(tmp_path):
    (tmp_path/"x.jsonl").write_text(f'{GOOD}\n{LONG}\n')
    with quiet() as told: data = load_data(DataConfig(str(tmp_path/"x.jsonl"), max_length=64,
                                                      on_masked="drop"), NANO)
    assert data.report.dropped == 1 and len(data.samples) == len(data.encoded) == 1
    assert "1 of 2 samples teach nothing" in told.getvalue()
    (tmp_path/"x.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with quiet(), pytest.raises(FtkitError, match="from any of the 1 rows"):
        load_data(DataConfig(str(tmp_path/"x.jsonl"), on_masked="drop"), NANO)


def test_builtin_text(monkeypatch):
    import ftkit.nano.corpus
    monkeypatch.setattr(ftkit.nano.corpus, "prose", lambda *args: ("A paragraph of prose.",))
    rows = read_rows("builtin:nano_text/50")
    assert len(rows) == 50 and find_layout(rows) == "text"
    assert rows.place(3) == "builtin:nano_text/50, row 4"


# --- real samples ---------------------------------------------------------------------------------

def shared(name):
    if not (SHARED/name).exists(): pytest.skip("the shared samples are not here")
    return str(SHARED/name)


@pytest.mark.parametrize("name", ["default", "internlm2_chat", "tokenizer"])
def test_alpaca_sample(name):
    with quiet(): data = load_data(DataConfig(shared("alpaca_en_demo.json"), template=name,
                                              max_length=512, on_masked="drop"), NANO)
    end = data.template.stop_ids()[0]
    rows = read_rows(shared("alpaca_en_demo.json"))
    assert len(data.samples) + data.report.dropped + data.skipped == len(rows)
    for s, e in zip(data.samples, data.encoded):
        learned = [l for l in e.labels if l != IGNORE]
        assert learned[-1] == end and learned.count(end) == 1
        reply = NANO.decode(learned[:-1])
        assert s[-1].content.startswith(reply) and (reply == s[-1].content or len(e) >= 512 - 4)
        assert not s[0].content.endswith("\n")
    assert sum(map(len, data.rows)) == sum(map(len,
                                               data.encoded)) and data.statistics["filled"] > .9


def test_identity_sample():
    data = load_data(DataConfig(shared("identity.json"), template="default",
                                eval_fraction=.1), NANO)
    assert len(data.samples) + len(data.eval.samples) == 91
    assert "{{name}}" in "".join(NANO.decode(r.ids) for r in data.rows)


def test_c4_sample():
    with quiet(): data = load_data(DataConfig(shared("c4_demo.jsonl"), max_length=1024), NANO)
    assert data.template.name == "text" and data.report.truncated == 0 < data.report.split
    documents = {}
    for i, e in zip(data.encoded.source.tolist(), data.encoded):
        documents.setdefault(i, []).extend(e.ids)
    for i, row in enumerate(read_rows(shared("c4_demo.jsonl"))):
        assert NANO.decode(documents[i], clean_up_tokenization_spaces=False) == row["text"] + "</s>"
    assert sum((e.ids == NANO.eos_token_id).sum() for e in data.encoded) == data.report.rows


def qwen():
    "Qwen's real vocabulary."
    sys.path.insert(0, str(Path(__file__).parents[1]/"tools"))
    from bench_data import from_tiktoken
    return PreTrainedTokenizerFast(tokenizer_object=from_tiktoken(shared("qwen.tiktoken")),
                                   eos_token="<|im_end|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("vocabulary", ["nano", "qwen"])
def test_rows_are_as_full_as_they_can_be(vocabulary):
    "98 % at 2,048; at 8,192, 99 % where the tokens allow it, and always but for the last row."
    tok = NANO if vocabulary == "nano" else qwen()
    rows = json.loads(Path(shared("alpaca_en_demo.json")).read_text())
    samples = [turns(f"{r['instruction']}\n{r['input']}", r["output"]) for r in rows]
    encoded, report = encode_all(samples, template("qwen_chat"), tok, 8192, progress=False)
    assert not report.dropped and not report.cut_tokens
    for room in 2048, 8192:
        f = fill([len(e) for e in encoded if len(e) <= room], room)
        assert f.rows <= f.fewest + 1 and f.trimmed > .99
        assert f.share > (.98 if room == 2048 else .99) or f.best < .99
    assert sum(map(len, make_rows(encoded, 8192))) == report.tokens
