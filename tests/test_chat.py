"Generation that nothing disturbs, and a chat that reads exactly what was trained."
import os, subprocess, sys
from types import SimpleNamespace
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from ftkit.core import FtkitError
from ftkit.data.encode import IGNORE, encode, encode_prompt
from ftkit.data.families import template
from ftkit.generate import Chat, TextStream, chat, generate, load_chat
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.models.load import load_model, load_tokenizer, save_model

tokenizer = load_tokenizer("nano")
TEMPLATES = ["default", "qwen_chat", "internlm2_chat", "tokenizer"]


def spelt(text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


class Scripted(torch.nn.Module):
    "Says what it is told to, id by id, and remembers the prompts that it read."
    device = "cpu"

    def __init__(self, *scripts, longest=4096):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=longest)
        self.script,self.prompts = [i for s in scripts for i in s],[]

    def forward(self, input_ids, **kwargs):
        if input_ids.shape[1] > 1: self.prompts.append(input_ids[0].tolist())
        i = self.script.pop(0)
        if isinstance(i, BaseException): raise i
        return SimpleNamespace(logits=torch.eye(len(tokenizer))[i][None, None])


def parrot(t, *texts, **how):
    end = t.stop_ids(tokenizer)[:1]
    return Scripted(*[spelt(text) + end for text in texts], **how)


# ------------------------------------------------------------ chat reads what was trained

TALK = ["dark teal", "#014d4e", "lighter, please\n", "Here: #0b8b87", "  {x} %s 猫 ", "naïve 🙂",
        "", "bye"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "Name a colour.\nOnly its code."])
def test_prompts_are_the_ids_that_training_learns_from(name, system):
    t = template(name, tokenizer)
    asked,said = TALK[::2],TALK[1::2]
    model = parrot(t, *said)
    talk = Chat(model, tokenizer, t, system, temperature=0)
    assert [talk.ask(text) for text in asked] == said
    messages = [dict(role="system", content=system)] if system else []
    for n,(question,answer) in enumerate(zip(asked, said)):
        messages.append(dict(role="user", content=question))
        assert model.prompts[n] == encode_prompt(messages, t, tokenizer)
        messages.append(dict(role="assistant", content=answer))
        trained = encode(messages, t, tokenizer)
        first = max(i for i,l in enumerate(trained.labels[:-1])  # the last reply starts behind it
                    if l == IGNORE and trained.labels[i+1] != IGNORE) + 1
        assert model.prompts[n] == trained.ids[:first]
    whole = encode(messages, t, tokenizer)
    assert talk.ids == whole.ids[:len(talk.ids)] and set(whole.labels[len(talk.ids):]) <= {IGNORE}


def test_history_keeps_the_ids_that_the_model_wrote():
    t = template("tokenizer", tokenizer)
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "teal"]
    assert letters != spelt("teal")
    model = Scripted(letters + t.stop_ids(tokenizer)[:1], spelt("x") + t.stop_ids(tokenizer)[:1])
    talk = Chat(model, tokenizer, t, temperature=0)
    assert talk.ask("a") == "teal" and talk.ask("b") == "x"
    n = len(encode_prompt([dict(role="user", content="a")], t, tokenizer))
    assert model.prompts[1][n:n + 4] == letters


def test_stops_by_id_and_not_by_text():
    t = template("tokenizer", tokenizer)
    text = "the token <|im_end|> ends a turn"
    talk = [dict(role="user", content="x"), dict(role="assistant", content=text)]
    reply = [l for l in encode(talk, t, tokenizer).labels if l != IGNORE]
    assert reply[-1] == t.stop_ids(tokenizer)[0] and reply.count(reply[-1]) == 1
    assert Chat(Scripted(reply), tokenizer, t).ask("x") == text
    other = Chat(Scripted(spelt("a") + [tokenizer.eos_token_id]), tokenizer, t)  # also a stop id
    assert other.ask("x") == "a" and other.ids[-1] == t.stop_ids(tokenizer)[0]


