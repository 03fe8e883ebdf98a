"Vocabularies of SentencePiece and tiktoken: ids against the programs that made them, and what transformers loads alone."
import base64, io, json, os, shutil, subprocess, sys, unicodedata
from functools import cache
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from ftkit.core import FtkitError
from ftkit.data.encode import encode_prompt
from ftkit.data.families import template
from ftkit.models.load import load_tokenizer
from ftkit.models.tokenizers import (
    GLM4_WORDS, QWEN_WORDS, _parsed, bpe_merges, read_tiktoken, read_tokenizer, sentencepiece_tokenizer,
    tiktoken_tokenizer)

spm, tiktoken = pytest.importorskip("sentencepiece"), pytest.importorskip("tiktoken")
QWEN = Path(__file__).parents[2]/"shared/data/qwen.tiktoken"
TEXTS = ["the quick brown fox jumps over the lazy dog", "What colour is the sky at night?",
         "def double(x):\n    return x*2  # twice\n", "天空是蓝色的，海也是蓝色的。", "你好，世界！ user system",
         "  indented\ttext  with   spaces", "[Round 1]\n\n问：天空是什么颜色？\n\n答：蓝色", "<用户>你好<AI>"]*6
POOL = ["the ", " sky", "blue", "天空", "你好", "😀", "👩‍👩‍👧", "\n", "\n\n", "  ", " ", "\t", "▁", "<s>", "</s>",
        "<unk>", "<0x41>", "<|im_end|>", "[gMASK]", "sop", "<reserved_106>", "\x00", "\x7f", "\r\n",
        "def f(x):", "e\u0301", "é", "ﬁ", "\u3000", "\u00a0", "\u200b", "123", "ＡＢ", "aa", "ing"]
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
ANY = st.lists(st.one_of(st.sampled_from(POOL), st.text(CHARACTERS, max_size=6)), max_size=8).map("".join)
PLAIN = dict(model_type="bpe", vocab_size=600, byte_fallback=True, add_dummy_prefix=True,
             normalization_rule_name="identity", remove_extra_whitespaces=False)


@cache
def trained(*options):
    "Bytes of a small SentencePiece model."
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=out, num_threads=1,
                                   minloglevel=2, hard_vocab_limit=False,
                                   **PLAIN | {k: list(v) if type(v) is tuple else v for k, v in options})
    return out.getvalue()


def sp(**options): return trained(*((k, tuple(v) if type(v) is list else v) for k, v in options.items()))


@cache
def pair(*options):
    data = trained(*options)
    tok = sentencepiece_tokenizer(_parsed(data))
    tok.encode_special_tokens = True
    return spm.SentencePieceProcessor(model_proto=data), tok


def ids(tok, text): return tok.encode(text, add_special_tokens=False).ids


# --- ids of SentencePiece -------------------------------------------------------------------------

KINDS = [(), (("add_dummy_prefix", False),), (("byte_fallback", False),),
         (("remove_extra_whitespaces", True),),
         (("add_dummy_prefix", False), ("user_defined_symbols", ("sky", "\n\n", "▁▁", "aa"))),
         (("user_defined_symbols", ("<|im_end|>", "<reserved_106>")),),
         (("control_symbols", ("<c>", "[gMASK]")), ("split_digits", True)),
         (("model_type", "unigram"),), (("model_type", "unigram"), ("add_dummy_prefix", False))]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@settings(max_examples=120, deadline=None)
@given(text=ANY)
def test_ids_are_those_of_sentencepiece(kind, text):
    theirs, tok = pair(*kind)
    if "<|im_end|>" in str(kind): # a special token of ours, which data must not become
        text = text.replace("<|im_end|>", "").replace("<reserved_106>", "")
    want, found = theirs.encode(text), ids(tok, text)
    if "unigram" in str(kind) and found != want: # two cuts of one probability: either may be taken
        score = lambda cut: sum(map(theirs.get_score, cut))
        assert score(found) == pytest.approx(score(want), abs=1e-3)
        assert theirs.decode(found) == theirs.decode(want)
    else: assert found == want
    back = theirs.decode(want)
    if "⁇" not in back: assert tok.decode(want) == back
    if theirs.unk_id() not in want and ("remove_extra_whitespaces", True) not in kind:
        assert tok.decode(want) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_byte_and_long_runs(kind):
    theirs, tok = pair(*kind)
    runs = [] if "unigram" in str(kind) else [" "*70, "a"*70, "\n"*9, "=-"*40] # there, sums may be equal
    for text in [*map(chr, range(0x250)), *runs, "ab "*200, ""]:
        assert ids(tok, text) == theirs.encode(text)


