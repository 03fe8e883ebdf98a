"Every name of XTuner's: it becomes the recipe that it says, or is refused for one of a few reasons."
import functools, json, os, re, shutil, subprocess, sys, time
from collections import Counter
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import fastcore.docments
import pytest

import ftkit
from ftkit.cli import main
from ftkit.data.families import template_names
from ftkit.data.formats import layouts, to_messages
from ftkit.recipes import _checked, render
from ftkit.training.optim import warmup_length
from ftkit.zoo.datasets import DATASETS, HOW_TO_GET
from ftkit.zoo.models import BASE_MODELS
from ftkit.zoo.names import METHODS, MODELS, REFUSED, TUNED, _fits, _respelled, list_recipes, read_name

HERE = Path(__file__).parent
INVENTORY = HERE.parents[1]/"shared/xtuner.md"


def committed():
    "The names in tests/xtuner_names.txt."
    text, odd = re.sub("#.*\n", "", (HERE/"xtuner_names.txt").read_text()).split("odd:")
    found = odd.split()
    for line in re.split(r"\n(?! )", text.strip()):
        ends, starts = line.split(":")
        found += [f"{a}_{b}" for a, b in product(starts.split(), ends.split())]
    return sorted(found)


def inventory():
    "The names in the inventory of XTuner: lines of `- folder: [common start] ends`."
    part = INVENTORY.read_text(encoding="utf-8").split("## Appendix B.")[1].split("\n## ")[0]
    found = set()
    for line in re.findall(r"(?m)^- [^:\n]+: (.*)$", part):
        start, ends = re.fullmatch(r"(?:\[(.*?)\] )?(.*)", line).groups()
        found |= {(start or "") + end for end in ends.split()}
    return sorted(found)


NAMES = committed()
REASONS = {"preference": r"_(d|or)po(_|$)", "reward": r"_reward_|^POLAR", "vision": "^(llava|internvl)_",
           "token ids": "_w_(tokenized|internevo)_|intern_repo|pgbooks", "script": "^convert_"}
TRAINABLE = [n for n in NAMES if not any(re.search(p, n) for p in REASONS.values())]

# What is in a set, by its name in XTuner: paths on the hub (or parts of file names) and map functions
SETS = {
    "alpaca": ("tatsu-lab/alpaca", "alpaca"),
    "alpaca_zh": ("silk-road/alpaca-data-gpt4-chinese", "alpaca_zh"),
    "oasst1": ("timdettmers/openassistant-guanaco", "oasst1"),
    "open_platypus": ("garage-bAInd/Open-Platypus", "alpaca"),
    "openorca": ("Open-Orca/OpenOrca", "openorca"),
    "code_alpaca": ("HuggingFaceH4/CodeAlpaca_20K", "code_alpaca"),
    "tiny_codes": ("nampdn-ai/tiny-codes", "tiny_codes"),
    "sql": ("b-mc2/sql-create-context", "sql"),
    "medical": ("shibing624/medical:finetune", "medical"),
    "colorist": ("burkelibbey/colors", "colors"),
    "wizardlm": ("WizardLM/WizardLM_evol_instruct_V2_196k", "wizardlm"),
    "skypile_pretrain": ("Skywork/SkyPile-150B", "pretrain"),
    "arxiv_gentitle": ("arxiv_data.json", "arxiv"),
    "crime": ("CrimeKgAssitant", "crime_kg_assitan"), "law": ("92k.json", "law_reference"),
    "moss_no_plugins": ("moss-003-sft-no-tools", "moss"),
    "moss_sft_plugins": ("conversations_with_tools", "moss"),
    "msagent_react": ("MSAgent-Bench", "msagent_react"),
    "stack_exchange": ("stack_exchange", "stack_exchange"),
    "custom_sft": ("", "openai"), "custom_pretrain": ("", "pretrain"), "json": ("", "conversation"),
    "finetune_custom_sft": ("", "openai"), "finetune_custom_dataset": ("", "conversation")}
PARTS = {"alpaca_enzh": ["alpaca", "alpaca_zh"], "alpaca_enzh_oasst1": ["alpaca", "alpaca_zh", "oasst1"],
         "lawyer": ["crime", "law"], "moss_sft_all": ["moss_no_plugins", "moss_sft_plugins"],
         "oasst1_512": ["oasst1"], "oasst1_mmlu": ["oasst1"]}
