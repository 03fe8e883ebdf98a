"Templates against golden texts, against their own Jinja, and the ways in which they refuse."
import json
from itertools import pairwise
from pathlib import Path
import jinja2
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from ftkit.core import FtkitError
from ftkit.data.families import template, template_names
from ftkit.data.jinja import JinjaTemplate
from ftkit.data.messages import Message, as_messages

CASES = Path(__file__).parents[2]/"shared/templates/cases.json"
NAMED = ["default", "qwen_chat", "internlm2_chat"]
ALL = [n for n in template_names() if n not in ("tokenizer", "text")]
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

def cases():
    missing = pytest.mark.skipif(True, reason="golden texts are not here")
    if not CASES.exists(): return [pytest.param(None, marks=missing)]
    return [pytest.param(c, id=c["id"]) for c in json.loads(CASES.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("case", cases())
def test_golden(case):
    t, messages, gen = template(case["template"]), case["messages"], case["add_generation_prompt"]
    assert t.stop == case["stop"]
    if case["expected"] is None:
        with pytest.raises(FtkitError, match="this template has (no system role|room for one)"):
            t.render(messages, gen)
        with pytest.raises(jinja2.TemplateError, match="This template"): by_jinja(t, messages, gen)
        return
    r = t.render(messages, gen)
    assert r.text == case["expected"] == by_jinja(t, messages, gen)
    assert [list(s) for s in r.spans] == case["assistant_spans"]
    assert [list(o) for o in r.overrides] == case.get("label_overrides", [])
    begin = case.get("bos_in_text", "")
    assert r.text.startswith(begin) and r.text.count(begin or r.text) in (1, len(r.replies) + gen)
    contents = [m["content"].strip() for m in messages if m["content"]]
    assert [r.text[a:b].strip() for a, b in r.data] == contents


# --- the same text in Jinja -----------------------------------------------------------------------

def by_jinja(t, messages, gen, tools=None):
    return render_jinja_template(conversations=[messages], chat_template=t.jinja, tools=tools,
                                 add_generation_prompt=gen,
                                 eos_token=t.eos, bos_token=t.bos)[0][0]


snippet = st.sampled_from(["{x}", "{{ x }}", "{% raw %}", "%s", "<|im_end|>", "</s>", "\\", "'",
                           '"', "\r\n", "\n", " ", "\t", "{n}", "{name}", "{arguments}", "<eoc>",
                           "<|User|>:", "{eos}", "{bos}", "é", "多", "👩‍💻", "\u2028", "system"])
content = st.lists(st.one_of(snippet, st.text(max_size=6)), max_size=5).map("".join)
values = st.recursive(st.none() | st.booleans() | st.integers() | content,
                      lambda v: st.lists(v, max_size=2) | st.dictionaries(content, v, max_size=2),
                      max_leaves=3)
calls = st.builds(lambda n, a: dict(name=n, arguments=a), content.filter(bool),
                  st.dictionaries(content, values, max_size=2))
functions = st.builds(lambda n, d, p: dict(name=n, description=d, parameters=p), content, content,
                      st.dictionaries(content, values, max_size=2))
losses = st.sampled_from([None, True, False])


@st.composite
def conversations(draw):
    out = turns(*draw(st.lists(content, min_size=1, max_size=6)), system=draw(st.none() | content))
    for m in out:
        if m["role"] == "assistant": m["loss"] = draw(losses)
    return out


@st.composite
def with_tools(draw):
    system = draw(st.none() | content | st.just("- Inner thoughts: enabled."))
    out = turns(draw(content), system=system)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["call", "call", "plain", "user", "named"]))
        reply = dict(role="assistant", content=draw(content), loss=draw(losses))
        if kind == "user": out.append(dict(role="user", content=draw(content)))
        elif kind == "plain": out.append(reply)
        else:
            asked = draw(st.lists(calls, min_size=1, max_size=2))
            if kind == "call": reply["tool_calls"] = asked
            names = st.sampled_from(["", "plugin", "f"])
            role = st.sampled_from(["tool", "observation", "environment", "ipython"])
            out += [reply, *(dict(role=draw(role), content=draw(content), name=draw(names))
                             for _ in asked)]
    return out