@settings(max_examples=120, deadline=None)
@given(text=ANY)
def test_defined_symbols_behind_a_space(text):
    "A text that is one such symbol alone lacks the space in front; all others have it."
    theirs, tok = pair(("user_defined_symbols", ("sky", "\n\n", "aa")))
    if text not in ("sky", "\n\n", "aa"): assert ids(tok, text) == theirs.encode(text)
    assert ids(tok, "sky") == theirs.encode("sky")[1:]


@pytest.mark.parametrize("squeeze", [True, False])
def test_a_table_of_characters(squeeze):
    "Where marks follow letters, `tokenizers` applies such a table in its own way."
    theirs, tok = pair(("normalization_rule_name", "nmt_nfkc"), ("remove_extra_whitespaces", squeeze))
    for text in [*TEXTS, "ﬁve ＡＢ㌔", "\x01a", "\t tabs\n", "\u3000天空", "e\u0301é"]:
        assert ids(tok, text) == theirs.encode(text)


def test_runs_that_share_a_score():
    "Llama gives runs of spaces of all lengths one score; the leftmost pair goes first."
    spec = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    spec.ParseFromString(sp())
    for n in range(2, 17):
        if "▁"*n not in {p.piece for p in spec.pieces}:
            spec.pieces.add(piece="▁"*n, score=-1e9)
    for p in spec.pieces:
        if len(p.piece) > 1 and set(p.piece) == {"▁"}: p.score = -1e9
    data = spec.SerializeToString()
    theirs, tok = spm.SentencePieceProcessor(model_proto=data), sentencepiece_tokenizer(_parsed(data))
    for n in range(60):
        for text in " "*n, " "*n + "x", "x" + " "*n + "the": assert ids(tok, text) == theirs.encode(text)


def test_no_text_becomes_a_special_token():
    for kind in KINDS:
        _, tok = pair(*kind)
        special = {i for i, t in tok.get_added_tokens_decoder().items() if t.special}
        for i in special - {0}: # unknown characters do become <unk>
            text = tok.id_to_token(i)
            assert not special - {0} & set(ids(tok, f"a {text}{text}b"))
            assert i not in ids(tok, text)


def test_markup_of_any_type_is_special():
    "Whatever the trainer called a piece like <reserved_106>: markup finds it, data can't make it."
    spec = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    spec.ParseFromString(sp())
    for kind in 1, 4, 5:
        spec.pieces.add(piece=f"<reserved_{kind}>", score=-999, type=kind)
    tok = sentencepiece_tokenizer(_parsed(spec.SerializeToString()))
    n = len(spec.pieces)
    assert ids(tok, "<reserved_1><reserved_4><reserved_5>") == [n - 3, n - 2, n - 1]
    tok.encode_special_tokens = True
    assert not {n - 3, n - 2, n - 1} & set(ids(tok, "<reserved_1> <reserved_4> <reserved_5>"))


def test_unused_pieces():
    spec = pytest.importorskip("sentencepiece.sentencepiece_model_pb2").ModelProto()
    spec.ParseFromString(sp())
    unused = next(p for p in spec.pieces if p.piece == "▁the")
    unused.type = 5
    data = spec.SerializeToString()
    theirs, tok = spm.SentencePieceProcessor(model_proto=data), sentencepiece_tokenizer(_parsed(data))
    for text in TEXTS: assert ids(tok, text) == theirs.encode(text)


# --- ids of tiktoken ------------------------------------------------------------------------------