IRREGULAR = {"cohere_100b_128k_sp32": ("cohere_100b", "full", "alpaca_enzh", 3),
             "internlm2_5_chat_20b_alpaca_e3": ("internlm2_5_chat_20b", "full", "alpaca", 3),
             "starcoder_qlora_stack_exchange_example": ("starcoder", "qlora", "stack_exchange", 1),
             **{f"{m}_w_untokenized_dataset": (m, "full", "finetune_custom_dataset", 1)
                for m in ("internlm2_7b", "mistral_7b")}}


def taken_apart(name):
    "Model, method, data set and epochs of a name, by cutting it."
    if name in IRREGULAR: return IRREGULAR[name]
    model, method, rest = re.fullmatch("(.*?)_(full|qlora|int8_lora|lora)_(.*)", name).groups()
    dataset, epochs = re.fullmatch(r"(.*?)(?:_e(\d+).*|_\d+[kM]_sp\d+)", rest).groups()
    return model, method, dataset, int(epochs or 3)


def letters(text): return sorted(re.sub("[^a-z0-9]", "", text.lower()))


def as_tuple(value): return value if isinstance(value, tuple) else (value,)


def for_each_name(check):
    "One test for all names: five hundred would take a minute longer."
    def test():
        for name in TRAINABLE:
            try: check(name)
            except AssertionError as e: raise AssertionError(f"{name}: {e}") from e
    test.__name__ = check.__name__
    return test


def test_the_committed_names_are_those_of_the_inventory():
    assert len(NAMES) == len(set(NAMES)) == 589
    if not INVENTORY.exists(): pytest.skip("the inventory is not here")
    assert NAMES == inventory()


@for_each_name
def test_a_name_becomes_what_it_says(name):
    r, (model, method, dataset, epochs) = ftkit.recipe(name), taken_apart(name)
    assert r.name == name and r.train.epochs == epochs
    assert r.model.bits == {"qlora": 4, "int8_lora": 8}.get(method)
    assert (r.lora is None) == (method == "full")
    path = re.sub("^Meta-|-hf$|-v0.1$|-bf16$|c4ai-command-r-plus", "", r.model.path.split("/")[1])
    expected = {"cohere_100b": "", "minicpm3_4b_chat": "minicpm3_4b"}.get(model, model)
    assert letters(path.replace("-sft", "")) == letters(expected), r.model.path
    if model.startswith("chatglm2") and dataset == "openorca": return
    parts = [SETS[p] for p in PARTS.get(dataset, [dataset])]
    kinds = as_tuple(r.data.layout)
    assert kinds*(len(parts) if len(kinds) == 1 else 1) == tuple(layout for _, layout in parts)
    for found, (expected, _) in zip(as_tuple(r.data.path), parts, strict=True):
        assert expected in found and bool(expected) == bool(found)
        assert (found.startswith("hub:")) == ("/" in expected)


LENGTHS = {"512": 512, "2k": 2048, "8k": 8192, "16k": 16384, "32k": 32768, "128k": 131072,
           "256k": 262144, "1M": 1048576}


@for_each_name
def test_a_name_has_the_numbers_of_xtuner(name):
    r, (model, method, dataset, _) = ftkit.recipe(name), taken_apart(name)
    said = next((LENGTHS[x] for x in name.split("_") if x in LENGTHS and x not in model), None)
    long = {"phi3_mini_4k_instruct": 4096, "phi3_mini_128k_instruct": 131072,
            "qwen1_5_moe_a2_7_b_chat": 32768}.get(model, 32768 if "finetune" in dataset else 2048)
    assert r.data.max_length == (said or long)
    own = dataset == "finetune_custom_dataset"
    big = re.match("llama2_70b.*lora|llama3_70b|deepseek_v2|qwen1_5_110b|starcoder_qlora", name)
    assert r.optim.lr == (4e-5 if own else 2e-5 if method == "full" else 2e-4) or big
    assert r.optim.betas == ((0.9, 0.95) if own else (0.9, 0.999))
    assert r.optim.weight_decay == (0.01 if own else 0.05 if model == "starcoder" and r.lora else 0)
    none = re.match("cohere|deepseek_v2", name)
    assert warmup_length(r.optim, 1000) == (25 if own else 0 if none else 30)
    assert r.optim.max_grad_norm == 1 and r.optim.schedule == "cosine"
    if r.lora and not re.match("llama2_70b_int8|deepseek_moe|starcoder", name):
        assert (r.lora.r, r.lora.alpha, r.lora.dropout) == (64, 16, 0.1)
        assert r.lora.targets == "all-linear" or model == "llama2_70b"
    unpacked = dataset in ("oasst1_512", "moss_sft_all", "moss_sft_plugins", "msagent_react")
    assert r.data.packing != unpacked
    parts = re.search(r"_sp(\d+)|_parallel_(\d+)", name)
    assert r.sequence_parallel == (int(parts[1] or parts[2]) if parts else 1)
    assert r.objective == ("pretrain" if dataset.endswith("pretrain") else "sft")