def test_a_reply_that_runs_out_of_room_ends_like_any_other():
    t = template("tokenizer", tokenizer)
    talk = Chat(Scripted(spelt("a b c d e f")), tokenizer, t, max_new_tokens=3)
    talk.ask("x")
    assert talk.ids[-4:] == spelt("a b c d e f")[:3] + t.stop_ids(tokenizer)[:1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_oldest_turns_go_and_the_system_message_stays(name):
    t,told = template(name, tokenizer),[]
    model = parrot(t, *["#014d4e"]*12, longest=140)
    talk = Chat(model, tokenizer, t, "Sys", max_new_tokens=10, notify=told.append)
    for n in range(12):
        talk.ask(f"colour {n}")
        assert len(talk.ids) <= 140
        assert talk.ids == encode(talk.messages, t, tokenizer).ids[:len(talk.ids)]
    assert talk.messages[0].content == "Sys" and talk.messages[-2].content == "colour 11"
    assert len(talk.messages) % 2 == 1 and len(told) > 2
    before = talk.ids,list(talk.messages)
    with pytest.raises(FtkitError, match="reads 140 at most"): talk.ask("long "*100)
    assert (talk.ids, talk.messages) == before


def test_ctrl_c_keeps_what_was_said():
    t = template("tokenizer", tokenizer)
    script = spelt("one two")[:2] + [KeyboardInterrupt()]
    talk = Chat(Scripted(script, spelt("three") + t.stop_ids(tokenizer)[:1]), tokenizer, t)
    got = []
    with pytest.raises(KeyboardInterrupt):
        for piece in talk.stream("x"): got.append(piece)
    assert got and talk.messages[-1].content == "".join(got)
    assert talk.ask("y") == "three" and len(talk.messages) == 4
    early = Chat(Scripted([KeyboardInterrupt()]), tokenizer, t)
    with pytest.raises(KeyboardInterrupt): early.ask("x")
    assert early.messages == []


def test_a_template_that_cannot_say_it_leaves_the_chat_usable():
    t = template("tokenizer", tokenizer)
    talk = Chat(parrot(t, "ok"), tokenizer, t)
    with pytest.raises(FtkitError, match="surrogate"): talk.ask("\ud800")
    assert talk.ask("x") == "ok" and len(talk.messages) == 2


# ------------------------------------------------------------ streaming

@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_stream_gives_the_text_and_never_half_a_character(text):
    stream,pieces = TextStream(tokenizer),[]
    for i in spelt(text): pieces.append(stream.add(i))
    assert not any("\ufffd" in p for p in pieces)
    assert "".join(pieces) + stream.end() == tokenizer.decode(spelt(text)) == text


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=8))
def test_bytes_of_any_kind_are_shown_once_and_to_the_end(raw):
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in raw]
    stream = TextStream(tokenizer)
    text = "".join([stream.add(i) for i in ids]) + stream.end()
    assert len(text) == len(tokenizer.decode(ids))
    try: assert text == raw.decode()
    except UnicodeDecodeError: assert "\ufffd" in text


def test_special_tokens_are_not_shown():
    stream = TextStream(tokenizer)
    ids = [*spelt("a"), tokenizer.bos_token_id, *spelt("b")]
    assert "".join([stream.add(i) for i in ids]) + stream.end() == "ab"


# ------------------------------------------------------------ generate

def random_model(kind, **changes):
    torch.manual_seed(0)
    made,config = {"llama": (LlamaForCausalLM, LlamaConfig),
                   "mistral": (MistralForCausalLM, MistralConfig)}[kind]
    return made(config(**{**dict(
        vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96,
        initializer_range=0.4, bos_token_id=0, eos_token_id=1, pad_token_id=None), **changes})).eval()


def some_prompts(n=9, longest=40):
    g = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, longest, (n,), generator=g).tolist()
    return [torch.randint(2, 120, (size,), generator=g).tolist() for size in sizes]


@pytest.mark.parametrize("kind, changes", [
    ("llama", {}), ("llama", dict(attn_implementation="eager")),
    ("llama", dict(tie_word_embeddings=True)),
    ("mistral", dict(sliding_window=8))])
