"What is served is what was trained: saved folders, read by transformers alone."
import json
from itertools import pairwise
from types import SimpleNamespace
import pytest
import torch
from toys import FAMILIES, family_toy, toy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from ftkit.core import FtkitError
from ftkit.convert import merge
from ftkit.data.encode import encode, encode_prompt
from ftkit.data.families import template
from ftkit.data.jinja import JinjaTemplate
from ftkit.data.messages import Conversation
from ftkit.generate import Chat
from ftkit.lora.inject import LoraConfig, add_lora, lora_layers
from ftkit.models.load import load_template, load_tokenizer, save_model

LOOK = [dict(type="function", function=dict(
    name="look", description="Look somewhere", parameters=dict(
        type="object", required=["where"], properties=dict(where=dict(type="string")))))]


def said(*pairs): return [dict(role=r, content=c) for r, c in pairs]


S, U, A = "system", "user", "assistant"
CALL = dict(role=A, content="", tool_calls=[dict(type="function", function=dict(
    name="look", arguments=dict(where="up at night")))])
TALKS = dict(
    one=said((U, "What colour is the sky?"), (A, "Blue.")),
    system=said((S, "Be brief."), (U, "What colour is the sky?"), (A, "Blue.")),
    three=said((S, "Be brief."), (U, "天空 {{ x }}"), (A, "Blue {bos}"), (U, "And at night?"),
               (A, "Black."), (U, "Why \\ 'that'?"), (A, "No sun.\n\nNone.")),
    again=said((U, "What colour is the sky?"), (A, "Blue."), (U, "And at night?"), (A, "Black.")),
    tools=[*said((U, "The sky?")), CALL, *said(("tool", "blue"), (A, "It is blue."))],
    tools_and_system=[*said((S, "Be brief."), (U, "The sky?")), CALL,
                      *said(("tool", "blue"), (A, "It is blue."))])
UNENDED = {"chatglm2", "baichuan_chat", "minicpm"}  # their authors end the last reply alone


def tiny(tokenizer, lora=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None))
    return add_lora(model, LoraConfig(r=2)) if lora else model


def known(t):
    "The conversations that the template can write, with their tools."
    out = []
    for name, talk in TALKS.items():
        for tools in [LOOK, None] if name.startswith("tools") else [None]:
            try: t.render(talk, tools=tools)
            except FtkitError: continue
            out.append((talk, tools))
    assert out
    return out


def check_served(folder, t, tokenizer, bos_times=None):
    "From `folder`, transformers alone gives the texts and ids of the training, and stops."
    theirs = AutoTokenizer.from_pretrained(folder)
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    assert stops == t.stop_ids(tokenizer) and stops
    talks = known(t)
    def their_text(part, tools, gen): return theirs.apply_chat_template(
        part, tools=tools, tokenize=False, add_generation_prompt=gen)
    def their_ids(part, tools, gen): return theirs.apply_chat_template(
        part, tools=tools, add_generation_prompt=gen, return_dict=False)
    for talk, tools in talks:
        for k in range(1, len(talk) + 1):
            gen = k < len(talk)
            if gen and talk[k]["role"] != A: continue
            part = talk[:k]
            text, ids = their_text(part, tools, gen), their_ids(part, tools, gen)
            assert text == t.render(part, gen, tools).text
            conversation = Conversation(part, tools=tools)
            trained = (encode_prompt(conversation, t, tokenizer) if gen
                       else encode(conversation, t, tokenizer).ids)
            assert ids == trained == theirs(text, add_special_tokens=False)["input_ids"]
            if bos_times is not None: assert ids.count(theirs.bos_token_id) == bos_times
        e = encode(Conversation(talk, tools=tools), t, tokenizer)
        learned = [l != -100 for l in e.labels] + [False]
        ends = [l for l, (a, b) in zip(e.labels, pairwise(learned)) if a and not b]
        if t.name in UNENDED: ends = ends[-1:]
        assert ends and set(ends) <= set(stops)
        prompt = their_ids(talk[:-1], tools, True)
        assert e.ids[:len(prompt)] == prompt
    return theirs, talks