@cache
def qwen():
    if not QWEN.exists(): pytest.skip("Qwen's vocabulary is not here")
    ranks = read_tiktoken(QWEN)
    return tiktoken.Encoding("qwen", pat_str=QWEN_WORDS, mergeable_ranks=ranks, special_tokens={}), \
        tiktoken_tokenizer(ranks, QWEN_WORDS, composed=True)


@cache
def small_ranks():
    if not QWEN.exists(): pytest.skip("Qwen's vocabulary is not here")
    return {p: r for p, r in read_tiktoken(QWEN).items() if r < 5000}


@settings(max_examples=300, deadline=None)
@given(text=ANY)
def test_ids_are_those_of_tiktoken(text):
    theirs, tok = qwen()
    text = unicodedata.normalize("NFC", text)
    assert ids(tok, text) == theirs.encode_ordinary(text)
    assert tok.decode(ids(tok, text)) == text
    assert ids(tok, unicodedata.normalize("NFD", text)) == ids(tok, text)


def test_every_byte_and_every_token_of_qwen():
    theirs, tok = qwen()
    for text in [*map(chr, range(0x250)), *TEXTS, " "*200, "\n"*50, "1234567", "I'll", "可口可乐😀"]:
        assert ids(tok, text) == theirs.encode_ordinary(unicodedata.normalize("NFC", text))
    for i in range(0, theirs.n_vocab, 37):
        assert tok.decode([i]) == theirs.decode([i])
    by_pairs = Tokenizer.from_str(tok.to_str()) # as transformers does it for models of type qwen2
    by_pairs.model.ignore_merges = False
    words = [theirs.decode([i]) for i in range(0, theirs.n_vocab, 37)]
    assert [ids(by_pairs, w) for w in words] == [ids(tok, w) for w in words]


@settings(max_examples=100, deadline=None)
@given(text=ANY)
def test_words_of_glm4(text):
    ranks = small_ranks()
    theirs = tiktoken.Encoding("glm", pat_str=GLM4_WORDS, mergeable_ranks=ranks, special_tokens={})
    assert ids(tiktoken_of(GLM4_WORDS), text) == theirs.encode_ordinary(text)


@cache
def tiktoken_of(words): return tiktoken_tokenizer(small_ranks(), words)


def test_merges():
    assert bpe_merges({"a": 0, "b": 1}) == [] and bpe_merges({}) == []
    assert bpe_merges({"a": 0, "aa": 1, "aaa": 1}) == [("aa", "a"), ("a", "a"), ("a", "aa")]


# --- families -------------------------------------------------------------------------------------

def added(*texts, start): return {str(start + i): dict(content=t, special=True) for i, t in enumerate(texts)}


def remote(name, **more):
    return dict(tokenizer_class=name, auto_map={"AutoTokenizer": [f"tokenization_x.{name}", None]}, **more)


IM = "<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"
RESERVED = tuple(f"<reserved_{i}>" for i in range(100, 110))
UNUSED = tuple(f"[UNUSED_TOKEN_{i}]" for i in range(140, 146))
INTERNLM2 = remote("InternLM2Tokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
                   additional_special_tokens=list(IM), model_max_length=10**30, clean_up_tokenization_spaces=False,
                   added_tokens_decoder={**added("<unk>", "<s>", "</s>", start=0), **added(*IM, start=3)})
GLM = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
       "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
       "<|begin_of_video|>", "<|end_of_video|>"]
LLAMA = dict(tokenizer_class="LlamaTokenizer", bos_token=dict(__type="AddedToken", content="<s>"),
             eos_token="</s>", unk_token="<unk>", model_max_length=4096)


def base64_lines(ranks): return b"".join(base64.b64encode(p) + b" %d\n" % r for p, r in ranks.items())