FAMILIES = { # XTuner's template for each family, by the model's name; the first that fits
    "internlm2.*chat": "internlm2_chat", "internlm_chat": "internlm_chat", "llama2|yi_34b_200k": "llama2_chat",
    "llama3": "llama3_chat", "chatglm2": "chatglm2", "chatglm3": "chatglm3", "qwen.*chat": "qwen_chat",
    "baichuan2.*chat": "baichuan2_chat", "baichuan.*chat": "baichuan_chat", "deepseek_?coder": "deepseek_coder",
    "deepseek_moe": "deepseek_moe", "deepseek_v2": "deepseek_v2", "mistral": "mistral", "mixtral": "mixtral",
    "minicpm3": "minicpm3", "minicpm": "minicpm", "gemma.*_it": "gemma", "cohere": "cohere_chat",
    "phi3": "phi3_chat", "zephyr": "zephyr", "": "default"}


@for_each_name
def test_a_name_has_the_template_of_xtuner(name):
    r, (model, method, dataset, _) = ftkit.recipe(name), taken_apart(name)
    own = next(form for start, form in FAMILIES.items() if re.match(start, model))
    if model == "internlm_7b" and method == "full": own = "internlm_chat"
    if model in ("internlm2_7b", "internlm2_20b") and "finetune" in dataset: own = "internlm2_chat"
    if dataset.startswith("moss"): own = "moss_sft"
    if dataset.endswith("pretrain"): own = "text"
    assert r.data.template == own


def test_the_rest_are_refused_for_a_reason(capsys):
    counts = Counter()
    for name in set(NAMES) - set(TRAINABLE):
        with pytest.raises(ftkit.FtkitError) as e: ftkit.recipe(name)
        assert "which this release does not have" in str(e.value)
        assert sum(reason in str(e.value) for reason in REFUSED.values()) == 1
        counts[next(k for k, p in REASONS.items() if re.search(p, name))] += 1
    with capsys.disabled():
        print(f"\n{len(TRAINABLE)} of {len(NAMES)} names of XTuner's are recipes; refused: {dict(counts)}")
    assert len(TRAINABLE) == 505 and sum(counts.values()) == 84


def test_both_spellings_mean_the_same():
    for old, new in {
        "deepseekcoder_6_7b_instruct_qlora_code_alpaca_e3": "deepseek_coder_6_7b_instruct_qlora_code_alpaca_e3",
        "llama2_70b_qlora_open_platypus_e1_hf": "llama2_70b_qlora_open_platypus_e1",
        "minicpm3_4b_chat_qlora_custom_sft_e1": "minicpm3_4b_qlora_custom_sft_e1",
        "internlm2_7b_full_finetune_custom_dataset_e1_sequence_parallel_4":
            "internlm2_7b_full_finetune_custom_dataset_e1_sp4",
        "qwen1_5_4b_qlora_alpaca_e3_openmind": "qwen1_5_4b_qlora_alpaca_e3"}.items():
        a, b = ftkit.recipe(old), ftkit.recipe(new)
        assert a.set(name="") == b.set(name="")


@pytest.mark.parametrize("wrong", [
    "nano_lora_colors_e4_gpu0", "nano_lora_colors_e4_sp0", "nano_lora_colors_e4_0k", "nano_lora_colors_e04",
    "nano_lora_colors_e4_8k_16k", "nano_lora_colors_gpu8", "nano_lora_colors_e4_", "nano_lora_colors_e4_hf_hf",
    "llama2_7b_full_nano_text_e1", "nano_scratch_qlora_colors_e4", "gemma_2b_it_lora_msagent_react_e3",
    "llama2_7b_qlora_finetune_custom_sft_e1", "nano_lora_colors_e١", "polar_1_8b_full_alpaca_e3"])
