"Every layout by a row in its published columns, the real samples, and what is refused."
import json
import pickle
from dataclasses import replace
from pathlib import Path
import pytest
from datasets import Dataset
from hypothesis import given, settings, strategies as st
from ftkit.core import FtkitError
from ftkit.data.formats import (as_layout, converter, find_layout, gathered, layouts, read_rows,
                                to_messages)
from ftkit.data.files import Rows
from ftkit.data.families import template
from ftkit.data.layouts import SYSTEM_TEXTS
from ftkit.data.messages import Conversation, Message, ToolCall
from ftkit.data.pairs import (FEEDBACKS, PREFERENCES, Feedback, Preference, to_feedback, to_pairs,
                              to_prompts)

SHARED = Path(__file__).parents[2]/"shared/data"


def shared(name):
    if not (SHARED/name).exists(): pytest.skip("the shared samples are not here")
    return SHARED/name


def u(text): return Message("user", text)
def a(text, loss=None, calls=(), name=None): return Message("assistant", text, loss, list(calls),
                                                            name)
def s(text): return Message("system", text)
def told(name): return s(SYSTEM_TEXTS[name])
def said(**turn): return {"from": next(iter(turn)), "value": next(iter(turn.values()))}
def msg(role, content, **more): return dict(role=role, content=content, **more)


# --- a row in its published columns, and its messages ---------------------------------------------

THINK = ('<|startofthink|>```JSON\n{"api_name": "text_ie", "url": "http://x/y", "parameters": '
         '{"text": "Oslo", "deep": true}}\n```<|endofthink|>')
EXEC = '<|startofexec|>```JSON\n{"places": ["Oslo"]}\n```<|endofexec|>'
PLUGIN = {"plugin_name": "text_ie", "plugin_schema_for_model": {
    "name": "text_ie", "description": "抽取", "url": "http://x/y", "paths": [
        {"name": "text_ie", "method": "post", "parameters": [
            {"name": "text", "description": "输入文本", "required": "True"},
            {"name": "deep", "description": "深", "required": "False"}]}]}}
AGENT = [said(system="你是达摩院的ModelScopeGPT。\n\n1. " + json.dumps(PLUGIN, ensure_ascii=False)),
         said(user="Which places?\nOslo"),
         said(assistant=f"I look.\n{THINK}\n\n{EXEC}\nOne: Oslo."),
         said(user="Thanks"), said(assistant="You are welcome.")]
REACT = """你是一个可以调用外部工具的助手，可以使用的工具包括：
{'text_ie': "抽取\\n输入参数: {'text': '输入文本', 'deep': '深'}"}
如果使用工具请遵循以下格式回复：
```
Thought:思考你当前步骤需要解决什么问题，是否需要使用工具
Action:工具名称，你的工具必须从 [['text_ie']] 选择
Action Input:工具输入参数
```
工具返回按照以下格式回复：
```
Response:调用工具后的结果
```
如果你已经知道了答案，或者你不需要工具，请遵循以下格式回复
```
Thought:给出最终答案的思考过程
Final Answer:最终答案
```
开始!"""
CALL = ToolCall("text_ie", {"text": "Oslo", "deep": True})
DONE = [u("Thanks"), a("You are welcome.")]


def moss(**sections):
    names = {"Inner Thoughts": "Inner Thoughts", "Commands": "Commands",
             "Results": "Tool Responses"}
    ends = {"Inner Thoughts": "<eot>", "Commands": "<eoc>", "Results": "<eor>"}
    out = {"Human": f"<|Human|>: {sections['human']}<eoh>\n"}
    for mark, name in names.items():
        text = sections.get(mark.split()[-1].lower(), "None")
        out[name] = f"<|{mark}|>:{'' if text.startswith(chr(10)) else ' '}{text}{ends[mark]}\n"
    return {**out, "MOSS": f"<|MOSS|>: {sections['moss']}<eom>\n"}


PLAIN = {"conversation_id": "1", "meta_instruction": "You are MOSS.\n- Inner thoughts: disabled.\n",
         "num_turns": 1, "chat": {"turn_1": moss(human="你好", moss="Hi\n")}, "category": "Others"}
SEARCH = moss(human="Bird?", thoughts="I search.", commands='Search("a bird"), Calculate("1+1")',
              results="\nSearch(\"a bird\") =>\n<|1|>: 'wren'\nCalculate(\"1+1\") => '2'\n",
              moss="A wren.<sup><|1|></sup>")
PLUGINS = {"conversation_id": 1, "meta_instruction": "You are MOSS.\n- Inner thoughts: enabled.\n",
           "num_turns": "2", "chat": {"turn_1": SEARCH,
                                      "turn_2": moss(human="Thanks", results="\nNone\n",
                                                     moss="Bye.")}}
FOUND = "Search(\"a bird\") =>\n<|1|>: 'wren'\nCalculate(\"1+1\") => '2'"
SEARCHED = [s("You are MOSS.\n- Inner thoughts: enabled."), u("Bird?"),
            a("I search.", calls=[ToolCall("Search", {"query": "a bird"}),
                                  ToolCall("Calculate", {"expression": "1+1"})], name="plugin"),
            Message("tool", FOUND), a("A wren.<sup><|1|></sup>"),
            u("Thanks"), a("", name="plugin"), Message("tool", "None"), a("Bye.")]
QA = [u("q"), a("y")]
HUMAN = [said(gpt="lead"), said(human="one"), said(human="two"), said(gpt="y"), said(gpt="z"),
         said(human="left")]
KEPT = [u("one"), u("two"), a("y"), a("z")]
ROLES = [msg("system", "be"), msg("assistant", "lead"), msg("user", "q"),
         msg("assistant", "y", loss="False"), msg("user", "r"), msg("assistant", "z", loss=None)]
PICTURE = dict(id="7", image="1.jpg", conversations=[said(human="Who? \n<image> "), said(gpt="y")])