def test_greedy_is_that_of_transformers_alone_and_in_any_batch(kind, changes):
    model,prompts = random_model(kind, **changes),some_prompts()
    wanted = []
    for p in prompts:
        out = model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
        new = out[len(p):].tolist()
        wanted.append(new[:new.index(1)] if 1 in new else new)
    for size in 1, 4, 64:
        assert generate(model, tokenizer, prompts, 12, stop_ids=[1], batch_size=size) == wanted
    end = wanted[0][1]
    cut = generate(model, tokenizer, prompts, 12, stop_ids=[1, end])
    assert cut == [w[:w.index(end)] if end in w else w for w in wanted] != wanted


def test_sampling_depends_on_the_seed_and_the_row_alone():
    model,prompts = random_model("llama"),some_prompts()
    how = dict(max_new_tokens=8, stop_ids=[], temperature=1., top_p=0.9)
    one = generate(model, tokenizer, prompts, **how)
    torch.manual_seed(5)
    assert generate(model, tokenizer, prompts, batch_size=2, **how) == one
    assert generate(model, tokenizer, prompts, seed=1, **how) != one
    same = generate(model, tokenizer, [[7, 8]]*4, **how)
    assert len(set(map(tuple, same))) > 1  # rows with one prompt still differ


def test_samples_follow_the_probabilities():
    model = random_model("llama", initializer_range=0.05)
    with torch.no_grad(): p = model(torch.tensor([[5, 6]])).logits[0,-1].softmax(-1)
    drawn = generate(model, tokenizer, [[5, 6]]*4000, 1, stop_ids=[], temperature=1., batch_size=500)
    share = torch.bincount(torch.tensor(drawn)[:,0], minlength=120)/4000
    assert (share - p).abs().max() < 5*(p.max()/4000).sqrt()


def test_generating_disturbs_nothing():
    model = add_lora(random_model("llama"), LoraConfig(r=2, dropout=0.5))
    model.train(); model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    model.config.use_cache = False
    state = torch.get_rng_state()
    first = generate(model, tokenizer, some_prompts(), 5, stop_ids=[], temperature=1.)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert first == generate(model, tokenizer, some_prompts(), 5, stop_ids=[], temperature=1.)
    assert torch.is_grad_enabled() and not any(p.grad is not None for p in model.parameters())


def test_answers_end_where_the_context_does():
    model = random_model("llama")
    assert [len(a) for a in generate(model, tokenizer, [[5]*90, [5]*3], 20, stop_ids=[])] == [6, 20]


# ------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")/"adapter"
    model = add_lora(load_model("nano", device="cpu"), LoraConfig(r=2))
    return save_model(model, tokenizer, template("default", tokenizer), folder, system="Be a bird.")


def test_template_and_system_of_the_training_unless_said_otherwise(tuned):
    talk = load_chat(tuned, device="cpu")
    assert (talk.template.name, talk.system) == ("default", "Be a bird.")
    talk = load_chat("nano", adapter=tuned, system="", template="qwen_chat", device="cpu")
    assert (talk.template.name, talk.system, talk.messages) == ("qwen_chat", "", [])
    with pytest.raises(FtkitError, match="'qwen_chat'"): load_chat(tuned, template="qwen_shat")


def test_one_prompt(tuned, capsys):
    assert chat(tuned, prompt="dark teal", max_new_tokens=5, device="cpu") is None
    said = capsys.readouterr().out
    chat(tuned, prompt="dark teal", max_new_tokens=5, device="cpu")
    assert capsys.readouterr().out == said and said.endswith("\n")


def test_a_pipe(tuned):
    code = f"from ftkit.generate import chat; chat({str(tuned)!r}, max_new_tokens=4, device='cpu')"
    typed = "dark teal\n\n/help\nlight \\\nblue\n/reset\n"
    done = subprocess.run([sys.executable, "-c", code], input=typed, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "/reset   start anew" in done.stdout and ">>>" not in done.stdout