def test_what_is_no_sentence(wrong):
    assert read_name(wrong) is None
    with pytest.raises(ftkit.FtkitError, match="unknown recipe"): ftkit.recipe(wrong)


# ------------------------------------------------------------ the tables

def test_the_tables_hold_all_of_xtuners_models():
    used = {ftkit.recipe(n).model.path for n in TRAINABLE}
    kinds = Counter(m.kind for m in BASE_MODELS.values())
    assert len(used) == 73 and kinds["vision"] == 8 and kinds["reward"] == 2
    preference = {f"internlm/internlm2-chat-{size}-sft" for size in ("1_8b", "7b")}
    llava = {f"lmsys/vicuna-{size}-v1.5" for size in ("7b", "13b")}
    known = {m.path for m in BASE_MODELS.values()}
    assert used | preference | llava <= known
    # 87 addresses; XTuner's 88th is Llama-2-7b once more, in Meta's own format
    newer = {p for p in known if re.search("Qwen2.5|Llama-3.[12]", p)}
    assert len(known - newer) == 87


def test_the_tables_name_what_exists():
    forms, kinds = {*template_names(), "-"}, {*layouts(), "auto"}
    for m in BASE_MODELS.values(): assert m.template in forms, m
    for name, row in DATASETS.items():
        assert {*as_tuple(row.get("data.layout", "auto"))} <= kinds, name
        assert {*row.get("models", ())} <= {*MODELS} and {*row.get("methods", ())} <= {*METHODS}
    everything = [*NAMES, *list_recipes()]
    spelled = [_respelled(n) for n in everything]
    for pattern in TUNED: assert any(fnmatchcase(n, pattern) for n in spelled), pattern


ROWS = { # A row of each layout, with the columns that the data set has on the hub, and what is read from it
    "alpaca": (dict(instruction="Add.", input="1 2", output="3"), "Add.\n1 2", "3"),
    "alpaca_zh": (dict(instruction_zh="加", input_zh="", output_zh="3"), "加", "3"),
    "arxiv": (dict(abstract="We add.", title="Adding"), "We add.", "Adding"),
    "code_alpaca": (dict(prompt="Add", completion="a+b"), "Add", "a+b"),
    "tiny_codes": (dict(prompt="Add", response="a+b", idx=1), "Add", "a+b"),
    "colors": (dict(description="Sea: blue", color="#0000ff"), "blue", "#0000ff"),
    "crime_kg_assitan": (dict(input="q", output="a"), "q", "a"),
    "law_reference": (dict(question="q", answer="a", reference=["x"]), "q", "a"),
    "medical": (dict(instruction="q", input="", output="a"), "q", "a"),
    "sql": (dict(context="CREATE", question="q", answer="SELECT"), "CREATE\nq", "SELECT"),
    "openorca": (dict(id="1", system_prompt="s", question="q", response="a"), "q", "a"),
    "stack_exchange": (dict(question="q", response="a", system_prompt="s"), "q", "a"),
    "oasst1": (dict(text="### Human: q### Assistant: a"), "q", "a"),
    "wizardlm": (dict(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]), "q", "a"),
    "openai": (dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")]), "q", "a"),
    "messages": (dict(messages=[dict(role="user", content="q"), dict(role="assistant", content="a")]), "q", "a"),
    "conversation": (dict(conversation=[dict(input="q", output="a")]), "q", "a"),
    "pretrain": (dict(text=" a "), "a", "a"), "text": (dict(text="a"), "a", "a"),
    "moss": (dict(num_turns=1, meta_instruction="", chat={"turn_1": {
        "Human": "<|Human|>: q<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>: None<eor>\n",
        "MOSS": "<|MOSS|>: a<eom>\n"}}), "q", "a"),
    "msagent_react": (dict(conversations=[
        {"from": "system", "value": "[]"}, {"from": "user", "value": "q"},
        {"from": "assistant", "value": "a"}]), "q", "Final Answer:a")}


@pytest.mark.parametrize("layout", sorted({x for row in DATASETS.values()
                                           for x in as_tuple(row.get("data.layout", "auto"))} - {"auto"}))
def test_a_row_of_each_set_is_read(layout):
    row, question, answer = ROWS[layout]
    found = to_messages([row], layout)[0]
    assert found[-1].content.strip() == answer
    assert question in (m.content.strip() for m in found)