# layout, whether auto finds it, row, messages
GRID = [
    ("alpaca", True, dict(instruction="q", input="x", output="y"), [u("q\nx"), a("y")]),
    ("alpaca", True, dict(instruction="q", input="", output="y", text="…"), QA),
    ("alpaca", True, dict(instruction="", input="x", output="y"), [u("x"), a("y")]),
    ("alpaca", True, dict(instruction="q", input=None, output="<nooutput>"), None),
    ("alpaca", True, dict(instruction="q", input="", output="y", system="s",
                          history=[["a", "b"], ["c", "d"]]),
     [s("s"), u("a"), a("b"), u("c"), a("d"), *QA]),
    ("alpaca", True, dict(instruction="q", output="y", history=[]), QA),
    ("alpaca_zh", True, dict(instruction_zh="问", input_zh="x", output_zh="答"),
     [u("问\nx"), a("答")]),
    ("medical", False, dict(instruction="q", input="", output="y"), [told("medical"), *QA]),
    ("arxiv", True, dict(abstract="q", title="y", authors="N. N."), [told("arxiv_gentile"), *QA]),
    ("code_alpaca", False, dict(prompt="q", completion="y"), [told("coder"), *QA]),
    ("prompt_completion", True, dict(prompt="q", completion="y"), QA),
    ("prompt_completion", True, dict(
        prompt=[msg("user", "p"), msg("assistant", "o"), msg("user", "q")],
        completion=[msg("assistant", "y")]), [u("p"), a("o", False), *QA]),
    ("prompt_completion", True, dict(prompt="[1, 2]", completion='[{"a": 1}, 2]'),
     [u("[1, 2]"), a('[{"a": 1}, 2]')]),
    ("tiny_codes", False, dict(prompt="q", response="y", idx=3), [told("coder"), *QA]),
    ("prompt_response", True, dict(prompt="q", response="y"), QA),
    ("colors", True, dict(description="Sky: q ", color="y"), [told("colorist"), *QA]),
    ("colors", True, dict(description="q", color="y"), [told("colorist"), *QA]),
    ("crime_kg_assitan", False, dict(input="q", output="y"), [told("lawyer"), *QA]),
    ("crime_kg_assistant", False, dict(input="q", output="y"), [told("lawyer"), *QA]),
    ("law_reference", False, dict(question="q", answer="y", reference="§ 1"),
     [told("lawyer"), *QA]),
    ("question_answer", True, dict(question="q", answer="y", context=None), QA),
    ("sql", False, dict(context="CREATE", question="q", answer="y"),
     [told("sql"), u("CREATE\nq"), a("y")]),
    ("openorca", True, dict(id="1", system_prompt="s", question="q", response="y"), [s("s"), *QA]),
    ("openorca", True, dict(id="1", system_prompt="", question="q", response="y"), QA),
    ("stack_exchange", True, dict(qid=1, question="q", response="y"), QA),
    ("default", True, dict(input="q", output="y"), QA),
    ("dolly", True, dict(instruction="q", context="c", response="y", category="qa"),
     [u("q\nc"), a("y")]),
    ("query_response", True, dict(query="q", response="y", history=[["a", "b"]], system="s"),
     [s("s"), u("a"), a("b"), *QA]),
    ("firefly", True, dict(kind="k", input="q", target="y"), QA),
    ("medical_dialogue", True, dict(department="内科", title="t", ask="q", answer="y"),
     [u("t\nq"), a("y")]),
    ("medical_dialogue", True, dict(department="内科", title="q", ask="q", answer="y"), QA),
    ("meddialog", True, dict(description="d", utterances=["patient: q", "doctor: y: z"]),
     [u("q"), a("y: z")]),
    ("meddialog", True, dict(utterances=["病人：问：q", "医生：答"]), [u("问：q"), a("答")]),
    ("conversation", True, dict(conversation=[
        dict(system="s", input="q", output="y"),
        dict(system=None, input="r", output="z", output_with_loss=False)]),
     [s("s"), *QA, u("r"), a("z", False)]),
    ("conversation", True, dict(conversation=[dict(input="q", output="y"),
                                              dict(system="Response", output="z")]),
     [*QA, s("Response"), a("z")]),
    ("messages", True, dict(messages=ROLES),
     [s("be"), a("lead"), u("q"), a("y", False), u("r"), a("z")]),
    ("messages", True, dict(messages=[msg("user", "q"), msg("assistant", "y", weight=0)]),
     [u("q"), a("y", False)]),
    ("messages", True, dict(messages=[msg("user", "q"), msg("assistant", "y", train=False)]),
     [u("q"), a("y", False)]),
    ("messages", True, dict(conversation=[msg("user", "q"), msg("assistant", "y", weight=1)]),
     [u("q"), a("y", True)]),
    ("messages", True, dict(messages=json.dumps([msg("user", "q"), msg("assistant", "y")])), QA),
    ("messages", True, dict(messages=[msg("user", [dict(type="text", text="q")]),
                                      msg("assistant", "y")], system="s"), [s("s"), *QA]),
    ("messages", True, dict(messages=dict(role=["user", "assistant"], content=["q", "y"])), QA),
    ("openai", False, dict(messages=ROLES), [s("be"), u("q"), a("y", False), u("r"), a("z")]),
    ("sharegpt", True, dict(id="1", conversations=HUMAN),
     [a("lead"), *KEPT, u("left")]),
    ("sharegpt", True, dict(conversations=[said(user="q"), said(chatgpt="y")], system="s"),
     [s("s"), *QA]),
    ("sharegpt", True, dict(conversations=[said(human="q"), {**said(gpt="y"), "weight": 0}]),
     [u("q"), a("y", False)]),
    ("wizardlm", False, dict(idx="1", conversations=HUMAN), KEPT),
    ("wizardlm", False, dict(conversations=[said(human="q")]), None),
    ("llava", False, PICTURE, [u("<image>\nWho?"), a("y")]),
    ("llava", False, dict(id="8", conversations=[said(human="q"), said(gpt="y")]), QA),
    ("llava_image_only", False, PICTURE, [u("<image>"), a("y")]),
    ("sharegpt", True, PICTURE, [u("Who? \n<image> "), a("y")]),
    ("msagent", False, dict(id="1", conversations=AGENT),
     [u("Which places?\nOslo"), a("I look.", calls=[CALL]),
      Message("tool", '{"places": ["Oslo"]}', name="text_ie"), a("One: Oslo."), *DONE]),
    ("msagent_react", False, dict(id="1", conversations=str(AGENT)),
     [s(REACT), u("Which places?\nOslo"),
      a('Thought:I look.\nAction:text_ie\nAction Input:{"text": "Oslo", "deep": true}'),
      s('Response:{"places": ["Oslo"]}'), a("Final Answer:One: Oslo."),
      DONE[0], a("Final Answer:You are welcome.")]),
    ("moss", True, PLAIN, [s("You are MOSS.\n- Inner thoughts: disabled."), u("你好"), a("Hi\n")]),
    ("moss", True, PLUGINS, SEARCHED),
    ("moss_002", True, dict(id=0, prefix="You are MOSS.\n", num_turns=2,
                            plain_text="[Human]: q<eoh> [MOSS]: y<eoa> [Human]: r<eoh> [MOSS]: z"
                                       "<eoa>"), [s("You are MOSS."), *QA, u("r"), a("z")]),
    ("oasst1", False, dict(text="### Human: q### Assistant: # y\n### Title\nz### Human: one"
                                "### Human: two### Assistant: x### Human: left"),
     [u("q"), a("# y\n### Title\nz"), u("one"), u("two"), a("x")]),
    ("belle_multiturn", False, dict(instruction="Human:p\nAssistant:o: Human:\nHuman:q\nAssistant:",
                                    input="", output=" y"), [u("p"), a("o: Human:"), *QA]),
    ("text", True, dict(text=" q\n", meta={}), [Message("text", " q\n")]),
    ("pretrain", False, dict(text=" q\n"), [Message("text", "q")]),
    ("content", False, dict(content="q"), [Message("text", "q")]),
]


