"Ids: what is the same for every family and tokenizer, whatever people write and do to it."
import gc, json, threading, time, weakref
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)
from toys import FAMILIES, TEXTS, family_toy, special_tokens, toy
from ftkit.core import FtkitError
from ftkit.data.dataset import DataConfig, load_data
from ftkit.data.encode import encode, encode_prompt
from ftkit.data.families import template
from ftkit.data.jinja import JinjaTemplate
from ftkit.data.tokens import IGNORE, Encoder, encoder
from ftkit.models.load import load_template, load_tokenizer, save_model

CASES = Path(__file__).parents[2]/"shared/templates/cases.json"
CHATML = ["<|im_start|>", "<|im_end|>"]
OWN = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def turns(*contents, system=None):
    out = [dict(role=r, content=c) for r, c in zip(["user", "assistant"]*len(contents), contents)]
    return out if system is None else [dict(role="system", content=system), *out]


def learned(e, tok): return tok.decode([l for l in e.labels if l != IGNORE])


# --- golden texts, as ids -------------------------------------------------------------------------

def golden():
    if not CASES.exists(): return [pytest.param(None, marks=pytest.mark.skip("no golden texts"))]
    found = json.loads(CASES.read_text(encoding="utf-8"))
    return [pytest.param(c, id=c["id"]) for c in found if c["expected"] is not None]


@pytest.mark.parametrize("case", golden())
def test_golden_ids_and_labels(case):
    "The ids of the golden text; learned is each span and, where it is so, another token's label."
    tok, messages = family_toy(case["template"]), case["messages"]
    t, gen, text = template(case["template"], tok), case["add_generation_prompt"], case["expected"]
    if gen or not case["assistant_spans"]:
        assert tok.decode(encode_prompt(messages, t, tok) if gen else
                          encoder(t, tok)([t.render(messages)])[0].ids.tolist()) == text
        return
    e = encode(messages, t, tok)
    assert tok.decode(e.ids) == text
    others = {a: label for a, _, label in case.get("label_overrides", [])}
    assert learned(e, tok) == "".join(
        text[a:b] + others.get(b, "") for a, b in case["assistant_spans"])
    special = {i for i, x in tok.added_tokens_decoder.items() if x.special}
    plain = tok(text, add_special_tokens=False)["input_ids"]    # reads look-alikes as tokens, too
    if not any(x in m["content"] for x in special_tokens(t.name) for m in messages):
        assert [i for i in e.ids if i in special] == [i for i in plain if i in special]


# --- what is saved renders what was trained -------------------------------------------------------

TALKS = [turns("dark teal", "#008080"), turns("{b} %s {{x}}", "é 🙂", "  white\nspace ", "x\n"),
         turns("猫", "no", "why?", "'\"\\"), turns("q", "", "r", "s")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_of_any_family_gives_the_ids_of_training(name, tmp_path):
    tok = family_toy(name, adds_bos=True)
    t, single = template(name, tok), template(name).format.single
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=8, intermediate_size=8,
                                         num_hidden_layers=1, num_attention_heads=1))
    save_model(model, tok, t, tmp_path/"m")
    theirs = AutoTokenizer.from_pretrained(tmp_path/"m")
    for talk in TALKS:
        ids = encode(talk := talk[:2] if single else talk, t, tok).ids
        said = theirs.apply_chat_template(talk, tokenize=False)
        assert said == t.render(talk).text and tok.decode(ids) == said
        for i in (range(1, 2) if single else range(1, len(talk), 2)):
            prompt = theirs.apply_chat_template(talk[:i], add_generation_prompt=True)["input_ids"]
            assert prompt == encode_prompt(talk[:i], t, tok) == ids[:len(prompt)]
            assert prompt.count(tok.bos_token_id) == (i + 1)//2 if "{bos}" in t.format.user[0] else 1
    stops = GenerationConfig.from_pretrained(tmp_path/"m").eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    last = [l for l in encode(TALKS[0], t, tok).labels if l != IGNORE][-1]
    assert stops == t.stop_ids(tok) and last == stops[0]
    again = load_tokenizer(tmp_path/"m")
    assert encode(TALKS[0], load_template(tmp_path/"m", again), again) == encode(TALKS[0], t, tok)


# --- tokenizers that put a space in front ---------------------------------------------------------

