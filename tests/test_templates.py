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


# --- tools, as the authors write them -------------------------------------------------------------

TOOL = dict(name="get_weather", description="Weather", parameters=dict(type="object", properties={}))
ASKED = [dict(role="user", content=" Wetter in Bern? "),
         dict(role="assistant", content="", tool_calls=[dict(type="function", id="1", function=dict(
             name="get_weather", arguments='{"city": "Zürich", "days": 2}'))]),
         dict(role="tool", content='{"rain": "ja"}', tool_call_id="1"),
         dict(role="assistant", content="Ja.")]
SYSTEM = dict(role="system", content=" Be brief. ")

QWEN = """<|im_start|>system
SYSTEM

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Weather", \
"parameters": {"type": "object", "properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
 Wetter in Bern? <|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
{"rain": "ja"}
</tool_response><|im_end|>
<|im_start|>assistant
Ja.<|im_end|>
"""
LLAMA3 = """<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython
Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

SYSTEM<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper \
arguments that best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its \
value}.Do not use variables.

{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
}

Wetter in Bern?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}<|eot_id|>\
<|start_header_id|>ipython<|end_header_id|>

"{\\"rain\\": \\"ja\\"}"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

Ja.<|eot_id|>"""
INTERNLM2 = """<s>SYSTEM<|im_start|>system name=<|plugin|>
[{"name": "get_weather", "description": "Weather", "parameters": \
{"type": "object", "properties": {}}}]<|im_end|>
<|im_start|>user
 Wetter in Bern? <|im_end|>
<|im_start|>assistant
<|action_start|><|plugin|>
{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}<|action_end|><|im_end|>
<|im_start|>environment name=<|plugin|>
{"rain": "ja"}<|im_end|>
<|im_start|>assistant
Ja.<|im_end|>
"""
CHATGLM3 = """[gMASK]sop<|system|>
 SYSTEM
[
    {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {
            "type": "object",
            "properties": {}
        }
    }
]<|user|>
  Wetter in Bern? <|assistant|>get_weather
 ```python
tool_call(city='Zürich', days=2)
```<|observation|>
 {"rain": "ja"}<|assistant|>
 Ja.</s>"""
GLM_OPENING = "Answer the following questions as best as you can. You have access to the following tools:"


@pytest.mark.parametrize("name,text,without,given", [
    ("qwen2_5_chat", QWEN, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
     " Be brief. "),
    ("qwen_chat", QWEN, "You are a helpful assistant.", " Be brief. "),
    ("llama3_1_chat", LLAMA3, "", "Be brief."), ("llama3_chat", LLAMA3, "", "Be brief."),
    ("internlm2_chat", INTERNLM2, "", "<|im_start|>system\n Be brief. <|im_end|>\n"),
    ("chatglm3", CHATGLM3, GLM_OPENING, " Be brief. ")])
def test_tools_as_the_authors_write_them(name, text, without, given):
    t = template(name)
    for messages, system in (ASKED, without), ([SYSTEM, *ASKED], given):
        r = t.render(messages, tools=[TOOL])
        plain = [dict(m) for m in messages]
        if name == "chatglm3":                               # Jinja can't read JSON
            plain[-3]["tool_calls"] = [dict(name="get_weather",
                                            arguments=dict(city="Zürich", days=2))]
            with pytest.raises(jinja2.TemplateError, match="as an object"):
                by_jinja(t, messages, False)
        assert r.text == text.replace("SYSTEM", system) == by_jinja(t, plain, False, [TOOL])
        learned = [r.text[a:b] for a, b in r.spans]
        assert len(learned) == 2 and "Zürich" in learned[0] and "Ja." in learned[1]
        assert not any(word in x for x in learned for word in ("Weather", "rain", "Wetter"))
        assert {role for *_, role in r.roles} <= {"system", "user", "assistant", "tool"}
        data = [r.text[a:b] for a, b in r.data]
        assert all(any(x in d for d in data) for x in ("Weather", "Zürich", "rain", "Wetter", "Ja."))
    lifted = [dict(SYSTEM, tools=[TOOL]), *ASKED]            # as ChatGLM3's own files have it
    assert t.render(lifted).text == text.replace("SYSTEM", given)
    silenced = [ASKED[0], dict(ASKED[1], loss=False), *ASKED[2:]]
    assert len(t.render(silenced, tools=[TOOL]).spans) == 1