@pytest.mark.parametrize("name, auto, row, messages", GRID,
                         ids=[f"{i}-{g[0]}" for i, g in enumerate(GRID)])
def test_published_rows(name, auto, row, messages, tmp_path):
    (tmp_path/"1.jpg").touch()
    before = json.dumps(row)
    found = to_messages([row], name, root=tmp_path)
    assert list(found) == ([] if messages is None else [messages])
    assert found.skipped == (messages is None) and json.dumps(row) == before
    convert = pickle.loads(pickle.dumps(converter(name, root=tmp_path)))
    assert convert(row) == messages
    if auto and "text" not in row or name == "text": assert find_layout([row]) == name


def test_all_of_xtuners_keys_are_names_and_in_the_grid():
    keys = ("alpaca alpaca_zh arxiv code_alpaca colors crime_kg_assitan default law_reference "
            "llava_image_only llava medical msagent_react oasst1 openai openorca pretrain sql "
            "stack_exchange tiny_codes wizardlm").split()
    assert len(keys) == 20 and set(keys) < set(layouts()) and set(keys) < {g[0] for g in GRID}
    assert set(layouts()) == {g[0] for g in GRID} | {"oasst1_tree", "oasst1_tree_all"}
    assert all(l.name == n and l.columns and l.doc for n, l in layouts().items())


@pytest.mark.parametrize("name", [n for n, l in layouts().items() if l.system])
def test_system_messages_of_layouts(name):
    row = next(g[2] for g in GRID if g[0] == name)
    assert to_messages([row], name)[0][0].content == layouts()[name].system
    assert to_messages([row], name, system="")[0][0].role == "user"
    assert to_messages([row], name, system="mine")[0][0] == s("mine")
    assert not layouts()[name].system.endswith("\n")


# --- one conversation in all conversational layouts -----------------------------------------------

TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
TALK = [s("s"), u("q"), a("", calls=[ToolCall("weather", {"city": "Oslo"})]),
        Message("tool", "dry", name="weather"), a("y")]


def test_one_conversation_in_all_layouts():
    inner = dict(name="weather", arguments='{"city": "Oslo"}')
    start, end = [msg("system", "s"), msg("user", "q")], [msg("assistant", "y")]
    share = [said(system="s"), said(human="q"), said(function_call=json.dumps(
        dict(name="weather", arguments=dict(city="Oslo")))), said(observation="dry"), said(gpt="y")]
    rows = {
        "openai": dict(messages=[*start, msg("assistant", None, tool_calls=[
            dict(id="c1", type="function", function=inner)]),
            msg("tool", "dry", tool_call_id="c1"), *end], tools=[TOOL]),
        "objects": dict(messages=[*start, msg("assistant", "", tool_calls=[
            dict(function=dict(name="weather", arguments=dict(city="Oslo")))]),
            msg("tool", "dry", name="weather"), *end], tools=json.dumps([TOOL])),
        "legacy": dict(messages=[*start, msg("assistant", None, function_call=inner),
                                 msg("function", "dry", name="weather"), *end],
                       functions=[TOOL["function"]]),
        "sharegpt": dict(conversations=share, tools=json.dumps([TOOL["function"]])),
        "csv": dict(conversations=json.dumps(share), tools=json.dumps([TOOL])),
        "system column": dict(conversations=share[1:], system="s", tools=[TOOL]),
        "prompt_completion": dict(prompt=start, completion=[
            msg("assistant", "", tool_calls=[dict(function=inner)]), msg("tool", "dry"), *end],
            tools=[TOOL])}
    for name, row in rows.items():
        found = to_messages([row])[0]
        assert found.tools == [TOOL], name
        for m in found: m.tool_calls = [replace(c, id=None) for c in m.tool_calls]
        assert found == TALK, name


def test_plain_talk_in_all_layouts():
    pair = [dict(input="q", output="y"), dict(input="r", output="z")]
    flat = [msg("user", "q"), msg("assistant", "y"), msg("user", "r"), msg("assistant", "z")]
    share = [said(human="q"), said(gpt="y"), said(human="r"), said(gpt="z")]
    rows = {"alpaca": dict(instruction="r", output="z", history=[["q", "y"]]),
            "query_response": dict(query="r", response="z", history=[["q", "y"]]),
            "conversation": dict(conversation=pair), "messages": dict(messages=flat),
            "sharegpt": dict(conversations=share), "openai": dict(messages=flat),
            "wizardlm": dict(conversations=share),
            "msagent": dict(conversations=[said(user="q"), said(assistant="y"), said(user="r"),
                                           said(assistant="z")]),
            "moss": dict(chat=dict(turn_1=moss(human="q", moss="y"),
                                   turn_2=moss(human="r", moss="z"))),
            "moss_002": dict(plain_text="[Human]: q<eoh> [MOSS]: y<eoa>[Human]: r<eoh> [MOSS]: z"
                                        "<eoa>"),
            "oasst1": dict(text="### Human: q### Assistant: y### Human: r### Assistant: z"),
            "belle_multiturn": dict(instruction="Human:q\nAssistant:y\nHuman:r\nAssistant:",
                                    output="z"),
            "meddialog": dict(utterances=["patient: q", "doctor: y", "patient: r", "doctor: z"])}
    for name, row in rows.items():
        assert list(to_messages([row], name)[0]) == [u("q"), a("y"), u("r"), a("z")], name


@pytest.mark.parametrize("row", [PLAIN, PLUGINS])
def test_moss_is_written_again_to_the_letter(row):
    text = row["meta_instruction"] + "".join("".join(t.values()) for t in row["chat"].values())
    rendered = template("moss_sft").render(to_messages([row])[0])
    assert rendered.text == text
    learned = "".join(rendered.text[i:j] for i, j in rendered.spans)
    assert "wren'" not in learned and "Bird?" not in learned and "You are MOSS" not in learned


@pytest.mark.parametrize("name", ["qwen_chat", "internlm2_chat"])
def test_calls_of_agents_are_learned_and_results_are_not(name):
    for layout in "msagent", "msagent_react":
        talk = to_messages([dict(conversations=AGENT)], layout)[0]
        rendered = template(name).render(talk)
        learned = [rendered.text[i:j] for i, j in rendered.spans]
        assert len(learned) == 3 and "text_ie" in learned[0] and '"deep": true' in learned[0]
        assert '{"places": ["Oslo"]}' in rendered.text and "places" not in "".join(learned)


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda t: t.strip() and t.strip() != "<nooutput>")