def test_a_public_set_trains_with_its_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [dict(instruction=f"Say {i}.", input="", output=["", str(i)][i % 3 > 0]) for i in range(9)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    r = ftkit.recipe("nano_lora_alpaca_e3").set(max_steps=2, eval_every=1, answer_tokens=2, **{"data.path": "a.jsonl"})
    run = ftkit.train(r, "run")
    assert run.work_dir.name == "run" and len([x for x in run.history if x["event"] == "train"]) == 2
    assert ftkit.load_recipe("run/recipe.py") == r


# ------------------------------------------------------------ files and lists

SAMPLE = sorted({*(f"{m}_{me}_{d}_e{DATASETS[d]['epochs']}" for me, d in product(METHODS, DATASETS)
                   for m in (["nano", "gemma_2b_it", "qwen1_5_7b_chat"]) if _fits(m, me, d)),
                 *list_recipes()[::131], *TRAINABLE[::12]})


def test_recipes_survive_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(fastcore.docments, "docments", functools.cache(fastcore.docments.docments)) # slow
    for name in SAMPLE:
        r = ftkit.recipe(name)
        (tmp_path/"r.py").write_text(render(r), encoding="utf-8")
        assert ftkit.load_recipe(tmp_path/"r.py") == r, name


def test_a_file_says_how_to_get_the_data_and_for_how_many_gpus():
    text = render(ftkit.recipe("qwen_7b_qlora_moss_sft_all_e2_gpu8"))
    assert "For 8 GPUs, of which each takes 8 rows a step." in text and "fnlp/moss-003-sft-data" in text
    assert "GPUs, of which" not in render(ftkit.recipe("qwen_7b_qlora_moss_sft_all_e2"))


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, match in [("llama_7b_qlora_lawyer_e3", "LAW-GPT"), ("yi_34b_200k_full_alpaca_enzh_32k_sp2", "2 GPUs"),
                        ("nano_lora_custom_sft_e1", "data.path")]:
        with pytest.raises(ftkit.FtkitError, match=match): _checked(ftkit.recipe(name))
    Path("data").mkdir()
    for path in DATASETS["lawyer"]["data.path"]: Path(path).write_text("[]")
    _checked(ftkit.recipe("llama_7b_qlora_lawyer_e3"))
    _checked(ftkit.recipe("yi_34b_200k_full_alpaca_enzh_32k_sp2").set(sequence_parallel=1))


def test_all_names_are_listed_once_and_read_back():
    names = list_recipes()
    assert len(set(names)) == len(names) > 9000
    for name in names[::37]: assert read_name(name).name == name
    usual = [n for n in TRAINABLE if re.fullmatch(".*_e[0-9]", n) and n == read_name(n).name]
    other = [n for n in usual if n not in set(names)] # 3 epochs are usual for this set
    assert len(usual) > 450 and other == [f"llama2_70b_{m}_open_platypus_e1" for m in ("int8_lora", "qlora")]


def test_lists_and_suggestions_are_quick(capsys):
    start = time.perf_counter()
    assert main(["list-cfg", "-p", "colors"]) == 0
    assert time.perf_counter() - start < 1 and capsys.readouterr().out.count("\n") > 200
    start = time.perf_counter()
    with pytest.raises(ftkit.FtkitError, match="'internlm2_chat_7b_qlora_oasst1_512_e4'"):
        ftkit.recipe("internlm2_chat_7b_qlora_oast1_512_e4")
    assert time.perf_counter() - start < 2
    assert main(["list-cfg", "-p", "LLAMA3_8B_INSTRUCT_QLORA"]) == 0
    assert "llama3_8b_instruct_qlora_alpaca_e3\n" in capsys.readouterr().out


def test_on_a_screen_the_words_of_names_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((80, 24)))
    assert main(["list-cfg"]) == 0
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80 and len(out.splitlines()) < 60
    assert {*MODELS, *METHODS, *DATASETS} < set(out.split()) and "recipes" in err
    assert main(["list-cfg", "-p", "nano_full_colors"]) == 0
    out, err = capsys.readouterr()
    assert out == "nano_full_colors_e4\n" and err == "1 recipes\n"


def test_the_zoo_loads_nothing_heavy():
    code = "import sys, ftkit; ftkit.list_recipes(); print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done