def test_calls_in_a_row():
    two = [ASKED[0], dict(ASKED[1], content="Both.", tool_calls=ASKED[1]["tool_calls"]*2),
           ASKED[2], ASKED[2], ASKED[3]]
    text = template("qwen2_5_chat").render(two).text
    assert text.count("<|im_start|>user\n") == 2 and text.count("\n<tool_response>\n") == 2
    assert "<|im_start|>assistant\nBoth.\n<tool_call>" in text
    text = template("internlm2_chat").render(two).text
    assert "Both.<|action_start|>" in text and text.count("<|action_end|><|action_start|>") == 1
    for name in "chatglm3", "llama3_chat", "llama3_1_chat":
        with pytest.raises(FtkitError, match="one call in a reply, and message 2 has 2"):
            template(name).render(two)


def test_families_without_tools_refuse_them():
    known = "qwen_chat", "qwen2_5_chat", "internlm2_chat", "chatglm3", "llama3_chat", "llama3_1_chat"
    for name in ALL:
        if name in known: continue
        with pytest.raises(FtkitError, match="no tools|reads about its tools"):
            template(name).render(ASKED[:1], tools=[TOOL])
        with pytest.raises(FtkitError, match="no tools|no tool role|Inner thoughts|room for one"):
            template(name).render(ASKED)


def test_names_and_metadata():
    messages = [dict(role="system", content="[]", name="plugin"), ASKED[0],
                dict(role="assistant", content="x"), dict(role="tool", content="1", name="plugin"),
                dict(role="environment", content="2"), dict(role="tool", content="3", name="f")]
    assert template("internlm2_chat").render(messages).text == (
        "<s><|im_start|>system name=<|plugin|>\n[]<|im_end|>\n<|im_start|>user\n Wetter in Bern? "
        "<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n<|im_start|>environment name=<|plugin|>\n"
        "1<|im_end|>\n<|im_start|>environment\n2<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n")
    glm = [ASKED[0], dict(role="assistant", content="f(x)", metadata="f"),
           dict(role="observation", content="1", metadata="")]
    r = template("chatglm3").render(glm, True)
    assert r.text == ("[gMASK]sop<|user|>\n  Wetter in Bern? <|assistant|>f\n f(x)<|observation|>\n 1"
                      "<|assistant|>")
    assert [r.text[a:b] for a, b in r.spans] == ["f\n f(x)<|observation|>"]


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


def test_tokens_that_a_tokenizer_puts_in_front():
    from tokenizers.processors import TemplateProcessing
    for front in (["<s>"], ["[gMASK]", "sop"]):
        tok = byte_level(["<pad>", "<s>", "</s>", "[gMASK]", "sop", "<|user|>"])
        ids = [(x, tok.convert_tokens_to_ids(x)) for x in front]
        tok.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*front, "$A"]), special_tokens=ids)
        for name in "chatglm2", "vicuna", "alpaca", "minicpm", "default":
            t = template(name, tok)
            assert t.render(turns("a")).text.startswith("".join(front))
            assert by_jinja(t, turns("a"), True) == t.render(turns("a"), True).text
        glm = template("chatglm3", tok).render(turns("a", "b")).text
        assert glm == "[gMASK]sop<|user|>\n a<|assistant|>\n b</s>"


def test_end_of_a_reply_in_the_middle():
    ends = dict(chatglm2="", baichuan_chat="", baichuan2_chat="", minicpm="", chatglm3="<|user|>")
    for name in ALL:
        t = template(name)
        assert t.mid_end == ends.get(name, t.stop[0])
        if t.format.single: continue
        r = t.render(turns("a", "b", "c", "d"))
        first, second = (r.text[a:b] for a, b in r.spans)
        assert first.endswith(t.mid_end) and second.endswith(t.stop[0])
        assert first.strip()[0] == "b" and second.strip()[0] == "d"


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