@settings(max_examples=200, deadline=None)
@given(q=words, y=words, system=words)
def test_texts_are_kept_to_the_letter(q, y, system):
    flat, share = [msg("user", q), msg("assistant", y)], [said(human=q), said(gpt=y)]
    rows = dict(alpaca=dict(instruction=q, output=y, system=system),
                query_response=dict(query=q, response=y, system=system),
                messages=dict(messages=flat, system=system),
                sharegpt=dict(conversations=share, system=system),
                conversation=dict(conversation=[dict(system=system, input=q, output=y)]),
                prompt_completion=dict(prompt=flat[:1], completion=flat[1:], system=system),
                openorca=dict(system_prompt=system, question=q, response=y))
    for name, row in rows.items():
        assert to_messages([row], name) == [[s(system), u(q), a(y)]]
    assert to_messages([dict(text=q)], "text") == [[Message("text", q)]]


# --- what columns don't decide --------------------------------------------------------------------

@pytest.mark.parametrize("row, match", [
    (dict(instruction="a", output="b", text="c"), "two layouts fit, alpaca and text"),
    (dict(text="### Human: a### Assistant: b"), "two layouts fit, oasst1 and text"),
    (dict(instruction="Human:a\nAssistant:", output="b"),
     "two layouts fit, alpaca and belle_multiturn"),
    (dict(conversations=AGENT), "two layouts fit, sharegpt and msagent"),
    (dict(instruction="a", output="b", messages=[msg("user", "a")], text="c"), "3 layouts fit"),
    (dict(context="a", question="b", answer="c"), "no layout is taken for these .*layout=sql"),
    (dict(content="a"), "layout=content"),
    (dict(prompt="a", chosen="b", rejected="c"), "chosen and a rejected"),
    (dict(messages=[msg("user", "a"), msg("assistant", "b")], label=True), "judged replies"),
    (dict(prompt="a", completion="b", kto_tag=False), "judged replies"),
    (dict(question="a", reply="b"), "no layout fits; found the columns 'question', 'reply'"),
    (dict(x=[{"from": "human"}]), "'x' has turns of 'from'"),
    (dict(id="7", messages=[]), "'messages' holds no turns"),
    (dict(input="a", instruction="b"), "no layout fits")])
def test_never_guessed(row, match):
    with pytest.raises(FtkitError, match=match) as e:
        find_layout(Rows([row], [("rows.json, row", 1)]))
    assert str(e.value).startswith("rows.json, row 1, layout=auto: ")


def test_find_layout_looks_at_many_rows():
    rows = [dict(system_prompt=None, question="a", response="b")]*3 + [
        dict(system_prompt="s", question="a", response="b")]
    assert find_layout(rows) == "openorca" and find_layout(rows[:3]) == "stack_exchange"
    assert find_layout([dict(instruction="a")] + [dict(instruction="a", output="b")]) == "alpaca"
    assert find_layout(dict(text=str(i)) for i in range(10**9)) == "text"  # reads no more than 100
    with pytest.raises(FtkitError, match="no rows"): find_layout([])
    assert find_layout(["messages", "input", "output"]) == "default"


def test_what_arrow_fills_with_none_is_absent():
    "Arrow gives each row the keys of all rows."
    table = Dataset.from_list([
        {"messages": [msg("user", "q"), msg("assistant", "y", loss=False),
                      msg("assistant", None, tool_calls=[
                          {"id": "1", "function": {"name": "a", "arguments": {"x": 1}}},
                          {"id": "2", "function": {"name": "b", "arguments": {"y": "z"}}}]),
                      msg("tool", "two", tool_call_id="2"), msg("tool", "one", tool_call_id="1")],
         "tools": [{"function": {"name": n, "parameters": {"properties": {p: {"type": t}}}}}
                   for n, p, t in (("a", "x", "int"), ("b", "y", "s"))],
         "weight": 2.0},
        {"messages": [msg("user", "q"), msg("assistant", "y")]}])
    rows = list(table)
    assert rows[1]["weight"] is None and rows[1]["tools"] is None
    assert set(rows[0]["messages"][2]["tool_calls"][0]["function"]["arguments"]) == {"x", "y"}
    first, second = to_messages(rows)
    assert first == [u("q"), a("y", False), a("", calls=[ToolCall("a", {"x": 1}, "1"),
                                                          ToolCall("b", {"y": "z"}, "2")]),
                     Message("tool", "two", name="b"), Message("tool", "one", name="a")]
    assert [t["function"]["parameters"]["properties"] for t in first.tools] == [
        {"x": {"type": "int"}}, {"y": {"type": "s"}}]
    assert second == QA and second.tools is None and (first.weight, second.weight) == (2., 1.)


@pytest.mark.parametrize("name", ["alpaca", "openorca", "sharegpt", "conversation", "messages",
                                  "moss", "text", "meddialog"])
def test_rows_of_one_layout_survive_arrow(name):
    rows = [g[2] for g in GRID if g[0] == name and g[1] and "image" not in g[2]]
    if name == "messages": rows = [r for r in rows if isinstance(r.get("messages"), list)
                                   and not isinstance(r["messages"][0]["content"], list)]
    if name == "moss": rows = [{**r, "num_turns": str(r["num_turns"]), "conversation_id": 1}
                               for r in rows]
    columns = dict.fromkeys(c for r in rows for c in r)
    table = Dataset.from_list([{**columns, **r} for r in rows])
    assert to_messages(list(table), name) == to_messages(rows, name)


# --- weights, pictures, functions of one's own ----------------------------------------------------

def test_sample_weights():
    row = dict(instruction="q", output="y")
    assert [to_messages([{**row, **more}])[0].weight for more in (
        {}, dict(weight=.5), dict(sample_weight=3), dict(weight="0.25"), dict(weight=None),
        dict(sample_weight=2, weight=7))] == [1, .5, 3, .25, 1, 2]
    for bad in (-1, 0, "much", float("nan"), float("inf"), True, [1]):
        with pytest.raises(FtkitError, match="row 1: the column 'weight' is .* above 0"):
            to_messages([{**row, "weight": bad}])


def test_pictures(tmp_path):
    (tmp_path/"a.jpg").touch()
    talk = [msg("user", "<image>Who?"), msg("assistant", "y")]
    inside = str((tmp_path/"a.jpg").resolve())
    for row in (dict(messages=talk, images=["a.jpg"]), dict(messages=talk, image="a.jpg"),
                dict(messages=talk, images=[dict(path="a.jpg", bytes=None)]),
                dict(messages=[msg("user", [dict(type="image"), dict(type="text", text="Who?")]),
                               talk[1]], images=["a.jpg"]),
                dict(messages=[msg("user", [dict(type="image_url", image_url=dict(url="a.jpg")),
                                            dict(type="text", text="Who?")]), talk[1]])):
        found = to_messages([row], root=tmp_path)[0]
        assert found == [u("<image>Who?"), a("y")] and len(found.images) == 1
        assert str(Path(found.images[0]).resolve()) == inside
    assert to_messages([dict(messages=talk)], root=tmp_path)[0].images == ()  # a text about marks
    for more, match in ((dict(images=["a.jpg", "a.jpg"]), "1 marks <image>, and there are 2 files"),
                        (dict(images=[]), "1 marks <image>, and there are 0 files"),
                        (dict(images=[7]), "holds int, not the path"),
                        (dict(image=dict(bytes=b"1", path=None)), "holds dict, not the path"),
                        (dict(images=["a.jpg"], videos=["b.mp4"]), "'videos' would be lost")):
        with pytest.raises(FtkitError, match=match):
            to_messages([{**dict(messages=talk), **more}], root=tmp_path)


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg",
                                  "http://x.org/a.jpg", "file:///etc/passwd", "link.jpg"])
