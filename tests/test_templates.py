"Templates against golden texts, against their own Jinja, and the ways in which they refuse."
import json
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from ftkit.core import FtkitError
from ftkit.data.families import template, template_names
from ftkit.data.jinja import JinjaTemplate
from ftkit.data.messages import Message, as_messages
from ftkit.data.templates import _CHATML, ChatFormat, ChatTemplate

CASES = Path(__file__).parents[2]/"shared/templates/cases.json"
NAMED = ["default", "qwen_chat", "internlm2_chat"]
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(special=SPECIAL, chat_template=None, texts=(), **kwargs):
    "A tokenizer of bytes and a few merges."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tok.train_from_iterator(["the sky is blue", "user assistant system", *texts], trainer)
    names = {k: v for k, v in dict(bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>").items() if v in special}
    out = PreTrainedTokenizerFast(tokenizer_object=tok, **{**names, **kwargs})
    out.chat_template = chat_template
    return out


def turns(*contents, system=None):
    roles = ["user", "assistant"]*len(contents)
    return ([dict(role="system", content=system)] if system is not None else []) + [
        dict(role=r, content=c) for r, c in zip(roles, contents)]


# --- golden texts ---------------------------------------------------------------------------------

def _around(before, after): return lambda role: (before.replace("ROLE", role), after)
_llama3 = _around("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>")
_cohere = _around("<|START_OF_TURN_TOKEN|><|ROLE_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
_phi = _around("<|ROLE|>\n", "<|end|>\n")
_zephyr = _around("<|ROLE|>\n", "{eos}\n")
_llama2 = dict(user=("{bos}[INST] ", " [/INST]"), reply="", lead=" ", end=" {eos}",
               trim=True, fold_system=True,
               system=("<<SYS>>\n", "\n<</SYS>>\n\n"))
_deepseek = dict(user=("User: ", "\n\n"), reply="Assistant:", lead=" ", end="<｜end▁of▁sentence｜>",
                 system=("", "\n\n"),
                 bos="<｜begin▁of▁sentence｜>")
_vicuna = dict(user=("USER: ", " "), reply="ASSISTANT:", lead=" ", system=("", " "),
               opening="A chat between a curious user and an artificial intelligence assistant. "
                       "The assistant gives helpful, detailed, and polite answers to the user's "
                       "questions. ")
# Other forms in use, to show that an entry in the table is all that they take.
OTHERS = {f.name: f for f in (
    ChatFormat("internlm_chat", user=("<|User|>:", "\n"), system=("<|System|>:", "\n"),
               reply="<|Bot|>:", end="<eoa>",
               after="\n", bos="<s>"),
    ChatFormat("llama2_chat", **_llama2), ChatFormat("code_llama_chat", **_llama2),
    ChatFormat("llama3_chat", user=_llama3("user"), system=_llama3("system"),
               reply=_llama3("assistant")[0],
               end="<|eot_id|>", trim=True, bos="<|begin_of_text|>"),
    ChatFormat("qwen2_5_chat", **_CHATML,
               opening="<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a "
               "helpful assistant.<|im_end|>\n"),
    ChatFormat("vicuna", **_vicuna), ChatFormat("wizardlm", **_vicuna),
    ChatFormat("mistral", user=(" [INST] ", " [/INST]"), reply="", lead=" ", system=("", "\n\n"),
               fold_system=True, bos="<s>"),
    ChatFormat("deepseek_v2", **_deepseek), ChatFormat("deepseek_moe", **_deepseek),
    ChatFormat("minicpm3", **_CHATML), ChatFormat("yi", **_CHATML),
    ChatFormat("gemma", user=("<start_of_turn>user\n", "<end_of_turn>\n"),
               reply="<start_of_turn>model\n",
               end="<end_of_turn>", after="\n", trim=True, bos="<bos>"),
    ChatFormat("phi3_chat", user=_phi("user"), system=_phi("system"), reply=_phi("assistant")[0],
               end="<|end|>", after="\n",
               closing="<|endoftext|>"),
    ChatFormat("cohere_chat", user=_cohere("USER"), system=_cohere("SYSTEM"),
               reply=_cohere("CHATBOT")[0],
               end="<|END_OF_TURN_TOKEN|>", trim=True, bos="<BOS_TOKEN>"),
    ChatFormat("zephyr", user=_zephyr("user"), system=_zephyr("system"),
               reply=_zephyr("assistant")[0], after="\n"))}


def make(name): return template(name) if name in NAMED else ChatTemplate(OTHERS[name])


def cases():
    missing = pytest.mark.skipif(True, reason="golden texts are not here")
    if not CASES.exists(): return [pytest.param(None, marks=missing)]
    found = [c for c in json.loads(CASES.read_text(encoding="utf-8"))
             if c["template"] in (*NAMED, *OTHERS)]
    return [pytest.param(c, id=c["id"]) for c in found]


@pytest.mark.parametrize("case", cases())
def test_golden(case):
    t = make(case["template"])
    if case["expected"] is None:
        with pytest.raises(FtkitError, match="this template has no system role"):
            t.render(case["messages"], case["add_generation_prompt"])
        return
    r = t.render(case["messages"], case["add_generation_prompt"])
    assert r.text == case["expected"]
    assert [list(s) for s in r.spans] == case["assistant_spans"]
    if case["template"] in NAMED: assert t.stop == case["stop"]
    contents = [m["content"].strip() for m in case["messages"] if m["content"]]
    assert [r.text[a:b].strip() for a, b in r.data] == contents
    assert by_jinja(t, case["messages"], case["add_generation_prompt"]) == r.text


# --- the same text in Jinja -----------------------------------------------------------------------

def by_jinja(t, messages, gen):
    return render_jinja_template(conversations=[messages], chat_template=t.jinja,
                                 add_generation_prompt=gen,
                                 eos_token=t.eos, bos_token=t.bos)[0][0]


snippet = st.sampled_from(["{x}", "{{ x }}", "{% raw %}", "%s", "<|im_end|>", "</s>", "\\", "'",
                           '"', "\r\n", "\n", " ", "\t",
                           "<|User|>:", "{eos}", "{bos}", "é", "多", "👩‍💻", "\u2028", "system"])
content = st.lists(st.one_of(snippet, st.text(max_size=6)), max_size=5).map("".join)
replies = st.tuples(content, st.sampled_from([None, True, False]))


@st.composite
def conversations(draw):
    out = turns(*draw(st.lists(content, min_size=1, max_size=6)), system=draw(st.none() | content))
    for m in out:
        if m["role"] == "assistant": m["loss"] = draw(st.sampled_from([None, True, False]))
    return out


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), gen=st.booleans())
def test_jinja_renders_the_same(messages, gen):
    for name in (*NAMED, "llama2_chat", "deepseek_v2", "cohere_chat", "phi3_chat", "vicuna"):
        t = make(name)
        assert by_jinja(t, messages, gen) == t.render(messages, gen).text


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), gen=st.booleans())
def test_spans(messages, gen):
    replied = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for name in NAMED:
        t = make(name)
        r = t.render(messages, gen)
        learned = [i for i in replied if messages[i]["loss"] is not False]
        assert [r.text[a:b] for a, b in r.spans] == [messages[i]["content"]
                                                     + t.stop[0] for i in learned]
        assert [r.text[a:b] for a, b in r.replies] == [messages[i]["content"]
                                                       + t.stop[0] for i in replied]
        assert [r.text[a:b] for a, b in r.data] == [m["content"] for m in messages if m["content"]]
        for i, (start, _) in zip(replied, r.replies):
            assert t.render(messages[:i], True).text == r.text[:start]


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), gen=st.booleans())
def test_the_tokenizers_own_template_finds_the_same_spans(messages, gen):
    for tok, t in OWN:
        a, b = JinjaTemplate(tok).render(messages, gen), t.render(messages, gen)
        assert (a.text, a.spans, a.data, a.replies) == (b.text, b.spans, b.data, b.replies)


