"Templates that come with a tokenizer: what is found by asking; what any template keeps to."
import copy, json, pickle
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from toys import FAMILIES, family_toy, special_tokens, toy
from ftkit.core import FtkitError
from ftkit.data.encode import encode, encode_prompt
from ftkit.data.families import template
from ftkit.data.jinja import JinjaTemplate
from ftkit.data.messages import Conversation, Message, ToolCall, as_messages
from ftkit.data.templates import token_id
from ftkit.data.tokens import ROLE_NAMES

CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def own(source, special=CHATML, eos="<|endoftext|>", **kwargs):
    "The template with a tokenizer around it."
    return JinjaTemplate(toy(special, eos=eos, chat_template=source, **kwargs))


def turns(*contents, system=None):
    out = [dict(role=r, content=c) for r, c in zip(["user", "assistant"]*len(contents), contents)]
    return out if system is None else [dict(role="system", content=system), *out]


def masked(messages):
    "Only the last reply is learned."
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return [dict(m, loss=False) if m["role"] == "assistant" and i < last else m
            for i, m in enumerate(messages)]


def learned(r): return [r.text[a:b] for a, b in r.spans]
def data(r): return [r.text[a:b] for a, b in r.data]
def roles(r): return [(role, r.text[a:b]) for a, b, role in r.roles]


LOOK = [dict(type="function", function=dict(
    name="look", description="Look </s> <|im_end|> somewhere",
    parameters=dict(type="object", required=["where"],
                    properties=dict(where=dict(type="string", description="A place")))))]
CALL = dict(role="assistant", content="",
            tool_calls=[dict(id="abcdefgh1", name="look",
                             arguments=dict(where="up \"<|im_end|>\""))])
AGENT = [dict(role="user", content="Sky?"), CALL, dict(role="tool", content="<|im_start|>blue"),
         dict(role="assistant", content="It is blue.")]

# --- templates with the traits of those in the wild -----------------------------------------------