def test_pictures_stay_in_their_folder(path, tmp_path):
    (tmp_path/"data").mkdir()
    (tmp_path/"secret.jpg").touch()
    (tmp_path/"data/link.jpg").symlink_to(tmp_path/"secret.jpg")
    row = dict(messages=[msg("user", "<image>"), msg("assistant", "y")], images=[path])
    with pytest.raises(FtkitError, match="row 1: "): to_messages([row], root=tmp_path/"data")


def own(row):
    if row["x"] is None: return None
    return [msg("user", row["x"]), msg("assistant", row["y"])]


def test_functions_of_ones_own(tmp_path, monkeypatch):
    (tmp_path/"mine.py").write_text(
        "def read(row):\n    return [dict(role='user', content=row['x']),\n"
        "            dict(role='assistant', content=row['y'])]\nnumber = 3\n")
    rows = [dict(x="q", y="y"), dict(x="q", y="y")]
    assert to_messages(rows, own) == [QA, QA]
    assert to_messages([dict(x=None, y="")], own).skipped == 1
    assert to_messages(rows, f"{tmp_path}/mine.py:read", system="s")[1] == [s("s"), *QA]
    monkeypatch.syspath_prepend(tmp_path)
    assert to_messages(rows, "mine:read") == [QA, QA]
    talk = Conversation(QA, [TOOL], 2.)
    assert to_messages(rows, lambda row: talk)[0].weight == 2.
    for layout, match in (("nowhere:read", "can't be imported"),
                          ("mine:reed", "no function 'reed'"),
                          ("mine:number", "no function"), (f"{tmp_path}/no.py:read", "no.py"),
                          ("alpacca", "Did you mean 'alpaca'"), (lambda r: r["z"], "KeyError: 'z'"),
                          (lambda r: "text", "expected a list of messages"),
                          (lambda r: [], "conversation is empty"),
                          (lambda r: [dict(role="bot", content="")], "unknown role"),
                          (lambda r: [7], "message 1 needs")):
        with pytest.raises(FtkitError, match=match): to_messages(rows, layout)
    with pytest.raises(FtkitError, match="my.json, row 1: .*KeyError"):
        to_messages(rows, lambda r: r["z"], where="my.json")
    assert as_layout(as_layout("alpaca")) is layouts()["alpaca"]


def test_llama_factorys_descriptions(tmp_path):
    tags = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="bot")
    entries = {
        "plain": {"file_name": "a.json"}, "chat": {"formatting": "sharegpt"},
        "named": {"columns": {"prompt": "frage", "response": "antwort", "system": "rolle"}},
        "tagged": {"formatting": "sharegpt", "columns": {"messages": "turns", "tools": "apis"},
                   "tags": tags},
        "text": {"columns": {"prompt": "content"}}, "pairs": {"ranking": True},
        "pictures": {"formatting": "sharegpt", "columns": {"messages": "m", "images": "pics"}}}
    (tmp_path/"dataset_info.json").write_text(json.dumps(entries))
    (tmp_path/"1.jpg").touch()

    def read(name, row):
        return to_messages([row], f"{tmp_path}/dataset_info.json:{name}", root=tmp_path)[0]
    assert read("plain", dict(instruction="q", input="x", output="y")) == [u("q\nx"), a("y")]
    assert read("chat", dict(conversations=[said(human="q"), said(gpt="y")])) == QA
    assert read("named", dict(frage="q", antwort="y", rolle="s", input="other")) == [s("s"), *QA]
    tagged = read("tagged", dict(turns=[msg("user", "q"), msg("bot", "y")], apis=[TOOL]))
    assert tagged == QA and tagged.tools == [TOOL]
    assert read("text", dict(content="q")) == [Message("text", "q")]
    seen = read("pictures", dict(m=[said(human="<image>"), said(gpt="y")], pics=["1.jpg"]))
    assert len(seen.images) == 1
    for name, row, match in (("pairs", {}, "pairs of replies"),
                             ("plan", {}, "Did you mean 'plain'"),
                             ("chat", dict(conversations=[said(robot="q")]), "row 1: .*'robot'"),
                             ("named", dict(frage="q"), "row 1: the column 'antwort' is missing")):
        with pytest.raises(FtkitError, match=match): read(name, row)


# --- trees ----------------------------------------------------------------------------------------

def node(i, parent, role, text, rank=None, **more):
    return dict(message_id=i, parent_id=parent, role=role, text=text, rank=rank, lang="en",
                message_tree_id="1", **{"deleted": False, "review_result": True, **more})


TREE = [node("1", None, "prompter", "q"), node("2", "1", "assistant", "bad", 1),
        node("3", "1", "assistant", "y", 0), node("4", "3", "prompter", "r"),
        node("5", "4", "assistant", "z", 1), node("6", "4", "assistant", "gone", 0, deleted=True),
        node("7", "2", "prompter", "left"), node("8", "4", "assistant", "unranked"),
        node("9", None, "prompter", "alone"), node("A", None, "prompter", "spam", deleted=True),
        node("B", "A", "assistant", "never"),
        node("C", "1", "assistant", "failed", 2, review_result=False)]


@pytest.mark.parametrize("rows", [TREE, TREE[::-1], list(Dataset.from_list(TREE))])
def test_trees(rows):
    assert find_layout(rows) == "oasst1_tree"
    best = to_messages(rows)
    assert best == [[u("q"), a("y"), u("r"), a("z")]] and best.skipped == 1
    paths = to_messages(rows, "oasst1_tree_all")
    assert paths == [best[0], [u("q"), a("y", False), u("r"), a("unranked")], [u("q"), a("bad")]]


def test_each_reply_of_a_tree_is_learned_once():
    texts = [m.content for c in to_messages(TREE, "oasst1_tree_all") for m in c
             if m.role == "assistant" and m.loss is not False]
    assert sorted(texts) == ["bad", "unranked", "y", "z"]