FAMILIES = { # file, its content, tokenizer_config.json, config.json
    "internlm": ("tokenizer.model", lambda: sp(user_defined_symbols=["<eoh>", "<eoa>"]),
                 remote("InternLMTokenizer"), dict(model_type="internlm")),
    "internlm2": ("tokenizer.model", lambda: sp(user_defined_symbols=UNUSED, add_dummy_prefix=False),
                  INTERNLM2, dict(model_type="internlm2")),
    "chatglm2": ("tokenizer.model", sp, remote("ChatGLMTokenizer", name_or_path="THUDM/chatglm2-6b"),
                 dict(model_type="chatglm", padded_vocab_size=700, vocab_size=700)),
    "chatglm3": ("tokenizer.model", sp, remote("ChatGLMTokenizer", add_bos_token=False),
                 dict(model_type="chatglm", padded_vocab_size=700)),
    "glm4": ("tokenizer.model", lambda: base64_lines(small_ranks()),
             remote("ChatGLM4Tokenizer", padding_side="left", added_tokens_decoder=added(*GLM, start=5000),
                    eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=128000),
             dict(model_type="chatglm", padded_vocab_size=5120)),
    "qwen": ("qwen.tiktoken", lambda: base64_lines(small_ranks()), remote("QWenTokenizer", model_max_length=8192),
             dict(model_type="qwen", vocab_size=5248)),
    "baichuan": ("tokenizer.model", lambda: sp(user_defined_symbols=RESERVED),
                 remote("BaichuanTokenizer", add_bos_token=False, pad_token=dict(content="<unk>")),
                 dict(model_type="baichuan")),
    "baichuan2": ("tokenizer.model", lambda: sp(user_defined_symbols=RESERVED, add_dummy_prefix=False),
                  remote("BaichuanTokenizer", add_bos_token=False, add_eos_token=False, model_max_length=4096),
                  dict(model_type="baichuan")),
    "yi": ("tokenizer.model", lambda: sp(bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", add_dummy_prefix=False),
           remote("YiTokenizer", add_bos_token=False, bos_token="<|startoftext|>", eos_token="<|endoftext|>"),
           dict(model_type="Yi")),
    "minicpm": ("tokenizer.model", sp, LLAMA, dict(model_type="minicpm")),
    "llama": ("tokenizer.model", sp, dict(LLAMA, legacy=False, padding_side="right"), dict(model_type="llama"))}
PREFIX = dict(internlm=["<s>"], internlm2=["<s>"], chatglm2=["[gMASK]", "sop"], chatglm3=["[gMASK]", "sop"],
              glm4=["[gMASK]", "<sop>"], minicpm=["<s>"], llama=["<s>"])
NATIVE = dict(qwen="qwen2", chatglm2="glm", chatglm3="glm", glm4="glm") # all others: llama


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "By the name of a family: the folder and what is read from it."
    known = {}
    def make(name):
        if name not in known:
            file, content, own, config = FAMILIES[name]
            folder = tmp_path_factory.mktemp(name)
            (folder/file).write_bytes(content())
            (folder/"tokenizer_config.json").write_text(json.dumps(own))
            (folder/"config.json").write_text(json.dumps(config))
            known[name] = folder, read_tokenizer(folder, config)
        return known[name]
    return make


SAMPLES = [*TEXTS[:8], "", " ", "  two", "天\n 空", "<|im_start|>user\n<|im_end|>", "<s>", "philosopher sop", "😀",
           "<|user|>\n hi<|assistant|>", "<reserved_106>x<reserved_107> y", "[gMASK]sop<|user|>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_comes_before_a_text(made, name):
    _, tok = made(name)
    front = tok.convert_tokens_to_ids(PREFIX.get(name, []))
    assert None not in front and tok.unk_token_id not in front
    for text in SAMPLES:
        assert tok(text)["input_ids"] == front + tok(text, add_special_tokens=False)["input_ids"]
    assert tok.padding_side == ("left" if PREFIX.get(name, [""])[0] == "[gMASK]" else "right")
    assert tok.pad_token_id is not None or name in ("minicpm", "llama", "baichuan2")
    assert isinstance(tok, PreTrainedTokenizerFast) and set(tok("a")) == {"input_ids", "attention_mask"}


def test_names_and_numbers(made):
    n = len(spm.SentencePieceProcessor(model_proto=sp()))
    glm2, glm3, glm4, qwen, lm2 = (made(k)[1] for k in ("chatglm2", "chatglm3", "glm4", "qwen", "internlm2"))
    assert [glm3.convert_tokens_to_ids(t) - n for t in ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>",
                                                        "<|user|>", "<|assistant|>", "<|observation|>")] == [*range(9)]
    assert len(glm2) == n + 5 and len(glm3) == n + 9
    assert (glm3.pad_token_id, glm3.eos_token_id, glm3.bos_token) == (0, 2, None)
    assert glm4.convert_tokens_to_ids(GLM) == [*range(5000, 5014)] and glm4.eos_token == glm4.pad_token == GLM[0]
    assert qwen.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
                                      ) == [5000, 5001, 5002, 5003, 5207]
    assert len(qwen) == 5208 and qwen.bos_token is None and qwen.eos_token_id == qwen.pad_token_id == 5000
    assert lm2.convert_tokens_to_ids(list(IM)) == [*range(3, 9)] and lm2.convert_ids_to_tokens(8) == "<|im_start|>"
    assert "[UNUSED_TOKEN_140]" not in lm2.get_vocab() and lm2.pad_token_id == lm2.eos_token_id == 2
    assert qwen.model_max_length == 8192 and made("llama")[1].model_max_length == 4096
    assert made("yi")[1].bos_token == "<|startoftext|>" and made("baichuan")[1].pad_token_id == 0