HEAD = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
TOOLS = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}{% if m.role == 'system' and tools %}{% else %}<|im_start|>
{%- if m.role == 'tool' %}user
<tool_response>
{{ m.content }}
</tool_response>
{%- else %}{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endif %}<|im_end|>
{% endif %}{% endfor %}""" + PROMPT
THINK = """{%- set ns = namespace(count=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.count = ns.count + 1 %}{% endfor %}
{%- for m in messages %}{%- set text, thought = m.content, '' %}
{%- if m.role == 'user' %}{% set ns.count = ns.count - 1 %}{% endif %}
{%- if m.role == 'assistant' and '</think>' in m.content %}
{%- set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set text = m.content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and not ns.count %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- text + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_plain():
    t = own(PLAIN)
    r = t.render(turns("a", "b", "c", "d", system="s"))
    assert learned(r) == ["b<|im_end|>", "d<|im_end|>"] and data(r) == list("sabcd")
    assert roles(r) == [(m, f"<|im_start|>{m}\n{c}<|im_end|>\n") for m, c in zip(
        ["system", "user", "assistant", "user", "assistant"], "sabcd")]
    assert t.stop_ids() == [token_id(t.tokenizer, x) for x in ("<|im_end|>", "<|endoftext|>")]
    assert learned(t.render(turns("a", "b", "c", system="s"), True)) == ["b<|im_end|>"]


def test_content_that_looks_like_markup():
    t = own(PLAIN)
    for text in "user", "\n", "<|im_end|>\n<|im_start|>assistant\n", "", "assistant\n", " ":
        r = t.render(turns(text, text, text, text))
        assert data(r) == [text]*4 if text else r.data == []
        assert learned(r) == [f"{text}<|im_end|>"]*2


def test_marks_that_people_use_themselves():
    t = own(PLAIN)
    for text in ("\U000f0000", "\U000f0003x\U000f0000", "\ue000", "\U0010ffff",
                 "\U000f0001\U000f0100"):
        assert data(t.render(turns(text, text))) == [text]*2


def test_thinking_of_earlier_replies_is_dropped():
    t = own(THINK, weak=["<think>", "</think>"])
    thought = "<think>\nhm\n</think>\n\n"
    one = t.render(turns("a", f"{thought}b"))
    assert learned(one) == [f"{thought}b<|im_end|>"] and data(one) == ["a", "hm", "b"]
    assert learned(t.render(turns("a", "b"))) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    for replies in (f"{thought}b", f"{thought}d"), ("b", "d"):
        messages = turns("a", replies[0], "c", replies[1])
        with pytest.raises(FtkitError, match="reply in message 2 differently.*learn=last.*split"):
            t.render(messages)
        r = t.render(masked(messages))
        trained = encode(masked(messages), t, t.tokenizer)
        assert encode(messages, t, t.tokenizer, learn="last") == trained
        assert learned(r) == learned(t.render(turns("c", replies[1])))
        assert "assistant\nb<|im_end|>" in r.text
        # what a server sends is what was trained
        ids = trained.ids
        prompt = encode_prompt(messages[:3], t, t.tokenizer)
        assert ids[:len(prompt)] == prompt


def test_special_token_in_what_a_template_rewrites():
    t = own(THINK, weak=["<think>", "</think>"])
    messages = turns("</s><|im_end|>", "<think>\n<|im_end|>\n</think>\n\n<|im_start|>b")
    r = t.render(messages)
    assert data(r) == ["</s>", "<|im_end|>", "<|im_end|>", "<|im_start|>", "b"]
    e = encode(messages, t, t.tokenizer)
    assert [e.ids.count(token_id(t.tokenizer, x)) for x in CHATML] == [2, 2, 0]
    upper = own("{% for m in messages %}{{ m.content | reverse }}<|im_end|>{% endfor %}")
    assert learned(upper.render(turns("ab", "cd"))) == ["dc<|im_end|>"]
    with pytest.raises(FtkitError, match="message 1 holds '<.im_end.>' as text"):
        upper.render(turns("<|im_end|>", "cd"))


def test_prompt_that_is_not_a_beginning():
    t = own(PLAIN.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"))
    assert t.render(turns("a"), True).text.endswith("<think>\n")
    match = "message 2 is not a beginning of the whole.*it has '<think>.n' where the text has 'b"
    with pytest.raises(FtkitError, match=match): t.render(turns("a", "b"))
    assert learned(t.render(turns("a", "<think>\nhm</think>b"))) == ["hm</think>b<|im_end|>"]


def test_roles_that_must_alternate_and_no_system():
    source = ("{{ bos_token }}{% if messages[0].role == 'system' %}"
              "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
              "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate') }}{% endif %}"
              "{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
              "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}")
    t = own(source, [], "</s>")
    r = t.render(turns(" a ", " b ", "c", "d"))
    assert r.text == "<s>[INST] a [/INST] b</s>[INST] c [/INST] d</s>"
    assert learned(r) == [" b</s>", " d</s>"] and data(r) == list("abcd")
    assert roles(r) == [("user", "[INST] a [/INST]"), ("assistant", " b</s>"),
                        ("user", "[INST] c [/INST]"), ("assistant", " d</s>")]
    with pytest.raises(FtkitError, match="not supported.*into the first user message"):
        t.render(turns("a", "b", system="s"))
    with pytest.raises(FtkitError, match="must alternate"): t.render(turns("a")*2 + turns("b", "c"))


def test_template_that_leaves_out():
    t = own(PLAIN.replace("in messages", "in messages if m.role != 'system'"))
    with pytest.raises(FtkitError, match=r"leaves out message 1 \(system\)"):
        t.render(turns("a", "b", system="s"))
    with pytest.raises(FtkitError, match=r"leaves out message 2 \(assistant\)"):
        own(PLAIN).render(AGENT)
    with pytest.raises(FtkitError, match="does not know tools"):
        own(PLAIN).render(turns("a", "b"), tools=LOOK)
    with pytest.raises(FtkitError, match="no end token"): own("{{ messages[-1].content }}")
    with pytest.raises(FtkitError, match="does not write replies"): own("Hello")


def test_end_that_differs_in_the_middle():
    source = ("{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
              "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
              "{% if add_generation_prompt %}<|start|>assistant{% endif %}")
    t = own(source, ["<|start|>", "<|message|>", "<|return|>", "<|end|>"], "<|return|>")
    with pytest.raises(FtkitError, match="message 2 differently once"): t.render(turns(*"abcd"))
    r = t.render(masked(turns(*"abcd")))
    assert learned(r) == ["<|message|>d<|return|>"]
    assert roles(r)[1] == ("assistant", "<|start|>assistant<|message|>b<|end|>")


@pytest.mark.parametrize("strict", [False, True])
def test_contents_as_parts(strict):
    each = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    if strict: each = "{{ m.content[0].text + '' }}"
    t = own(PLAIN.replace("{{ m.content }}", each))
    r = t.render(turns("a", "b", "c", "d"))
    assert learned(r) == ["b<|im_end|>", "d<|im_end|>"] and data(r) == list("abcd")


# --- tools ----------------------------------------------------------------------------------------

def test_calls_are_learned_and_observations_are_not():
    t = own(TOOLS, weak=["<tool_call>", "</tool_call>"])
    for system in None, "Be brief.":
        messages = [*turns(system=system), *AGENT]
        r = t.render(messages, tools=LOOK)
        assert learned(r) == [
            '<tool_call>\n{"name": "look", "arguments": {"where": "up \\"<|im_end|>\\""}}\n'
            "</tool_call><|im_end|>", "It is blue.<|im_end|>"]
        plain = t.tokenizer.apply_chat_template(
            t._given(as_messages(messages)), tools=LOOK, tokenize=False)
        assert r.text == plain
        e = encode(Conversation(messages, tools=LOOK), t, t.tokenizer)
        ends = e.ids.count(token_id(t.tokenizer, "<|im_end|>"))
        assert ends == 5 == e.ids.count(token_id(t.tokenizer, "<|im_start|>"))
        assert t.tokenizer.decode(e.ids) == r.text
        assert " ".join(role for role, _ in roles(r)) == "system user assistant tool assistant"
        prompt = t.render(messages[:-1], True, LOOK)
        assert r.text.startswith(prompt.text)


def test_arguments_as_text_and_ids_of_answers():
    source = """{% for m in messages %}<|im_start|>{{ m.role }}
{%- if m.tool_call_id %}:{{ m.tool_call_id }}{% endif %}{{ '\\n' + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.id + c.function.name + c.function.arguments }}
{%- endfor %}<|im_end|>
{% endfor %}""" + PROMPT
    t = own(source)
    r = t.render(AGENT)
    assert learned(r)[0] == 'abcdefgh1look{"where": "up \\"<|im_end|>\\""}<|im_end|>'
    assert "<|im_start|>tool:abcdefgh1\n" in r.text


def test_names_that_a_template_compares():
    source = TOOLS.replace("{{ tool | tojson }}", (
        "{% set f = tool.function %}{{ f.name }}: {{ f.description }}"
        "{% for k, p in f.parameters.properties.items() %}"
        "{{ k }}{% if k in f.parameters.required %} (needed){% endif %}"
        "{% if p.type == 'string' %} text{% endif %}{% endfor %}"))
    r = own(source).render(AGENT, tools=LOOK)
    assert "where (needed) text" in r.text and len(r.spans) == 2
    assert data(r).count("<|im_end|>") == 1         # of the description; the rest is in other data
    assert r.text.count("<|im_end|>") == 7


def test_a_call_that_ends_with_a_token_of_its_own():
    source = TOOLS.replace("<|im_end|>\n{% endif %}{% endfor %}",
                           "{{ '<|call|>' if m.tool_calls else '<|im_end|>\n' }}"
                           "{% endif %}{% endfor %}")
    t = own(source, [*CHATML, "<|call|>"])
    assert t.stop == ["<|im_end|>", "<|endoftext|>", "<|call|>"]
    assert [x[-10:] for x in learned(t.render(AGENT, tools=LOOK))] == ["l><|call|>", "<|im_end|>"]


def test_two_templates():
    t = own(dict(default=PLAIN, tool_use=TOOLS))
    assert learned(t.render(turns("a", "b"))) == ["b<|im_end|>"]
    assert len(learned(t.render(AGENT, tools=LOOK))) == 2
    assert t.jinja == dict(default=PLAIN, tool_use=TOOLS)


# --- dates, marks of authors ----------------------------------------------------------------------

@pytest.mark.parametrize("begin", ["", "\n", "  {% if true %}\n{% endif %}",
                                   "\n{%- if true %}x{% endif %}"])
def test_time_stands_still(begin):
    clock = "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% endif %}"
    t = own(f"{begin}{clock}Today: {{{{ d }}}}\n{PLAIN}")
    fixed = own(f"{begin}{{% set d = '26 Jul 2024' %}}Today: {{{{ d }}}}\n{PLAIN}")
    r,expected = t.render(turns("a", "b")),fixed.render(turns("a", "b"))
    assert (r.text, r.spans) == (expected.text, expected.spans)
    again = copy.deepcopy(t.tokenizer)
    again.chat_template = t.jinja                              # as it is saved
    assert again.apply_chat_template(turns("a", "b"), tokenize=False) == r.text
    assert JinjaTemplate(again).jinja == t.jinja


def marked(inside): return PLAIN.replace("{{ m.content }}<|im_end|>\n", (
    "{% if m.role == 'assistant' %}" + inside + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"))


GENERATION = "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"


def test_marks_of_the_author(capsys):
    assert learned(own(marked(GENERATION)).render(turns(*"abcd"))) == ["b<|im_end|>", "d<|im_end|>"]
    assert capsys.readouterr().err == capsys.readouterr().out == ""
    last = own(marked("{% if loop.last %}" + GENERATION
                      + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}"))
    assert learned(last.render(turns(*"abcd"))) == ["d<|im_end|>"]
    without_end = own(marked("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n"))
    for _ in range(2): assert learned(without_end.render(turns("a", "b"))) == ["b<|im_end|>"]
    said = "".join(capsys.readouterr())
    assert said.count("that end elsewhere than what the model has to write") == 1
    with pytest.raises(FtkitError, match=r"marks message 1 \(user\) as generated"):
        own(PLAIN.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
            ).render(turns("a", "b"))


# --- what a template is asked ---------------------------------------------------------------------

def test_messages_are_not_changed():
    messages = Conversation(as_messages(AGENT), tools=LOOK)
    before = copy.deepcopy(messages)
    t = own(TOOLS)
    t.render(messages)
    assert messages == before and messages.tools == LOOK and messages[1].tool_calls == [
        ToolCall("look", dict(where="up \"<|im_end|>\""), "abcdefgh1")]


def test_copies_for_other_processes():
    t = pickle.loads(pickle.dumps(own(TOOLS)))
    assert len(t.render(AGENT, tools=LOOK).spans) == 2


def test_hostile_templates():
    for source in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
                   "{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", "{% if %}",
                   "{{ messages[9].content }}" + PLAIN, "{{ {}['x'] + 1 }}"):
        with pytest.raises(FtkitError, match="template=tokenizer.*chat template"): own(source)


TRL = find_spec("trl")


@pytest.mark.skipif(not TRL, reason="TRL and its copies of templates are not here")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507", "llama3_1", "lfm2_v2"])
def test_copies_of_official_templates(name):
    source = (Path(TRL.origin).parent/"chat_templates"/f"{name}.jinja").read_text(encoding="utf-8")
    end = "<|eot_id|>" if name.startswith("llama") else "<|im_end|>"
    r = own(source, [end, *CHATML], end).render(AGENT, tools=LOOK)
    assert len(r.spans) == 2 and learned(r)[1] == f"It is blue.{end}"


# --- properties -----------------------------------------------------------------------------------

look_alikes = sorted({t for n in FAMILIES for t in special_tokens(n)}
                     | {*CHATML, "[INST]", "<think>"})
snippet = st.sampled_from([*look_alikes, "{{ x }}", "{% raw %}", "\\", "\r\n", "\n", " ", "\t",
                           "\x00", "多", "👩‍💻", "\u2028", "\u200b", "\U000f0000", "user",
                           "assistant\n"])
content = st.lists(snippet | st.text(max_size=5), max_size=4).map("".join)


@st.composite
def conversations(draw, tools=False):
    out = turns(*draw(st.lists(content, min_size=2, max_size=2)), system=draw(st.none() | content))
    if draw(st.booleans()): out += turns(draw(content), draw(content))
    if tools and draw(st.booleans()):
        out[-1]["tool_calls"] = [dict(name="f", arguments={draw(content): draw(content)})]
        out += [dict(role="tool", content=draw(content)),
                dict(role="assistant", content=draw(content))]
    for m in out:
        if m["role"] == "assistant": m["loss"] = draw(st.sampled_from([None, True, False]))
    out[-1]["loss"] = None
    return out


def check(t, messages):
    "Text survives to ids and back, spans keep to roles, and data has no special tokens."
    tok = t.tokenizer
    r,e = t.render(messages),encode(messages, t, tok)
    assert tok.decode(e.ids, clean_up_tokenization_spaces=False) == r.text
    replies = [m for m in messages if m["role"] == "assistant"]
    assert len(r.replies) == len(replies)
    assert len(r.spans) == sum(m.get("loss") is not False for m in replies)
    for name in "data", "replies", "roles": assert all(
        a[1] <= b[0] for a, b in pairwise(getattr(r, name)))
    for a, b, role in r.roles:                    # what is learned is the assistant's turn alone
        if role != "assistant":                   # but for a token of the next that ends a reply
            assert all(b <= x or a >= y - len("<|observation|>") for x, y in r.spans)
    if not r.overrides and t.name != "chatglm3":
        assert {ROLE_NAMES[x] for x, l in zip(e.roles, e.labels) if l != -100} <= {"assistant"}
    for m in messages: assert m["role"] == "tool" or m["content"].strip() in r.text
    special = {i for i, x in tok.added_tokens_decoder.items() if x.special}
    def plain(m):
        called = dict(tool_calls=[dict(name="f", arguments=dict(p="x"))])
        calls = called if "tool_calls" in m else {}
        return dict(m, content="x" if m["content"].strip() else m["content"], **calls)
    clean = t.render([plain(m) for m in messages])
    count = sum(i in special for i in e.ids)
    text = clean.text
    for a, b in reversed(clean.data): text = text[:a] + text[b:]
    assert count == sum(i in special for i in tok(text, add_special_tokens=False)["input_ids"])


NAMED = {n: (t := template(n, family_toy(n))) for n in FAMILIES}


@settings(max_examples=30, deadline=None)
@given(messages=conversations(tools=True))
def test_every_family(messages):
    for name, t in NAMED.items():
        try: t.render(messages)
        except FtkitError: continue              # no system role, one question only
        check(t, messages)


OWN = [own(PLAIN), own(TOOLS), own(PLAIN.replace("m.content", "m.content | trim"))]


@settings(max_examples=40, deadline=None)
@given(messages=conversations(tools=True))
def test_every_tokenizers_own(messages):
    for t in OWN:
        if t is not OWN[1] and any(m.get("tool_calls") for m in messages): continue
        check(t, messages)
    if not any(m.get("tool_calls") or "think>" in m["content"] for m in messages):
        check(THINKING, masked(messages))


THINKING = own(THINK, weak=["<think>", "</think>"])


@settings(max_examples=25, deadline=None)
@given(messages=conversations(), gen=st.booleans())
def test_families_own_template_finds_what_is_known_by_name(messages, gen):
    for name, t in NAMED.items():
        if name not in BY_JINJA: continue
        try: b = t.render(messages, gen)
        except FtkitError: continue
        a = BY_JINJA[name].render(messages, gen)
        assert (a.text, a.spans, a.replies) == (b.text, b.spans, b.replies)
        for x, y in b.data:                       # white space aside, all data is known as data
            assert not r_outside(a.data, x, y, a.text)


def r_outside(spans, x, y, text):
    "Special tokens between `x` and `y` that are not inside of the spans."
    kept = "".join(" " if any(a <= k < b for a, b in spans) else text[k] for k in range(x, y))
    return [t for t in look_alikes if t in kept]


def by_jinja(t):
    tok = copy.deepcopy(t.tokenizer)
    tok.chat_template = t.jinja
    return JinjaTemplate(tok)


ROLE_ENDS = ("chatglm2", "chatglm3", "baichuan_chat", "baichuan2_chat", "minicpm", "moss_sft")
BY_JINJA = {n: by_jinja(t) for n, t in NAMED.items() if n not in ROLE_ENDS}