@pytest.mark.parametrize("rows, match", [
    (TREE[:3] + TREE[4:], "row 4: the parent_id '4' is no message"),
    (TREE + TREE[:1], "row 13: the message_id '1' occurs twice"),
    ([{**TREE[0], "text": None}], "row 1: the column 'text' is missing"),
    ([{**TREE[0], "role": "user"}], "row 1: unknown role 'user'"),
    ([{**TREE[0], "parent_id": 7}], "row 1: the column 'parent_id' holds int"),
    ([TREE[0], {**TREE[1], "rank": "first"}], "row 2: the column 'rank' is 'first'"),
    ([node("1", "2", "prompter", "a"), node("2", "1", "assistant", "b")], "row 1: .*circle")])
def test_broken_trees(rows, match):
    with pytest.raises(FtkitError, match=match): to_messages(rows, "oasst1_tree")


def test_only_trees_are_gathered():
    pairs = iter([({"text": "a"}, ("row", 1))])
    assert gathered("text", pairs) is pairs


# --- what is refused ------------------------------------------------------------------------------

def chat(*turns, **more): return dict(messages=list(turns), **more)
def share(*turns, **more): return dict(conversations=list(turns), **more)


def call(i, name="f", arguments="{}"):
    return dict(id=i, type="function", function=dict(name=name, arguments=arguments))


CALLED = [msg("user", "q"), msg("assistant", None, tool_calls=[call("1"), call("2")])]
BAD = [
    ("alpaca", dict(instruction="a", answer="b"), "'output' is missing; found 'instruction', 'ans"),
    ("alpaca", dict(instruction="a", output=3), "'output' holds int"),
    ("alpaca", dict(instruction=["a"], output="b"), "'instruction' holds list"),
    ("alpaca", dict(instruction="a", output="b", history=[["c"]]), "'history' should be a list of"),
    ("alpaca", dict(instruction="a", output="b", history=[["c", None]]), "'history' should be"),
    ("alpaca", dict(instruction="a", output="b", history="c"), "'history' should be"),
    ("alpaca", dict(instruction="a", output="b", tools="oops"), "tools: not valid JSON"),
    ("alpaca", dict(instruction="a\ud83d", output="b"), "half a character"),
    ("conversation", dict(conversation=[]), "is empty"),
    ("conversation", dict(conversation="hi"), "list of turns; found str"),
    ("conversation", dict(conversation=["hi"]), "a list with str in it"),
    ("conversation", dict(conversation=[dict(input="a", output="b", sep="")]), "turn 1 .*'sep'"),
    ("conversation", dict(conversation=[dict(output="b")]), "'input' is missing"),
    ("messages", dict(text="a"), "'messages' should be a list of turns; found nothing"),
    ("messages", chat(), "conversation in 'messages' is empty"),
    ("messages", chat(msg("usr", "a")), "unknown role in message 1: 'usr'"),
    ("messages", chat(dict(content="a")), "'role' is missing"),
    ("messages", chat(dict(role="user")), "'content' is missing"),
    ("messages", chat(msg("user", 7)), "'content' holds int"),
    ("messages", chat(msg("user", [dict(type="audio")])), "a part of type 'audio'"),
    ("messages", chat(msg("user", ["a"])), "a part of type 'str'"),
    ("messages", chat(msg("user", "a", reasoning_content="b")), "'reasoning_content', which would"),
    ("messages", chat(msg("user", "a", loss="perhaps")), "perhaps"),
    ("messages", chat(msg("assistant", "a", weight=.5)), "'loss' is 0.5"),
    ("messages", chat(msg("assistant", "a", weight=0, loss=True)), "contradict each other"),
    ("messages", chat(*CALLED, msg("tool", "a", tool_call_id="3")), "message 3 answers .*'3'"),
    ("messages", chat(*CALLED, *[msg("tool", "a", tool_call_id="1")]*2), "message 4 answers"),
    ("messages", chat(msg("user", "a"), msg("tool", "b")), "message 2 answers a call that"),
    ("messages", chat(msg("user", "a"), msg("assistant", "b"), msg("tool", "c")), "did not make"),
    ("messages", chat(*CALLED, *[msg("tool", "a")]*3), "message 5 answers"),
    ("messages", chat(*CALLED, msg("user", "x"), msg("tool", "a", tool_call_id="1")), "message 4"),
    ("messages", chat(msg("assistant", "", tool_calls=[1])), "a tool call needs"),
    ("messages", chat(msg("assistant", "", tool_calls="f()")), "'tool_calls' of message 1 is str"),
    ("messages", chat(msg("assistant", "", tool_calls=[call("1", arguments="{")])), "valid JSON"),
    ("messages", chat(msg("assistant", "", tool_calls=[call("1", arguments="[1]")])), "an object"),
    ("messages", chat(msg("user", "", tool_calls=[call("1")])), "only the assistant calls tools"),
    ("messages", chat(msg("user", "a"), tools=[dict(parameters={})]), "a tool needs a name"),
    ("sharegpt", share(said(human="a"), said(robot="b")), "unknown speaker in turn 2: 'robot'"),
    ("sharegpt", share({"value": "a"}), "'from' is missing"),
    ("sharegpt", share({"from": "human", "value": None}), "'value' is missing"),
    ("sharegpt", share(said(human="a"), said(function_call="f()")), "turn 2 is not valid JSON"),
    ("sharegpt", share(said(human="a"), said(function_call='{"x": 1}')), "a tool call needs"),
    ("sharegpt", share(said(human="a"), said(observation="b")), "message 2 answers a call"),
    ("sharegpt", dict(conversations="[not json"), "list of turns; found str"),
    ("llava_image_only", share(said(human="a"), said(gpt="b")), "has no <image>"),
    ("prompt_completion", dict(prompt="a"), "'completion' is missing"),
    ("prompt_completion", dict(prompt=[msg("assistant", "a")], completion="b"), "ends with a"),
    ("prompt_completion", dict(prompt="a", completion=[msg("user", "b")]), "begins with the role"),
    ("colors", dict(description="a"), "'color' is missing"),
    ("text", dict(txt="a"), "'text' is missing; found 'txt'"),
    ("text", dict(text=b"a"), "'text' holds bytes"),
    ("oasst1", dict(text="Preface ### Human: a### Assistant: b"), "should begin with '### Human:'"),
    ("oasst1", dict(text="plain"), "should begin with"),
    ("belle_multiturn", dict(instruction="Human:a", output="b"), "should end with 'Assistant:'"),
    ("belle_multiturn", dict(instruction="a", output="b"), "should begin with"),
    ("meddialog", dict(utterances=["nurse: a"]), "unknown speaker in utterance 1: 'nurse'"),
    ("meddialog", dict(utterances="a"), "list of texts"),
    ("msagent", share(said(human="a")), "turn 1 is from 'human'"),
    ("msagent", dict(conversations="[{"), "is not a list of turns"),
    ("msagent", share(said(user="a"), said(assistant=THINK.replace('"url"', "url"))),
     "the call in turn 2 is not valid JSON"),
    ("msagent_react", share(said(user="a"), said(assistant=THINK.replace("api_name", "api"))),
     "the call in turn 2 has no 'api_name'"),
    ("msagent", share(said(user="a"), said(assistant=EXEC)), "turn 2 has a result that"),
    ("msagent_react", share(said(user="a"), said(assistant=THINK[:-9])), "without its partner"),
    ("moss", dict(chat=[1]), "'chat' should be an object"),
    ("moss", dict(chat=dict(turn_2=SEARCH)), "found turn_2"),
    ("moss", {**PLAIN, "num_turns": 2}, "num_turns is 2, and 'chat' has 'turn_1'"),
    ("moss", dict(chat=dict(turn_1={**SEARCH, "MOSS": "hi"})), "'MOSS' of turn 1 should stand"),
    ("moss", dict(chat=dict(turn_1={**SEARCH, "Human": None})), "'Human' is missing"),
    ("moss_002", dict(plain_text="[Human]: a<eoh> [MOSS]: b<eoa> tail"), "found 'tail'"),
    ("moss_002", dict(plain_text=""), "and nothing else"),
]


