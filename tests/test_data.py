"From files to packed rows: random text, bad input, speed and real samples."
import contextlib
import io
import json
import re
import time
from html import escape
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from ftkit.core import FtkitError
from ftkit.data.dataset import DataConfig, load_data
from ftkit.data.encode import IGNORE, Encoded, encode, encode_all, encode_prompt
from ftkit.data.formats import find_layout, read_rows
from ftkit.data.packing import collate, make_rows, pack
from ftkit.data.preview import preview, token_texts
from ftkit.data.messages import Message
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
        assert (labels == 0).sum() == 1 and labels[:len(row)].tolist() == row.labels
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
    rows = pack([1 + i*7919 % 511 for i in range(300_000)], 512)
    assert time.process_time() - start < 5 and sum(map(len, rows)) == 300_000


# --- packing --------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 32), max_size=60), extra=st.integers(0, 8))
def test_pack_keeps_samples_whole(lengths, extra):
    room = max(lengths, default=1) + extra
    rows = pack(lengths, room)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths))) and all(rows)
    used = [sum(lengths[i] for i in r) for r in rows]
    assert all(u <= room for u in used) and rows == pack(lengths, room)
    assert sum(2*u <= room for u in used) <= 1          # two half-empty rows would have been one


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_rows(lengths):
    samples = [Encoded([100*k + i for i in range(n)], [100*k + i for i in range(n)])
               for k, n in enumerate(lengths, 1)]
    found = []
    for row in make_rows(samples, 12):
        assert len(row.ids) == len(row.labels) == len(row.positions) == row.starts[-1] <= 12
        for a, b in zip(row.starts, row.starts[1:]):
            assert row.positions[a:b] == list(range(b - a))
            assert row.labels[a:b] == [IGNORE, *row.ids[a + 1:b]]
            found.append(row.ids[a:b])
    assert sorted(found) == [s.ids for s in samples]
    batch = collate(make_rows(samples, 12), 7, torch.bool)
    learned = (batch["labels"] != IGNORE).sum().item()
    assert learned == sum(lengths) - len(lengths) == sum(s.learned for s in samples)
    assert batch["attention_mask"].diagonal(dim1=2, dim2=3).all()  # nobody sees nothing


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
        changed[k].ids[a:b] = [(i + 1) % 64 for i in changed[k].ids[a:b]]
        out = run(changed)
        for k2, a2, b2 in spans: assert torch.equal(out[k2, a2:b2],
                                                    base[k2, a2:b2]) == ((k, a) != (k2, a2))
    by_ids = {tuple(r.ids[a:b]): base[k, a:b] for k, r in enumerate(rows) for a,
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
    for i, e in zip(data.report.source, data.encoded): documents.setdefault(i, []).extend(e.ids)
    for i, row in enumerate(read_rows(shared("c4_demo.jsonl"))):
        assert NANO.decode(documents[i], clean_up_tokenization_spaces=False) == row["text"] + "</s>"
    assert sum(e.ids.count(NANO.eos_token_id) for e in data.encoded) == data.report.rows