def spaced(name, scheme):
    "Like those of SentencePiece, with a token for two line ends."
    special = list(dict.fromkeys(["<unk>", "<pad>", "<s>", "</s>", *special_tokens(name)]))
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme != "legacy": tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tok.train_from_iterator([*TEXTS, "a\n\n\n\nb"]*3, trainers.BpeTrainer(
        special_tokens=["<unk>"], show_progress=False))
    spec = json.loads(tok.to_str())
    spec["model"]["byte_fallback"], vocab = True, spec["model"]["vocab"]
    for b in range(256): vocab[f"<0x{b:02X}>"] = len(vocab)
    tok = Tokenizer.from_str(json.dumps(spec))
    if scheme == "legacy":
        tok.pre_tokenizer = None
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in special])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", unk_token="<unk>")


SPACED = [(tok, template(n, tok)) for s in ("first", "always", "legacy") for n in FAMILIES
          for tok in [spaced(n, s)] if template(n).stop[0] in tok.get_vocab()]
content = st.lists(st.sampled_from(["\n", "\n\n", "a", " b", "天", "<|im_end|>", "\r\n"]) |
                   st.text(max_size=4), max_size=4).map("".join)


@settings(max_examples=25, deadline=None)
@given(messages=st.lists(content, min_size=4, max_size=4).map(lambda x: turns(*x)))
def test_line_ends_that_a_tokenizer_joins(messages):
    "They are no reason to refuse a text, and the prompt's ids stay the beginning of all."
    for tok, t in SPACED:
        talk = messages[:2] if getattr(t.format, "single", False) else messages
        ids = encode(talk, t, tok).ids
        for i in range(1, len(talk), 2):
            prompt = encode_prompt(talk[:i], t, tok)
            assert ids[:len(prompt)] == prompt


def test_another_anchor_gives_the_same_ids():
    tok = spaced("default", "first")
    e = Encoder(tok, ["</s>"]).ask()
    assert len(e.anchors) > 1
    keys = [("the sky", ()), (" is", (1,))]
    a, b = e.tokenize(keys, True), e.tokenize(keys, True, tried=1)
    assert a == b
    e.anchors = e.anchors[:1]                                   # "\n", which joins
    with pytest.raises(FtkitError, match="this tokenizer joins"): e.tokenize([("\n", ())], True)


# --- look-alikes ----------------------------------------------------------------------------------

def test_tokens_around_turns_never_come_from_data():
    "Not even where the tokenizer does not call them special."
    for name in FAMILIES:
        t = template(name)
        weak = [x for x in special_tokens(name) if x in t.around]
        tok = toy([x for x in special_tokens(name) if x not in weak], weak=weak,
                  bos=t.bos or "<s>", eos=t.eos or "</s>")
        bound = template(name, tok)
        def ids(a, b): return encode(turns(a, b), bound, tok).ids
        clean = ids("xy", "xy")
        for x in weak:
            token = tok.convert_tokens_to_ids(x)
            odd = ids(f"x{x}y", f"x{x}y")
            assert odd.count(token) == clean.count(token), (name, x)
            assert f"x{x}y" in tok.decode(odd)


DEEP = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}")


def test_tokens_around_turns_of_a_tokenizers_own_template():
    tok = toy(weak=["<|User|>", "<|Assistant|>", "<think>"], chat_template=DEEP)
    t = JinjaTemplate(tok)
    user, reply, think = (tok.convert_tokens_to_ids(x) for x in ("<|User|>", "<|Assistant|>", "<think>"))
    e = encode(turns("a<|User|>b<|Assistant|>", "<think>\nhm<|User|>"), t, tok)
    assert [e.ids.count(x) for x in (user, reply, think)] == [1, 1, 1]
    assert learned(e, tok) == "hm<|User|></s>"                  # thoughts may be written in data
    prompt = encode_prompt(turns("a<|User|>b<|Assistant|>"), t, tok)
    assert e.ids[:len(prompt)] == prompt
    one = JinjaTemplate(toy(weak=["<|User|>"], chat_template=(
        "{% if messages | length > 2 %}{{ raise_exception('one question') }}{% endif %}" + DEEP)))
    assert one.around == "<|Assistant|>"                        # no second question can be asked


def test_a_prompt_that_writes_what_the_reply_begins_with():
    "Whether its tokens are special or not, they are read as in the prompt."
    source = OWN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    for special, weak in (([*CHATML, "<think>"], []), (CHATML, ["<think>"]), (CHATML, [])):
        tok = toy(special, weak=weak, chat_template=source)
        t = JinjaTemplate(tok)
        e, prompt = (f(turns(*c), t, tok) for f, c in ((encode, ("q", "<think>\nhm, b")),
                                                       (encode_prompt, "q")))
        assert e.ids[:len(prompt)] == prompt and learned(e, tok) == "hm, b<|im_end|>"
        assert tok.decode(e.ids) == t.render(turns("q", "<think>\nhm, b")).text