@pytest.mark.parametrize("name, row, match", BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_rows(name, row, match):
    with pytest.raises(FtkitError, match=match) as e: to_messages([row], name, where="x.json")
    assert str(e.value).startswith("x.json, row 1: ") and "\n" not in str(e.value)


@pytest.mark.parametrize("name", layouts())
def test_any_nonsense_is_an_error_and_no_crash(name):
    turn = {"from": None, "value": {}, "role": [], "content": {}, "input": 3, "output": {}}
    values = (None, 7, True, "x", [], [None], [[]], {}, [turn], ["x"], {"turn_1": 1},
              {"turn_1": {}}, [{}], "[{}]", [{"role": "user"}], [{"from": "human", "value": 1}])
    names = {c for g in GRID for c in g[2]} | {"thread"}
    for value in values:
        row = dict.fromkeys(names, value)
        try: to_messages([row], name, where="x.json")
        except FtkitError as e: assert "x.json, row 1" in str(e)


def test_text_has_no_system_message():
    for name in ("text", "pretrain", "content"):
        with pytest.raises(FtkitError, match="no system"): converter(name, system="b")


# --- real samples ---------------------------------------------------------------------------------

@pytest.mark.parametrize("file, layout, count", [
    ("alpaca_en_demo.json", "alpaca", 999), ("identity.json", "alpaca", 91),
    ("c4_demo.jsonl", "text", 300), ("glaive_toolcall_en_demo.json", "sharegpt", 300),
    ("mllm_demo.json", "messages", 6)])
def test_real_samples(file, layout, count):
    rows = read_rows(shared(file))
    assert find_layout(rows) == layout
    found = to_messages(rows, layout, root=SHARED)
    assert len(found) + found.skipped == count
    for row, c in zip(rows, found):
        texts = [str(v) for v in row.values() if isinstance(v, str)] + [
            t.get("value", t.get("content")) for t in row.get("conversations",
                                                             row.get("messages", []))]
        for m in c:
            if not m.tool_calls: assert any(m.content.startswith(t) for t in texts if t)


def test_real_tool_calls():
    rows = read_rows(shared("glaive_toolcall_en_demo.json"))
    found = to_messages(rows)
    calls = [c for talk in found for m in talk for c in m.tool_calls]
    assert len(calls) == 211 and sum(m.role == "tool" for talk in found for m in talk) == 211
    assert sum(talk.tools is None for talk in found) == 109
    assert calls[0] == ToolCall("search_recipes",
                                {"ingredients": ["chicken", "bell peppers", "rice"]})
    assert all(m.name for talk in found for m in talk if m.role == "tool")


def test_real_pictures():
    found = to_messages(read_rows(shared("mllm_demo.json")), root=SHARED)
    assert [len(c.images) for c in found] == [2, 1, 1, 2, 1, 1]
    assert all(Path(f).is_file() for c in found for f in c.images)


@pytest.mark.parametrize("file, match", [("dpo_en_demo.json", "a chosen and a rejected"),
                                         ("kto_en_demo.json", "judged")])
def test_real_preferences_are_not_tuned_on_by_accident(file, match):
    with pytest.raises(FtkitError, match=match): find_layout(read_rows(shared(file)))


# --- pairs and judgements -------------------------------------------------------------------------

def talk(*texts): return [msg(r, t) for r, t in zip(("user", "assistant")*9, texts)]


PAIR = Preference([u("q")], [a("y")], [a("n")])
LONG_PAIR = Preference([u("p"), a("o"), u("q")], [a("y")], [a("n")])
PAIRS = [
    ("prompt_pair", dict(prompt="q", chosen="y", rejected="n"), PAIR),
    ("prompt_pair", dict(prompt=[msg("user", "q")], chosen=[msg("assistant", "y")],
                         rejected=[msg("assistant", "n")]), PAIR),
    ("prompt_pair", dict(prompt=talk("p", "o", "q"), chosen=talk("p", "o", "q", "y"),
                         rejected=talk("p", "o", "q", "n")), LONG_PAIR),
    ("prompt_pair", dict(prompt="q", prompt_id="1", chosen=talk("q", "y"),
                         rejected=talk("q", "n"), score_chosen=8.), PAIR),
    ("prompt_pair", dict(source="s", prompt="q", question="q", chosen=talk("p", "o", "q", "y"),
                         rejected=talk("p", "o", "q", "n")), LONG_PAIR),
    ("prompt_pair", dict(prompt="q", chosen="y", rejected="n", margin=2),
     Preference([u("q")], [a("y")], [a("n")], 2.)),
    ("sides", dict(chosen=talk("p", "o", "q", "y"), rejected=talk("p", "o", "q", "n")), LONG_PAIR),
    ("sides", dict(chosen=talk("q", "y", "r", "z"), rejected=talk("q", "n")),
     Preference([u("q")], [a("y"), u("r"), a("z")], [a("n")])),
    ("sides", dict(chosen="\n\nHuman: p\n\nAssistant: o\n\nHuman: q\n\nAssistant: y",
                   rejected="\n\nHuman: p\n\nAssistant: o\n\nHuman: q\n\nAssistant: n"),
     LONG_PAIR),
    ("ranking", share(said(human="p"), said(gpt="o"), said(human="q"), chosen=said(gpt="y"),
                      rejected=said(gpt="n")), LONG_PAIR),
    ("ranking", dict(messages=talk("q"), system="s", chosen=msg("assistant", "y"),
                     rejected=msg("assistant", "n")),
     Preference([s("s"), u("q")], [a("y")], [a("n")])),
    ("alpaca_ranking", dict(instruction="q", input="x", chosen="y", rejected="n"),
     Preference([u("q\nx")], [a("y")], [a("n")])),
    ("question_pair", dict(system="s", question="q", chosen="y", rejected="n"),
     Preference([s("s"), u("q")], [a("y")], [a("n")])),
    ("question_pair", dict(system="", question="q", chosen="y", rejected="n"), PAIR)]
JUDGED = [
    ("label", dict(prompt="q", completion="y", label=True), Feedback([u("q")], [a("y")], True)),
    ("label", dict(prompt="q", completion=talk("q", "y"), label="False"),
     Feedback([u("q")], [a("y")], False)),
    ("label", dict(prompt=talk("q"), completion=[msg("assistant", "y")], label=0),
     Feedback([u("q")], [a("y")], False)),
    ("judged_talk", dict(messages=talk("p", "o", "q", "y"), label=True),
     Feedback([u("p"), a("o"), u("q")], [a("y")], True)),
    ("judged_talk", share(said(human="q"), said(gpt="y"), kto_tag=False),
     Feedback([u("q")], [a("y")], False)),
    ("judged_pair", dict(instruction="q", input="", output="y", kto_tag=True),
     Feedback([u("q")], [a("y")], True))]


@pytest.mark.parametrize("name, row, found", [*PAIRS, *JUDGED])
def test_published_pairs(name, row, found):
    read, table = (to_pairs, PREFERENCES) if isinstance(found, Preference) else (to_feedback,
                                                                                  FEEDBACKS)
    assert read([row]) == read([row], name) == [found]
    assert find_layout([row], table) == name
    assert all(l.name == n and l.doc for n, l in table.items())


def test_every_kind_of_pair_is_in_the_grid():
    assert {p[0] for p in PAIRS} == set(PREFERENCES) and {j[0] for j in JUDGED} == set(FEEDBACKS)


def test_pairs_have_tools_weights_and_systems():
    row = dict(prompt=talk("q"), chosen=[msg("assistant", "", tool_calls=[call("1")])],
               rejected=[msg("assistant", "n")], tools=[TOOL], sample_weight=.5)
    found = to_pairs([row], system="s")[0]
    assert found.prompt.tools == [TOOL] and found.prompt.weight == .5
    assert found.prompt[0] == s("s") and found.chosen[0].tool_calls[0].name == "f"
    assert to_pairs([dict(x=1)], lambda row: PAIR)[0] == PAIR
    assert to_pairs([dict(x=1)], lambda row: None).skipped == 1
    with pytest.raises(FtkitError, match="row 1: expected a Preference"):
        to_pairs([dict(x=1)], lambda row: QA)


def test_prompts():
    assert to_prompts([dict(prompt="q"), dict(prompt=talk("p", "o", "q"))]) == [
        [u("q")], [u("p"), a("o"), u("q")]]
    assert to_prompts([dict(prompt="q")], system="s")[0] == [s("s"), u("q")]
    for row, match in ((dict(prompt=talk("q", "y")), "ends with the role 'assistant'"),
                       (dict(text="q"), "'prompt' is missing"), (dict(prompt=[]), "is empty")):
        with pytest.raises(FtkitError, match=f"row 1: .*{match}"): to_prompts([row])


@pytest.mark.parametrize("read, row, match", [
    (to_pairs, dict(prompt="q", chosen="y", rejected="y"), "are the same"),
    (to_pairs, dict(chosen=talk("q", "y"), rejected=talk("q", "y")), "are the same"),
    (to_pairs, dict(chosen=talk("q", "y"), rejected=talk("r", "y")), "share no prompt"),
    (to_pairs, dict(chosen=talk("p", "o", "q", "y"), rejected=talk("p", "o", "r", "n")),
     "part at message 3, which is no reply"),
    (to_pairs, dict(chosen=talk("q", "y"), rejected=talk("q", "y", "r", "n")),
     "chosen side is only the beginning"),
    (to_pairs, dict(chosen=talk("q", "y", "r"), rejected=talk("q", "n")), "should end with"),
    (to_pairs, dict(chosen="q y", rejected="q n"), "should begin with"),
    (to_pairs, dict(prompt=talk("q"), chosen=talk("r", "y"), rejected=talk("q", "n")),
     "chosen answer begins with another prompt; message 1 differs"),
    (to_pairs, dict(prompt=talk("q"), chosen=talk("q"), rejected=talk("q", "n")), "is empty"),
    (to_pairs, dict(prompt=talk("q", "y"), chosen="y", rejected="n"), "nothing to answer"),
    (to_pairs, dict(prompt="q", chosen="y\ud83d", rejected="n"), "half a character"),
    (to_pairs, dict(prompt="q", chosen=3, rejected="n"), "'chosen' holds int"),
    (to_pairs, dict(prompt="q", chosen="y", rejected="n", margin="much"), "'margin' is 'much'"),
    (to_pairs, share(said(human="q"), chosen=said(human="y"), rejected=said(gpt="n")),
     "chosen answer should begin with a reply"),
    (to_pairs, dict(prompt="q", chosen=[msg("assistant", "a"), msg("tool", "b")], rejected="n"),
     "message 2 answers a call"),
    (to_feedback, dict(messages=talk("q", "y", "r"), label=True), "nothing to answer"),
    (to_feedback, dict(messages=talk("q"), label=True), "needs a prompt as well"),
    (to_feedback, dict(prompt="q", completion="y", label="good"), "'label' is 'good'"),
    (to_feedback, dict(prompt="q", completion="y", label=.5), "'label' is 0.5")])
def test_bad_pairs(read, row, match):
    with pytest.raises(FtkitError, match=match) as e: read([row], where="x.json")
    assert str(e.value).startswith("x.json, row 1")


@pytest.mark.parametrize("row, match", [
    (dict(prompt="q", question="q", chosen="y", rejected="n"), "two layouts fit"),
    (dict(text="q"), "no layout fits")])
def test_pairs_are_never_guessed(row, match):
    with pytest.raises(FtkitError, match=match): to_pairs([row])


@pytest.mark.parametrize("read, table", [(to_pairs, PREFERENCES), (to_feedback, FEEDBACKS)])
def test_no_nonsense_crashes(read, table):
    turn = {"from": None, "value": {}, "role": [], "content": {}}
    names = {c for p in (*PAIRS, *JUDGED) for c in p[1]}
    for name in table:
        for value in (None, 7, "x", [], [None], {}, turn, [turn], ["x"], [{}]):
            with pytest.raises(FtkitError, match="row 1"): read([dict.fromkeys(names, value)], name)


def test_real_pairs():
    found = to_pairs(read_rows(shared("dpo_en_demo.json")))
    assert len(found) == 300 and sum(p.prompt[0].role == "system" for p in found) == 80
    found = to_feedback(read_rows(shared("kto_en_demo.json")))
    assert len(found) == 300 and sum(f.good for f in found) == 150
    assert {len(f.completion) for f in found} == {1}