def test_a_word_is_no_token(made):
    tok = made("chatglm3")[1]
    sop = tok.convert_tokens_to_ids("sop")
    assert sop not in tok("philosopher sopsop", add_special_tokens=False)["input_ids"]
    assert tok("[gMASK]sop<|user|>", add_special_tokens=False)["input_ids"] == tok.convert_tokens_to_ids(
        ["[gMASK]", "sop", "<|user|>"])


ALONE = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
texts, out = json.loads(Path("texts.json").read_text()), {}
for folder in Path("saved").iterdir():
    tok = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    told = [tok(t)["input_ids"] for t in texts]
    out[folder.name] = [
        told, [tok.decode(i, skip_special_tokens=True) for i in told], tok.padding_side,
        tok.model_max_length, tok.eos_token_id, tok.pad_token_id, tok.bos_token_id, len(tok),
        tok.chat_template, list(tok("a")), tok(texts[0], texts[1])["input_ids"]]
print(json.dumps(out))
assert "ftkit" not in sys.modules
"""


def test_transformers_loads_them_alone(made, tmp_path):
    want = {}
    for name in FAMILIES:
        _, tok = made(name)
        tok.save_pretrained(to := tmp_path/"saved"/name)
        assert not any("auto_map" in f.read_text(encoding="utf-8") for f in to.iterdir())
        (to/"config.json").write_text(json.dumps(dict(model_type=NATIVE.get(name, "llama"))))
        ids_ = [tok(t)["input_ids"] for t in SAMPLES]
        want[name] = [ids_, [tok.decode(i, skip_special_tokens=True) for i in ids_], tok.padding_side,
                      tok.model_max_length, tok.eos_token_id, tok.pad_token_id, tok.bos_token_id, len(tok),
                      tok.chat_template, ["input_ids", "attention_mask"], tok(SAMPLES[0], SAMPLES[1])["input_ids"]]
    (tmp_path/"texts.json").write_text(json.dumps(SAMPLES))
    other = os.environ.get("FTKIT_TEST_TRANSFORMERS", "") # a folder with another version
    env = os.environ | dict(HF_HUB_OFFLINE="1", PYTHONPATH=other)
    done = subprocess.run([sys.executable, "-c", ALONE], text=True, cwd=tmp_path, env=env,
                          stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.keys() == want.keys()
    for name in told: assert told[name] == want[name], name


# --- chats: the ids that the families' own code puts together -------------------------------------

TALK = [dict(role="user", content="What colour is <|im_end|></s> the sky?"),
        dict(role="assistant", content="blue 蓝色"), dict(role="user", content="天空 at night?")]


def chat(name, theirs, tok):
    "What the official code of a family does with a conversation, for replies to come."
    def t(*texts): return tok.convert_tokens_to_ids(list(texts))
    encode, said = theirs.encode, [m["content"] for m in TALK]
    roles = ["user", "assistant", "user"]
    if name == "chatglm3":
        return sum(([*t(f"<|{r}|>"), *encode("\n"), *encode(s)] for r, s in zip(roles, said)),
                   t("[gMASK]", "sop")) + t("<|assistant|>")
    if name.startswith("baichuan"):
        marks = t(*(["<reserved_102>", "<reserved_103>"] if name == "baichuan" else ["<reserved_106>", "<reserved_107>"]))
        return sum(([marks[r == "assistant"], *encode(s)] for r, s in zip(roles, said)), []) + marks[1:]
    def turn(r, s): # slow tokenizers encode what lies between two special tokens by itself
        return [*t("<|im_start|>"), *encode(f"{r}\n{s}"), *t("<|im_end|>"), *encode("\n")]
    front = t("<s>") if name == "internlm2" else turn("system", "You are a helpful assistant.")
    return sum((turn(r, s) for r, s in zip(roles, said)), front) + t("<|im_start|>") + encode("assistant\n")


@pytest.mark.parametrize("name, chat_name", [("chatglm3", "chatglm3"), ("internlm2", "internlm2_chat"),
                                             ("baichuan", "baichuan_chat"), ("baichuan2", "baichuan2_chat"),
                                             ("qwen", "qwen_chat")])
def test_prompts_have_the_ids_of_the_official_code(made, name, chat_name):
    folder, tok = made(name)
    if name == "qwen":
        theirs = tiktoken.Encoding("q", pat_str=QWEN_WORDS, mergeable_ranks=small_ranks(), special_tokens={})
        theirs.encode = theirs.encode_ordinary
    else: theirs = spm.SentencePieceProcessor(str(folder/"tokenizer.model"))
    got, want = encode_prompt(TALK, template(chat_name), tok), chat(name, theirs, tok)
    if name in ("chatglm3", "baichuan", "baichuan2"): assert got == want
    else: # a reply is cut from what is in front of it
        assert [i for i in got if i >= 0 and tok.convert_ids_to_tokens(i) in IM] == [
            i for i in want if tok.convert_ids_to_tokens(i) in IM]
        assert tok.decode(got) == tok.decode(want)
        assert encode_prompt(TALK[2:], template(chat_name), tok) == chat_of_one(name, theirs, tok)


def chat_of_one(name, theirs, tok):
    global TALK
    kept, TALK = TALK, TALK[2:]
    try: return chat(name, theirs, tok)
    finally: TALK = kept


def test_rounds_of_chatglm2_and_marks_of_minicpm(made):
    for name, chat_name, front in (("chatglm2", "chatglm2", ["[gMASK]", "sop"]), ("minicpm", "minicpm", ["<s>"])):
        folder, tok = made(name)
        theirs = spm.SentencePieceProcessor(str(folder/"tokenizer.model"))
        prompt = template(chat_name, tok).render(TALK[2:], True).text.removeprefix("".join(front))
        assert encode_prompt(TALK[2:], template(chat_name), tok) == (
            tok.convert_tokens_to_ids(front) + theirs.encode(prompt))


def test_jinja_of_the_template_renders_the_same_ids(made):
    for name, chat_name in (("chatglm3", "chatglm3"), ("internlm2", "internlm2_chat"), ("qwen", "qwen_chat")):
        _, tok = made(name)
        t = template(chat_name, tok)
        plain = [dict(role="user", content="天空 at night?")]
        text = tok.apply_chat_template(plain, chat_template=t.jinja, add_generation_prompt=True, tokenize=True,
                                       return_dict=False)
        assert text == encode_prompt(plain, t, tok)
        assert tok.chat_template is None


# --- where transformers is right, and folders that are wrong --------------------------------------

def folder_with(tmp_path, **files):
    for name, content in files.items():
        name = name.replace("__", ".")
        if not isinstance(content, (bytes, str)): content = json.dumps(content)
        (tmp_path/name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_left_to_transformers(tmp_path, made):
    plain = dict(tokenizer_class="PreTrainedTokenizerFast")
    _, tok = made("qwen")
    json_text = tok.backend_tokenizer.to_str()
    f = folder_with(tmp_path, tokenizer__json=json_text, tokenizer_config__json=plain)
    assert read_tokenizer(f, dict(model_type="qwen2")) is None
    for own in dict(tokenizer_class="T5Tokenizer"), dict(tokenizer_class="GemmaTokenizer"), {}:
        f = folder_with(tmp_path, tokenizer_config__json=own)
        assert read_tokenizer(f, dict(model_type="t5")) is None


def test_a_ready_file_beside_code_is_enough(tmp_path, made):
    _, tok = made("internlm2")
    tok.save_pretrained(tmp_path)
    own = json.loads((tmp_path/"tokenizer_config.json").read_text())
    own |= remote("SomeTokenizer", chat_template="{{ messages }}")
    f = folder_with(tmp_path, tokenizer_config__json=own)
    again = read_tokenizer(f, dict(model_type="internlm2"))
    assert [again(t)["input_ids"] for t in SAMPLES] == [tok(t)["input_ids"] for t in SAMPLES]
    assert again.chat_template == "{{ messages }}" and again.pad_token == "</s>"
    again.save_pretrained(tmp_path/"out")
    assert "auto_map" not in (tmp_path/"out/tokenizer_config.json").read_text()


def test_a_ready_file_that_is_broken(tmp_path):
    for content, message in (b"{", "not a tokenizer"), (POINTER, "Git LFS"):
        f = folder_with(tmp_path, tokenizer__json=content, tokenizer_config__json=remote("X"))
        with pytest.raises(FtkitError, match=message): read_tokenizer(f, {})


def test_a_llama_file_is_taken_at_its_word(tmp_path):
    "transformers builds a LlamaTokenizer anew, with a space in front that this file does not have."
    data = sp(add_dummy_prefix=False)
    theirs = spm.SentencePieceProcessor(model_proto=data)
    f = folder_with(tmp_path, tokenizer__json=sentencepiece_tokenizer(_parsed(data)).to_str(),
                    tokenizer_config__json=dict(LLAMA, tokenizer_class="LlamaTokenizerFast", add_bos_token=True))
    tok = read_tokenizer(f, dict(model_type="llama"))
    assert tok("the sky")["input_ids"] == [1, *theirs.encode("the sky")]


def test_spaces_after_special_tokens(made, tmp_path):
    _, tok = made("llama") # legacy=False: as transformers has it
    data = FAMILIES["llama"][1]()
    folder_with(tmp_path, tokenizer__model=data, tokenizer_config__json=dict(LLAMA, legacy=False))
    own = AutoTokenizer.from_pretrained(tmp_path)
    for text in "the sky", "the<s>sky</s>sky", "天空\n":
        assert tok(text)["input_ids"] == [1, *own(text, add_special_tokens=False)["input_ids"]]
    old = folder_with(tmp_path, tokenizer_config__json=LLAMA)
    theirs = spm.SentencePieceProcessor(model_proto=data)
    assert read_tokenizer(old, dict(model_type="llama"))("the</s>sky")["input_ids"] == [
        1, *theirs.encode("the"), 2, *theirs.encode("sky")]


def test_without_a_configuration_of_its_own(tmp_path):
    f = folder_with(tmp_path, tokenizer__model=sp(), added_tokens__json={"<|pad|>": len(spm.SentencePieceProcessor(model_proto=sp()))},
                    special_tokens_map__json=dict(pad_token="<|pad|>"))
    tok = read_tokenizer(f, dict(model_type="baichuan"))
    assert tok.pad_token_id == len(tok) - 1 and tok("a")["input_ids"][0] == 1
    assert tok("<|pad|>")["input_ids"][1:] == [tok.pad_token_id]


def test_templates_that_come_along(tmp_path):
    several = [dict(name="default", template="{{ 1 }}"), dict(name="rag", template="{{ 2 }}")]
    f = folder_with(tmp_path, tokenizer__model=sp(), tokenizer_config__json=remote("InternLM2Tokenizer", chat_template=several))
    assert read_tokenizer(f, {}).get_chat_template() == "{{ 1 }}"
    f = folder_with(tmp_path, chat_template__jinja="{{ 3 }}")
    assert read_tokenizer(f, {}).chat_template == "{{ 3 }}"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1477754\n"


@pytest.mark.parametrize("content, message", [
    (POINTER, "pointer of Git LFS"), (b"", "cut short"), (b"\x80\x02K\x01.", "not a vocabulary"),
    (lambda: sp()[:3000], "cut short"), (lambda: sp()[:-60], "cut short"),
    (b'{"model": {}}', "not a vocabulary"), (lambda: sp(model_type="word"), "settings")])
@pytest.mark.parametrize("name", ["ChatGLMTokenizer", "InternLM2Tokenizer", "LlamaTokenizer"])
def test_files_that_are_no_vocabulary(tmp_path, name, content, message):
    f = folder_with(tmp_path, tokenizer__model=content() if callable(content) else content,
                    tokenizer_config__json=remote(name))
    with pytest.raises(FtkitError, match=message) as e: read_tokenizer(f, {})
    assert "tokenizer.model" in str(e.value) and e.value.fix


def test_cut_at_any_byte():
    data = sp()
    for n in range(0, len(data), 97):
        try: _parsed(data[:n])
        except (IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError): continue
        assert n > len(data) - 50


def test_vocabularies_that_do_not_fit(tmp_path):
    f = folder_with(tmp_path, tokenizer__model=sp(), tokenizer_config__json=remote("ChatGLMTokenizer"))
    with pytest.raises(FtkitError, match="only 100 rows"): read_tokenizer(f, dict(padded_vocab_size=100))
    n = len(spm.SentencePieceProcessor(model_proto=sp()))
    for start in n + 3, 5:
        f = folder_with(tmp_path, tokenizer_config__json=remote(
            "InternLM2Tokenizer", added_tokens_decoder=added("<s>" if start == 5 else "<|x|>", start=start)))
        with pytest.raises(FtkitError, match="tokenizer.model.*(cut short|has it as 5)"): read_tokenizer(f, {})
    cut = base64_lines(dict([*small_ranks().items()][:3000]))
    f = folder_with(tmp_path, qwen__tiktoken=cut, tokenizer_config__json=remote("QWenTokenizer"))
    with pytest.raises(FtkitError, match="expected 151643 tokens, found 3000"):
        read_tokenizer(f, dict(model_type="qwen", vocab_size=151936))
    for wrong in cut[:-3], cut + b"!! 7\n", POINTER:
        f = folder_with(tmp_path, qwen__tiktoken=wrong)
        with pytest.raises(FtkitError, match="line 300|ranks are not|Git LFS"): read_tokenizer(f, {})


def test_code_that_nobody_knows(tmp_path):
    f = folder_with(tmp_path, tokenizer__model=sp(), tokenizer_config__json=remote("OrionTokenizer"))
    with pytest.raises(FtkitError, match="OrionTokenizer.*never runs"): read_tokenizer(f, {})
    (tmp_path/"tokenizer.model").unlink()
    f = folder_with(tmp_path, tokenizer_config__json=remote("QWenTokenizer"))
    with pytest.raises(FtkitError, match="no qwen.tiktoken here"): read_tokenizer(f, {})


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"])
@pytest.mark.parametrize("content", ["[1]", "3", "null"])
def test_settings_that_are_none(tmp_path, file, content):
    load_tokenizer("nano").save_pretrained(tmp_path)
    (tmp_path/"config.json").write_text('{"model_type": "llama"}')
    (tmp_path/file).write_text(content)
    with pytest.raises(FtkitError, match=f"{file}: expected settings in"): load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [
    dict(added_tokens_decoder=v) for v in (3, [1], "x", {"a": 1}, {"0": "x"}, {"x": {"content": "a"}}, {"0": {}})] + [
    dict(tokenizer_class=v) for v in (3, [1], {"a": 1})])
def test_settings_that_make_no_sense(tmp_path, change):
    load_tokenizer("nano").save_pretrained(tmp_path)
    (tmp_path/"config.json").write_text('{"model_type": "llama"}')
    own = json.loads((tmp_path/"tokenizer_config.json").read_text())
    (tmp_path/"tokenizer_config.json").write_text(json.dumps({**own, **change}))
    with pytest.raises(FtkitError, match="tokenizer_config.json: (the added tokens are not|tokenizer_class is no)"):
        load_tokenizer(tmp_path)