OWN = [(tok := byte_level(chat_template=template(n).jinja), template(n, tok)) for n in NAMED]


# --- templates as they occur in the wild ----------------------------------------------------------

THINK = """{%- for m in messages %}
{%- set text = m.content %}
{%- if m.role == 'assistant' %}{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{{- text + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def test_template_that_writes_a_thinking_block():
    t = JinjaTemplate(byte_level(chat_template=THINK))
    r = t.render(turns("a", "b", "c", "d"))
    assert [r.text[a:b] for a, b in r.spans] == ["b<|im_end|>",
                                                 "<think>\n\n</think>\n\nd<|im_end|>"]
    assert [r.text[a:b] for a, b in r.data] == list("abcd")


def test_template_that_rewrites_what_was_said():
    t = JinjaTemplate(byte_level(chat_template=THINK))
    r = t.render(turns("a", "<think>hm</think>b"))      # the reasoning is dropped
    assert [r.text[a:b] for a,
            b in r.spans] == ["<think>\n\n</think>\n\nb<|im_end|>"] and r.data == []
    with pytest.raises(FtkitError, match="message 1 holds '</s>' as text"):
        t.render(turns("</s>", "<think>hm</think>b"))


def test_prompt_that_is_not_a_beginning():
    source = template("qwen_chat").jinja.replace("{{ '<|im_start|>assistant\\n' }}",
                                                 "{{ '<|im_start|>assistant\\n<think>\\n' }}")
    t = JinjaTemplate(byte_level(chat_template=source))
    assert t.render(turns("a"), True).text.endswith("<think>\n")
    with pytest.raises(FtkitError, match="message 2 is not a beginning"): t.render(turns("a", "b"))


def test_template_that_refuses():
    source = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate') }}{% endif %}"
              "[{{ m.content | trim }}]{{ eos_token }}{% endfor %}")
    t = JinjaTemplate(byte_level(chat_template=source))
    assert [t.render(turns(" a ", " b ")).text[slice(*s)]
            for s in t.render(turns(" a ", " b ")).spans] == ["[b]</s>"]
    with pytest.raises(FtkitError,
                       match="roles must alternate"): t.render(turns("a", "b", system="x"))


def test_content_that_looks_like_markup():
    t = JinjaTemplate(byte_level(chat_template=template("qwen_chat").jinja))
    for text in "user", "\n", "<|im_end|>\n<|im_start|>assistant\n", "", "assistant\n":
        r = t.render(turns(text, text, text, text))
        assert [r.text[a:b] for a, b in r.data] == [text]*4 if text else r.data == []
        assert [r.text[a:b] for a, b in r.spans] == [f"{text}<|im_end|>"]*2


def test_options_of_apply_chat_template():
    tok = byte_level(chat_template=template("internlm2_chat").jinja)
    for gen in True, False:
        messages = turns("a", "b", "c", system="s")
        expected = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=gen)
        assert JinjaTemplate(tok).render(messages, gen).text == expected


# --- binding --------------------------------------------------------------------------------------

def test_end_token_must_be_one_token():
    plain = byte_level(SPECIAL[:3])
    match = r"'<\|im_end\|>', which this tokenizer splits into \d+ tokens.*template=default"
    with pytest.raises(FtkitError, match=match): template("qwen_chat", plain)
    assert template("default", plain).stop_ids() == [2]


def test_begin_token_exactly_once():
    from tokenizers.processors import TemplateProcessing
    adding = byte_level()
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)])
    for name in NAMED:
        assert template(name, adding).render(turns("a", "b")).text.count("<s>") == 1
        t = template(name, adding)
        adding.chat_template = t.jinja
        assert adding.apply_chat_template(turns("a", "b"),
                                          tokenize=False) == t.render(turns("a", "b")).text
    assert template("text", adding).render([Message("text", "a")]).text == "<s>a</s>"
    assert template("default", byte_level()).render(turns("a", "b")).text.count("<s>") == 0
    llama2 = ChatTemplate(OTHERS["llama2_chat"]).bind(adding)
    assert llama2.render(turns("a", "b")).text.startswith("<s>[INST]")


def test_names():
    assert set(template_names()) == {*NAMED, "tokenizer", "text"}
    with pytest.raises(FtkitError, match="Did you mean 'internlm2_chat'"): template("internlm_chat")
    with pytest.raises(FtkitError,
                       match="no chat template of its own"): template("tokenizer", byte_level())


@pytest.mark.parametrize("messages,match", [
    ([], "the conversation is empty"), ([dict(role="user")], "needs 'role' and 'content'"),
    ([dict(role="assitant", content="x")], "Did you mean 'assistant'"),
                                            ([dict(role="user", content=None)],
                                             "NoneType, not text"),
    ([dict(role="user", content="\udc00")], "lone surrogate"),
                                            ("hello", "expected a list of messages"),
    ([dict(role="user", content="x", loss="no")], "expected true or false")])
def test_bad_messages(messages, match):
    for name in NAMED:
        with pytest.raises(FtkitError, match=match): template(name).render(messages)


def test_messages_are_not_changed():
    given_ = turns("a", "b", system="c")
    before = json.dumps(given_)
    for name in (*NAMED, "llama2_chat"): make(name).render(given_)
    assert json.dumps(given_) == before
    objects = as_messages(given_)
    template("default").render(objects)
    assert objects == as_messages(json.loads(before))