# families that write the begin token before every turn, or other tokens in its place
OWN_BEGIN = {"llama2_chat", "code_llama_chat", "chatglm3"}
WITH_TOOLS = {"qwen_chat", "qwen2_5_chat", "internlm2_chat", "llama3_1_chat", "chatglm3"}


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, adds_bos, tmp_path):
    tokenizer = family_toy(name, adds_bos=adds_bos)
    t = template(name, tokenizer)
    folder = save_model(tiny(tokenizer), tokenizer, t, tmp_path/"saved")
    once = None if name in OWN_BEGIN else int(t.begin == "{bos}")
    assert once != 0 or not adds_bos
    theirs, talks = check_served(folder, t, tokenizer, once)
    if name in WITH_TOOLS: assert any(tools for _, tools in talks)
    assert json.loads((folder/"ftkit.json").read_text())["template"] == t.name
    again = load_template(folder, load_tokenizer(folder))
    for talk, tools in talks: assert again.render(talk, tools=tools) == t.render(talk, tools=tools)


@pytest.mark.parametrize("metaspace", ["first", "always"])
@pytest.mark.parametrize("name", ["llama2_chat", "mistral", "vicuna", "alpaca", "minicpm", "zephyr",
                                  "internlm2_chat"])
def test_pieces_as_sentencepiece_makes_them(name, metaspace, tmp_path):
    tokenizer = family_toy(name, adds_bos=True, metaspace=metaspace)
    t = template(name, tokenizer)
    folder = save_model(tiny(tokenizer), tokenizer, t, tmp_path/"saved")
    check_served(folder, t, tokenizer)


# --- the tokenizer's own --------------------------------------------------------------------------

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CLOCK = "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n"
LISTED = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLING = CHATML.replace("<|im_end|>", (
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}<|im_end|>"))


@pytest.mark.parametrize("source", [CHATML, CLOCK + CHATML, LISTED + CALLING,
                                    dict(default=CHATML, tool_use=LISTED + CALLING)])
def test_a_template_of_its_own(source, tmp_path):
    tokenizer = toy(["<|im_start|>", "<|im_end|>"], chat_template=source)
    t = JinjaTemplate(tokenizer)
    folder = save_model(tiny(tokenizer), tokenizer, t, tmp_path/"saved")
    theirs, talks = check_served(folder, t, tokenizer)
    assert tokenizer.chat_template == source                   # in memory, as it was
    if "strftime_now" in source: assert "26 Jul 2024" in t.render(TALKS["one"]).text
    assert any(tools for _, tools in talks) == ("tool_use" in source or LISTED in source)
    again = load_template(folder, load_tokenizer(folder))
    assert (again.name, again.stop, again.jinja) == ("tokenizer", t.stop, t.jinja)


# --- merged ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["qwen_chat", "vicuna", "tokenizer"])
def test_merged(name, tmp_path):
    family = "qwen_chat" if name == "tokenizer" else name
    tokenizer = family_toy(family, adds_bos=True, chat_template=CHATML)
    save_model(tiny(tokenizer), tokenizer, None, tmp_path/"base")
    tuned = tiny(tokenizer, lora=True)
    for layer in lora_layers(tuned).values(): torch.nn.init.normal_(layer.B)
    t = template(name, tokenizer)
    save_model(tuned, tokenizer, t, tmp_path/"adapter", base=tmp_path/"base", system="Be brief.")
    check_served(tmp_path/"adapter", t, tokenizer)
    merge(tmp_path/"base", tmp_path/"adapter", tmp_path/"merged")
    theirs, _ = check_served(tmp_path/"merged", t, tokenizer)
    assert theirs.chat_template == t.jinja


# --- chat -----------------------------------------------------------------------------------------

class Scripted(torch.nn.Module):
    "Says what it is told to, id by id, and remembers the prompts that it read."
    device = "cpu"

    def __init__(self, size, script):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=4096)
        self.size, self.script, self.prompts = size, script, []

    def forward(self, input_ids, **kwargs):
        if input_ids.shape[1] > 1: self.prompts.append(input_ids[0].tolist())
        return SimpleNamespace(logits=torch.eye(self.size)[self.script.pop(0)][None, None])