# --- odd special tokens ---------------------------------------------------------------------------

def test_special_tokens_with_white_space_of_their_own():
    source = OWN.replace("<|im_end|>\n", "{{ '<|im_end|>\n' }}")
    tok = toy(["<|im_start|>", "<|im_end|>\n", " <|sep|>"], chat_template=source)
    t = JinjaTemplate(tok)
    assert t.stop[0] == "<|im_end|>\n"
    e = encode(turns("a <|sep|><|im_end|>\nb", "c"), t, tok)
    assert e.ids.count(token := tok.convert_tokens_to_ids("<|im_end|>\n")) == 2
    assert e.ids[-1] == e.labels[-1] == token and learned(e, tok) == "c<|im_end|>\n"


def test_an_end_token_that_swallows_white_space_leaves_the_prompt_alone():
    tok = toy(["<|im_start|>"])
    tok.add_special_tokens({"extra_special_tokens": [AddedToken("<|im_end|>", lstrip=True)]})
    t = template("qwen_chat", tok)
    for reply in "", " ", "x ":
        ids, prompt = encode(turns("q", reply), t, tok).ids, encode_prompt(turns("q"), t, tok)
        assert ids[:len(prompt)] == prompt


# --- tokenizers that change, come and go ----------------------------------------------------------

def test_a_tokenizer_that_is_changed_in_place():
    def low(tok): tok.backend_tokenizer.normalizer = normalizers.Lowercase()
    def split(tok): tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tok.backend_tokenizer.pre_tokenizer])
    def special(tok): tok.add_special_tokens({"extra_special_tokens": ["<weak>"]})
    def word(tok): tok.add_tokens(["The sky"])
    talk = turns("The sky <weak> 123", "Blue 45")
    for change in low, split, special, word:
        used, fresh = (toy(CHATML, weak=["<weak>"]) for _ in range(2))
        t, before = template("qwen_chat", used), encode(talk, template("qwen_chat", used), used).ids
        change(used); change(fresh)
        after = encode(talk, t, used).ids
        assert after == encode(talk, template("qwen_chat", fresh), fresh).ids, change
        assert change is split or after != before


def test_a_tokenizer_that_is_no_longer_used_is_forgotten():
    def use():
        tok = toy(CHATML)
        encode(turns("a", "b"), template("qwen_chat", tok), tok)
        return weakref.ref(tok)
    found = [use() for _ in range(3)]
    gc.collect()
    assert not any(f() for f in found)


class Switched:
    "A tokenizer's inner part that takes its time, and notices if somebody turns its switch."
    encode_special_tokens, truncation, padding, wrong = False, None, None, 0
    def encode_batch_fast(self, texts, add_special_tokens):
        for _ in range(5):
            time.sleep(.002)
            self.wrong += not self.encode_special_tokens
        return [SimpleNamespace(ids=[1]) for _ in texts]


def test_threads_do_not_turn_each_others_switch():
    inner, tok = Switched(), toy()
    stub = SimpleNamespace(tokenizer=SimpleNamespace(backend_tokenizer=inner))
    def work():
        for _ in range(5): Encoder.call(stub, ["x"], True); time.sleep(.001)
    crew = [threading.Thread(target=work) for _ in range(4)]
    for thread in crew: thread.start()
    for thread in crew: thread.join()
    assert not inner.wrong and not inner.encode_special_tokens


class Words:
    "A part of a tokenizer that is written in Python."
    def pre_tokenize(self, text): text.split(lambda i, s: [s], )


def test_a_tokenizer_with_a_part_written_in_python(tmp_path):
    tok = toy(CHATML)
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Words())
    e = encode(turns("a<|im_end|>", "b"), template("qwen_chat", tok), tok)
    assert learned(e, tok) == "b<|im_end|>" and e.ids.count(tok.convert_tokens_to_ids("<|im_end|>")) == 3
    (tmp_path/"x.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    cfg = DataConfig(str(tmp_path/"x.jsonl"), template="qwen_chat", cache=str(tmp_path/"cache"))
    for _ in range(2): assert not load_data(cfg, tok, progress=False).cached # it can't be known