def said(m): return m["content"], m["content"].strip(), m["content"].rstrip()


def check_spans(t, messages, gen, tools=None):
    "What must hold for every form."
    r = t.render(messages, gen, tools)
    for spans in r.data, r.replies, r.roles, r.overrides:
        assert all(a < b or spans is r.replies for a, b, *_ in spans) # a reply may be empty
        assert all(x[1] <= y[0] for x, y in pairwise(spans))
    assert all(0 <= a and b <= len(r.text) for a, b, _ in r.roles)
    replied = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(replied) < len(r.replies): return r              # MOSS told that there were no results
    assert r.spans == [r.replies[k] for k, i in enumerate(replied)
                       if messages[i].get("loss") is not False]
    for i, (start, end) in zip(replied, r.replies, strict=True):
        if i and (tools is None or t.name not in ("llama3_chat", "llama3_1_chat") or i > 1):
            assert t.render(messages[:i], True, tools).text == r.text[:start]
        inside = [r.text[a:b] for a, b in r.data if start <= a and b <= end]
        if messages[i]["content"].strip(): assert set(inside) & {*said(messages[i])}
        for a, b, role in r.roles:
            if role != "assistant": assert b <= start or a >= end - len("<|observation|>")
    return r


@settings(max_examples=50, deadline=None)
@given(messages=conversations(), gen=st.booleans())
def test_every_form(messages, gen):
    for name in ALL:
        t = template(name)
        try: r = check_spans(t, messages, gen)
        except FtkitError:
            with pytest.raises(jinja2.TemplateError, match="This template"):
                by_jinja(t, messages, gen)
            continue
        assert by_jinja(t, messages, gen) == r.text
        contents = [c for m in messages for c in said(m)]
        assert all(r.text[a:b] in contents for a, b in r.data)


@settings(max_examples=60, deadline=None)
@given(messages=with_tools(), gen=st.booleans(), tools=st.none() | st.lists(functions, max_size=2))
def test_every_form_with_tools(messages, gen, tools):
    for name in ALL:
        t = template(name)
        try: r = check_spans(t, messages, gen, tools)
        except FtkitError as e:
            if "begins with the role" in str(e): continue
            with pytest.raises(jinja2.TemplateError, match="This template"):
                by_jinja(t, messages, gen, tools)
            continue
        assert by_jinja(t, messages, gen, tools) == r.text


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
    source, prompt, end = template("qwen_chat").jinja.rpartition("<|im_start|>assistant\\n")
    source += f"{prompt}<think>\\n{end}"
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
    llama2 = template("llama2_chat", adding)
    assert llama2.render(turns("a", "b")).text.startswith("<s>[INST]")


def test_names():
    xtuner = """default zephyr internlm_chat internlm2_chat moss_sft llama2_chat code_llama_chat
        chatglm2 chatglm3 qwen_chat baichuan_chat baichuan2_chat wizardlm wizardcoder vicuna
        deepseek_coder deepseekcoder deepseek_moe deepseek_v2 mistral mixtral minicpm minicpm3
        gemma cohere_chat llama3_chat phi3_chat""".split()
    assert {*xtuner, "alpaca", "qwen2_5_chat", "yi", "tokenizer", "text"} < {*template_names()}
    assert len(set(template_names())) == len(template_names())
    with pytest.raises(FtkitError, match="Did you mean 'internlm2_chat'"): template("internlm2chat")
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
    for name in (*NAMED, "llama2_chat"): template(name).render(given_)
    assert json.dumps(given_) == before
    objects = as_messages(given_)
    template("default").render(objects)
    assert objects == as_messages(json.loads(before))