THINKING = CHATML.replace("{{ m.content }}", (
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"))


def check_chat(t, tokenizer, replies, tools=None):
    "Each prompt is that of the training, with earlier replies as they were said."
    system = "Be brief."
    try: t.render([dict(role=S, content=system), dict(role=U, content="Hi")])
    except FtkitError: system = None
    messages = [dict(role=S, content=system)] if system else []
    asked, expected, script = ["What colour?", "At night?", "Why?"], [], []
    for q, reply in zip(asked, replies):
        messages.append(dict(role=U, content=q))
        try: expected.append(encode_prompt(Conversation(messages, tools=tools), t, tokenizer))
        except FtkitError: break                 # one question only
        messages.append(dict(role=A, content=reply))
        last = [dict(m, loss=False) if m["role"] == A and m is not messages[-1] else m
                for m in messages]
        whole = encode(Conversation(last, tools=tools), t, tokenizer)
        script.append([l for l in whole.labels if l != -100])
    model = Scripted(len(tokenizer), sum(script, []))
    talk = Chat(model, tokenizer, t, system, temperature=0, tools=tools)
    said = [talk.ask(q) for q in asked[:len(expected)]]
    assert [x.strip() for x in said] == list(replies[:len(said)]) and not model.script
    assert model.prompts == expected
    assert talk.ids == whole.ids[:len(talk.ids)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_of_every_family(name):
    tokenizer = family_toy(name, adds_bos=True)
    t = template(name, tokenizer)
    check_chat(t, tokenizer, ["Blue.", "Black or so.", "No sun."])


def test_a_chat_by_the_tokenizers_own():
    special = ["<|im_start|>", "<|im_end|>"]
    for source, tools in (CHATML, None), (THINKING, None), (LISTED + CALLING, LOOK):
        tokenizer = toy(special, chat_template=source)
        check_chat(JinjaTemplate(tokenizer), tokenizer, ["Blue.", "Black or so.", "No sun."], tools)
    tokenizer = toy(special, chat_template=THINKING)
    check_chat(JinjaTemplate(tokenizer), tokenizer,
               ["<think>Day.</think>Blue.", "<think>Dark.</think>Black.", "No sun."])


# --- LMDeploy -------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder,template_name,told", [
    ("llama2-tuned", "llama2_chat", True), ("My-Llama-2-7b", "vicuna", True),
    ("codellama_x", "default", True),
    ("chatglm2-6b-law", "chatglm2", True), ("Mistral-7B-Instruct-x", "mistral", True),
    ("mixtral-instruct", "mixtral", True), ("vicuna-law", "llama2_chat", True),
    ("wizardlm-1", "default", True), ("vicuna-law", "vicuna", False),
    ("wizardlm-1", "wizardlm", False), ("llama3-tuned", "default", False),
    ("mistral-law", "mistral", False), ("qwen", "qwen_chat", False)])
def test_folders_whose_name_changes_the_prompt(folder, template_name, told, tmp_path, capsys):
    tokenizer = family_toy(template_name)
    t = template(template_name, tokenizer)
    save_model(tiny(tokenizer), tokenizer, t, tmp_path/folder)
    said = "".join(capsys.readouterr())
    assert ("LMDeploy" in said) == told and (not told or folder in said)
    save_model(tiny(tokenizer, lora=True), tokenizer, t, tmp_path/"x"/folder)
    assert "LMDeploy" not in "".join(capsys.readouterr())      # it serves no adapters
