"Original checkpoints: exact against recorded outputs, there and back bit for bit, look-alikes and damage refused."
import base64, json, math, os, re, shutil, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from ftkit.convert import merge
from ftkit.core import FtkitError
from ftkit.generate import generate
from ftkit.lora.inject import LoraConfig, add_lora, find_targets, lora_layers, unload_lora
from ftkit.models.checkpoint import Checkpoint, stored_dtype, weight_headers
from ftkit.models.families import ORIGINALS, check_config, native_config
from ftkit.models.load import load_model, load_tokenizer, meta_model, save_model
from ftkit.models.stream import save_original
from ftkit.quant.linear import QExperts, QLinear, quantize_model
from ftkit.sft import packed_mask

GOLDEN = Path(__file__).parents[2]/"shared/golden"
ALL = """baichuan1_7b baichuan2_13b baichuan2_13b_pow2 baichuan2_7b chatglm2 chatglm3 deepseek_v2
deepseek_v2_lite gemma internlm2 internlm2_bias llama2 llama3 minicpm minicpm_untied mixtral phi3 qwen
qwen2 qwen_oldcfg""".split()
FOREIGN = [n for n in ALL if n.startswith(("baichuan", "chatglm", "internlm2", "minicpm"))]
FOREIGN += ["qwen", "qwen_oldcfg"]
UNIT_HEAD = ("baichuan2_7b", "baichuan2_13b", "baichuan2_13b_pow2")


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    monkeypatch.setattr("sys.stdin", None)


@pytest.fixture
def golden(request):
    folder = GOLDEN/request.param
    if not folder.exists(): pytest.skip("the recorded outputs are not here")
    return folder


def load(folder, **how): return load_model(folder, **{"dtype": "fp32", "device": "cpu", **how})


def logits(model, ids):
    with torch.no_grad(): return model(ids).logits


def tensors(folder):
    files = Checkpoint(folder)
    return {n: files.read(n) for n in files}


# ------------------------------------------------------------ recorded outputs

@pytest.mark.parametrize("golden", ALL, indirect=True)
def test_outputs_of_the_original(golden):
    model,z = load(golden),np.load(golden/"golden.npz")
    for end in "", "_long":
        ids = torch.from_numpy(z["input_ids" + end])
        with torch.no_grad(): out = model(input_ids=ids, labels=ids)
        assert_close(out.logits, torch.from_numpy(z["logits" + end]), atol=1e-4, rtol=0)
        assert abs(out.loss.item() - z["loss" + end].item()) < 1e-4
    prompt,wanted = torch.from_numpy(z["greedy_prompt"]),z["greedy_ids"]
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16,
                           min_new_tokens=16, do_sample=False)
    assert (found.numpy() == wanted).all()
    ours = generate(model, None, prompt.tolist(), 16, stop_ids=[])
    assert ours[0] == wanted[0, prompt.shape[1]:].tolist()


@pytest.mark.parametrize("golden", ["internlm2", "internlm2_bias", "qwen"], indirect=True)
def test_beyond_the_trained_length(golden):
    model,z = load(golden),np.load(golden/"golden_extra.npz")
    ids = torch.from_numpy(z["input_ids_ext"])
    for key in (k for k in z.files if k.startswith("logits")):
        found = logits(model.train("train" in key), ids)[:,-32:]
        assert_close(found, torch.from_numpy(z[key]), atol=1e-4, rtol=0)


def test_the_loader_for_check_py():
    folder = GOLDEN/"llama2"
    if not folder.exists(): pytest.skip("the recorded outputs are not here")
    run = subprocess.run([sys.executable, GOLDEN/"check.py", folder, GOLDEN/"chatglm3", "--greedy",
                          "--loader", "ftkit:load_model"], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                         env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}) # its inputs are on the CPU
    assert run.returncode == 0 and run.stdout.count("greedy_ok=True") == 2, run.stdout + run.stderr


# ------------------------------------------------------------ there and back

@pytest.mark.parametrize("golden", FOREIGN, indirect=True)
def test_original_layout_comes_back_bit_for_bit(golden, tmp_path):
    model = load(golden)
    save_original(model, tmp_path, "200KB")
    before,after = tensors(golden),tensors(tmp_path)
    if golden.name in UNIT_HEAD:
        head = after.pop("lm_head.weight")
        assert_close(head, torch.nn.functional.normalize(before.pop("lm_head.weight")), atol=0, rtol=0)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert json.loads((tmp_path/"config.json").read_text()) == json.loads((golden/"config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    ids = torch.arange(5, 40)[None]
    assert_close(logits(load(tmp_path), ids), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("golden", ALL, indirect=True)
def test_native_save_needs_transformers_alone(golden, tmp_path):
    model = load(golden)
    model.save_pretrained(tmp_path)
    ids = torch.arange(5, 40)[None]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(logits(theirs.eval(), ids), logits(model, ids), atol=1e-5, rtol=0)
    again = load(tmp_path)
    assert type(again) is type(model) and again.config._attn_implementation == model.config._attn_implementation
    assert_close(logits(again, ids), logits(model, ids), atol=0, rtol=0)
    if golden.name in FOREIGN: # also from there the way back is known
        (tmp_path/"back").mkdir()
        save_original(again, tmp_path/"back")
        back,before = tensors(tmp_path/"back"),tensors(golden)
        assert all(torch.equal(back[n], before[n]) for n in back if n != "lm_head.weight")
        assert all(n in back or n.endswith("inv_freq") for n in before)


@pytest.mark.parametrize("golden", ["baichuan2_13b"], indirect=True)
def test_without_ftkit_slopes_are_refused_and_not_forgotten(golden, tmp_path):
    load(golden).save_pretrained(tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode and "ftkit_alibi" in run.stderr


@pytest.mark.parametrize("golden", ["internlm2", "chatglm2", "minicpm", "baichuan2_13b", "qwen"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(golden, tmp_path, dtype):
    load(golden, dtype=dtype).save_pretrained(tmp_path/"half")
    before = tensors(tmp_path/"half")
    (tmp_path/"out").mkdir()
    save_original(load(tmp_path/"half", dtype=dtype), tmp_path/"out")
    again = load(tmp_path/"out", dtype=dtype)
    assert stored_dtype(tmp_path/"out") == dtype == again.dtype
    again.save_pretrained(tmp_path/"again")
    after = tensors(tmp_path/"again")
    assert all(torch.equal(before[n], after[n]) or n == "lm_head.weight" for n in before)


# ------------------------------------------------------------ other shapes

INTERNLM2 = dict(architectures=["InternLM2ForCausalLM"], model_type="internlm2", vocab_size=96, bias=False,
                 hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e6)
GLM = dict(architectures=["ChatGLMModel"], model_type="chatglm", num_layers=2, num_attention_heads=6,
           kv_channels=16, hidden_size=48, ffn_hidden_size=40, padded_vocab_size=96, seq_length=64,
           multi_query_attention=True, multi_query_group_num=3, add_qkv_bias=True, eos_token_id=2,
           tie_word_embeddings=False, layernorm_epsilon=1e-5, pad_token_id=0)
GLM4 = {**GLM, "architectures": ["ChatGLMForConditionalGeneration"], "layernorm_epsilon": 1.5625e-7,
        "_name_or_path": "THUDM/glm-4-9b-chat", "rope_ratio": 500, "eos_token_id": [90, 91, 92], "pad_token_id": 90}
QWEN = dict(architectures=["QWenLMHeadModel"], model_type="qwen", hidden_size=48, intermediate_size=80,
            num_attention_heads=3, num_hidden_layers=2, kv_channels=16, max_position_embeddings=64,
            vocab_size=96, seq_length=16, no_bias=True, rotary_emb_base=10000)
BAICHUAN = dict(architectures=["BaichuanForCausalLM"], model_type="baichuan", vocab_size=96, hidden_size=80,
                intermediate_size=40, num_attention_heads=40, num_hidden_layers=2, rms_norm_eps=1e-6,
                model_max_length=64, tie_word_embeddings=False, pad_token_id=0)
MINICPM = dict(architectures=["MiniCPMForCausalLM"], vocab_size=96, hidden_size=48, intermediate_size=40,
               num_attention_heads=6, num_hidden_layers=3, num_key_value_heads=3, scale_emb=12,
               dim_model_base=24, scale_depth=1.4, rms_norm_eps=1e-5, max_position_embeddings=64)
SHAPES = dict(
    internlm2=INTERNLM2, internlm2_bias={**INTERNLM2, "bias": True}, internlm2_mha={**INTERNLM2, "num_key_value_heads": 6},
    internlm2_mqa={**INTERNLM2, "num_key_value_heads": 1, "rope_scaling": {"type": "linear", "factor": 4.0}},
    internlm2_tied={**INTERNLM2, "tie_word_embeddings": True},
    internlm={**INTERNLM2, "architectures": ["InternLMForCausalLM"], "model_type": "internlm", "num_key_value_heads": 6,
              "bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
    yi={**INTERNLM2, "architectures": ["YiForCausalLM"], "model_type": "Yi"},
    glm=GLM, glm4=GLM4, glm_heads={**GLM, "multi_query_attention": False}, glm_no_bias={**GLM, "add_qkv_bias": False},
    glm_32k={**GLM, "rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"},
    glm3_128k={**GLM, "rope_ratio": 500, "_name_or_path": "THUDM/chatglm3-6b-128k"},
    qwen=QWEN, qwen_long={**QWEN, "use_dynamic_ntk": True, "use_logn_attn": True},
    qwen_old={**{k: v for k,v in QWEN.items() if k[:3] not in ("hid", "int", "num", "max")}, "n_embd": 48, "n_head": 3,
              "n_layer": 2, "n_positions": 64, "ffn_hidden_size": 80, "padded_vocab_size": 96},
    baichuan13_40_heads=BAICHUAN, baichuan13_v1={**BAICHUAN, "vocab_size": 64000, "num_hidden_layers": 1},
    baichuan7={**BAICHUAN, "max_position_embeddings": 64},
    baichuan7_v1={**BAICHUAN, "architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 64},
    minicpm=MINICPM, minicpm_untied={**MINICPM, "tie_word_embeddings": False},
    minicpm_typed={**MINICPM, "model_type": "minicpm", "attention_bias": True})


def make(folder, raw, seed=0, size="5GB"):
    "A random model in the layout of its authors, written from its native twin."
    folder.mkdir(exist_ok=True)
    (folder/"config.json").write_text(json.dumps(raw))
    torch.manual_seed(seed)
    config = native_config(folder)
    config.initializer_range = 0.1
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if
                                             config.model_type != "ftkit_alibi" else config.model_type)
    for p in model.parameters():
        if p.dim() == 1: torch.nn.init.normal_(p, 1., 0.1) # norms and biases are not all alike
    save_original(model.eval(), folder, size)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name, tmp_path):
    raw = SHAPES[name]
    made = make(tmp_path/"a", raw, size="20KB")
    assert len(list((tmp_path/"a").glob("*.safetensors"))) > 1
    model,ids = load(tmp_path/"a"),torch.randint(96, (2, 12))
    if "baichuan" not in name or "v1" in name: # else the head is normalised only now
        assert_close(logits(model, ids), logits(made, ids), atol=1e-5, rtol=1e-5)
    (tmp_path/"b").mkdir()
    save_original(model, tmp_path/"b")
    a,b = tensors(tmp_path/"a"),tensors(tmp_path/"b")
    unit = name in ("baichuan13_40_heads", "baichuan7")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a if not (unit and n == "lm_head.weight"))
    assert json.loads((tmp_path/"b/config.json").read_text()) == json.loads(json.dumps(raw))
    torch.save(a, tmp_path/"b/pytorch_model.bin")
    (tmp_path/"b/model.safetensors").unlink()
    assert_close(logits(load(tmp_path/"b"), ids), logits(model, ids), atol=0, rtol=0)


def test_rows_of_chatglm_without_groups(tmp_path):
    "Head by head query, key and value: the one split that no recorded output covers."
    make(tmp_path/"m", SHAPES["glm_heads"])
    fused = tensors(tmp_path/"m")["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
    attention = load(tmp_path/"m").model.layers[1].self_attn
    for head in range(6):
        for i,part in enumerate("qkv"):
            w = getattr(attention, f"{part}_proj").weight[16*head:16*(head + 1)]
            assert torch.equal(w, fused[48*head + 16*i:][:16])


def test_rotation_of_the_long_chatglms(tmp_path):
    make(tmp_path/"two", SHAPES["glm_32k"]), make(tmp_path/"three", SHAPES["glm3_128k"])
    plain = 1/10000**(torch.arange(0, 8, 2)/8)
    two,three = (load(tmp_path/n).model.rotary_emb.inv_freq for n in ("two", "three"))
    assert_close(two, plain/16)
    assert_close(three, 1/(10000*500)**(torch.arange(0, 8, 2)/8))


@pytest.mark.parametrize("longest", [64, 32])
def test_rotation_of_the_long_minicpm(longest, tmp_path):
    "The original makes its table of angles for the longest text, and uses it for all."
    short,long = torch.linspace(1, 2, 4),torch.linspace(1, 9, 4)
    make(tmp_path/"m", {**MINICPM, "max_position_embeddings": longest, "rope_scaling": {
        "type": "longrope", "original_max_position_embeddings": 32, "short_factor": short.tolist(),
        "long_factor": long.tolist()}})
    positions = torch.arange(12)[None]
    cos,sin = load(tmp_path/"m").model.rotary_emb(torch.zeros(1), positions)
    angles = positions[...,None]/(long if longest > 32 else short)*10000**-(torch.arange(4)/4)
    scale = math.sqrt(1 + math.log(longest/32)/math.log(32))
    for found,f in (cos, torch.cos), (sin, torch.sin):
        assert_close(found, scale*f(torch.cat([angles, angles], -1)), atol=1e-5, rtol=0)


def test_redundant_head_of_a_tied_minicpm(tmp_path):
    model = make(tmp_path/"m", MINICPM)
    assert "lm_head.weight" not in weight_headers(tmp_path/"m")
    state = load_file(tmp_path/"m/model.safetensors")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path/"m/model.safetensors")
    again,ids = load(tmp_path/"m"),torch.arange(9)[None]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_close(logits(again, ids), logits(model, ids), atol=1e-5, rtol=0)
    (tmp_path/"b").mkdir()
    save_original(again, tmp_path/"b")
    assert weight_headers(tmp_path/"b") == weight_headers(tmp_path/"m")


@pytest.mark.parametrize("raw", [MINICPM, None])
def test_a_file_with_the_head_alone(raw, tmp_path):
    if raw: model = make(tmp_path/"m", raw)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "llama", vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True))
        model.save_pretrained(tmp_path/"m")
    state,ids = load_file(tmp_path/"m/model.safetensors"),torch.arange(9)[None]
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path/"m/model.safetensors", {"format": "pt"})
    again = load(tmp_path/"m")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_close(logits(again, ids), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["internlm2", "qwen_long", "baichuan13_40_heads", "minicpm"])
def test_packed_rows_are_apart(name, tmp_path):
    make(tmp_path/"m", SHAPES[name])
    model,ids = load(tmp_path/"m").train(),torch.randint(96, (1, 20))
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    with torch.no_grad():
        packed = model(ids, attention_mask=packed_mask(positions), position_ids=positions, use_cache=False).logits
        by_positions = model(ids, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(part, use_cache=False).logits for part in ids.split([7, 13], 1)], 1)
    assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert_close(by_positions, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "phi3", "gemma2", "qwen2", "llama"])
@pytest.mark.parametrize("window", [4, 64])
def test_packed_rows_know_how_far_a_model_sees(kind, window, tmp_path):
    from ftkit.data.packing import Row, collate
    from ftkit.sft import SupervisedTuning
    more = dict(head_dim=16) if kind == "gemma2" else dict(use_sliding_window=True, max_window_layers=0) if kind == "qwen2" else {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(
        kind, vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, initializer_range=0.2,
        sliding_window=window, **more)).save_pretrained(tmp_path)
    model,samples = load(tmp_path).train(),[torch.randint(3, 96, (n,)).tolist() for n in (9, 14, 7)]
    def loss(*samples):
        ids,positions = [t for s in samples for t in s],[i for s in samples for i in range(len(s))]
        labels = [t for s in samples for t in (-100, *s[1:])]
        row = Row(ids, labels, positions, [0, *torch.tensor([len(s) for s in samples]).cumsum(0).tolist()])
        return SupervisedTuning()(model, collate([row, row], 0, mask=None))[0]
    assert_close(loss(*samples), sum(loss(s) for s in samples), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen_long", "baichuan13_40_heads"])
def test_padding_and_cache_change_nothing(name, tmp_path):
    make(tmp_path/"m", SHAPES[name])
    model = load(tmp_path/"m")
    prompts = [torch.randint(3, 96, (n,)).tolist() for n in (3, 30, 15, 20)]
    together = generate(model, None, prompts, 12, stop_ids=[])
    for prompt,answer in zip(prompts, together):
        assert generate(model, None, [prompt], 12, stop_ids=[]) == [answer]
        if name == "qwen_long": continue # it would stretch anew with each token
        ids = list(prompt)
        for token in answer:
            assert logits(model, torch.tensor([ids]))[0,-1].argmax() == token
            ids.append(token)


NATIVE = dict(
    qwen3=dict(head_dim=16), qwen2={}, mistral={}, llama={}, gemma=dict(head_dim=16), gemma2=dict(head_dim=16),
    phi3=dict(pad_token_id=0), internlm3=dict(qkv_bias=False, bias=False, head_dim=16), cohere={}, olmo2={},
    minicpm3=dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    qwen2_moe=dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    qwen3_moe=dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16),
    mixtral=dict(num_local_experts=3, num_experts_per_tok=2),
    deepseek_v3=dict(num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
                     moe_intermediate_size=24, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8,
                     qk_rope_head_dim=8, v_head_dim=8), gpt2={}, bloom={}, falcon={}, opt={})


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_models_are_what_transformers_loads(kind, dtype, tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    if kind not in CONFIG_MAPPING_NAMES: pytest.skip("not in this transformers")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **NATIVE[kind]})).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    ours = load(tmp_path, dtype=dtype)
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    theirs_state,ours_state = theirs.state_dict(),ours.state_dict()
    assert theirs_state.keys() == ours_state.keys()
    for n,t in theirs_state.items(): assert_close(ours_state[n], t, atol=0, rtol=0)
    for (n,a),(m,b) in zip(theirs.named_buffers(), ours.named_buffers(), strict=True):
        assert n == m
        assert_close(b, a, atol=0, rtol=0)
    ids = torch.arange(3, 20)[None]
    assert_close(logits(ours, ids), logits(theirs, ids), atol=0, rtol=0)


# ------------------------------------------------------------ what is refused

@pytest.mark.parametrize("raw, match", [
    ({**GLM, "position_encoding_2d": True}, "ChatGLM-6B of the first generation"),
    ({"architectures": ["ChatGLMModel"], "model_type": "chatglm", "inner_hidden_size": 16384, "num_layers": 28},
     "first generation"),
    ({**GLM, "rmsnorm": False}, "rmsnorm is False"), ({**GLM, "post_layer_norm": False}, "post_layer_norm"),
    ({**GLM, "apply_residual_connection_post_layernorm": True}, "apply_residual"),
    ({**GLM, "original_rope": False}, "original_rope"), ({**GLM, "add_bias_linear": True}, "add_bias_linear"),
    ({**GLM, "pre_seq_len": 128}, "P-Tuning"), ({**GLM, "quantization_bit": 4}, "quantized to 4 bits"),
    ({**GLM, "rope_ratio": 16}, "_name_or_path"), ({**GLM4, "vision_config": {"layers": 1}}, "images"),
    ({**QWEN, "visual": {"layers": 2}}, "visual input"), ({**QWEN, "no_bias": False}, "no_bias is False"),
    ({**QWEN, "rotary_pct": 0.5}, "rotary_pct is 0.5"), ({**MINICPM, "num_experts": 8}, "MiniCPM-MoE"),
    ({**MINICPM, "rope_scaling": {"type": "odd"}}, "unknown type 'odd'"),
    ({**INTERNLM2, "architectures": ["InternLM2ForRewardModel"]}, "it scores texts"),
    ({**INTERNLM2, "rope_scaling": {"type": "odd"}}, "unknown type 'odd'"),
    ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "it scores texts"),
    ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob"),
    ({"model_type": "deepseek_v2", "moe_layer_freq": 2}, "moe_layer_freq"),
    ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "noaux_tc"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ({"architectures": ["OrionForCausalLM"], "model_type": "orion", "auto_map": {}}, "does not run"),
    ({k: v for k,v in GLM.items() if k != "kv_channels"}, "entry 'kv_channels' is missing"),
])
def test_look_alikes_are_refused_with_the_reason(raw, match, tmp_path):
    (tmp_path/"config.json").write_text(json.dumps(raw))
    save_file({"x": torch.ones(1)}, tmp_path/"model.safetensors")
    with pytest.raises(FtkitError, match=match) as e: load(tmp_path)
    assert "config.json" in str(e.value)


def test_no_code_of_a_folder_runs(tmp_path):
    make(tmp_path/"m", {**INTERNLM2, "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}})
    (tmp_path/"m/evil.py").write_text("raise SystemExit('foreign code ran')")
    assert type(load(tmp_path/"m")).__name__ == type(meta_model(tmp_path/"m")).__name__ == "LlamaForCausalLM"


# ------------------------------------------------------------ damage

QKV = "model.layers.1.attention.wqkv.weight"


def change_bin(folder, change):
    state = torch.load(folder/"pytorch_model.bin", weights_only=True)
    change(state)
    torch.save(state, folder/"pytorch_model.bin")


def change_safe(folder, change):
    state = load_file(folder/"model.safetensors")
    change(state)
    save_file(state, folder/"model.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change, match", [
    (lambda s: s.pop(QKV), f"1 are missing, e.g. {QKV}"),
    (lambda s: s.update(odd=torch.ones(1)), "1 are unknown to this architecture, e.g. odd in (pytorch_)?model"),
    (lambda s: s.update({QKV: torch.ones(2, 3)}), rf"another shape.*e.g. {QKV} in (pytorch_)?model.*\[2, 3\] and not \[80, 48\]"),
    (lambda s: s[QKV].__setitem__((3, 4), torch.nan), rf"model\.\w+: 1 numbers in {QKV} are not finite"),
    (lambda s: s[QKV].fill_(torch.inf), f"3840 numbers in {QKV} are not finite"),
])
def test_damage_names_file_and_tensor(tmp_path, kind, change, match):
    make(tmp_path/"m", INTERNLM2)
    if kind == "bin":
        torch.save(load_file(tmp_path/"m/model.safetensors"), tmp_path/"m/pytorch_model.bin")
        (tmp_path/"m/model.safetensors").unlink()
        change_bin(tmp_path/"m", change)
    else: change_safe(tmp_path/"m", change)
    with pytest.raises(FtkitError, match=match): load(tmp_path/"m")


def test_cut_files(tmp_path):
    make(tmp_path/"m", INTERNLM2, size="20KB")
    shard = sorted((tmp_path/"m").glob("model-00002-*"))[0]
    last = max(Checkpoint(tmp_path/"m").places.items(), key=lambda p: (p[1][0] == shard, p[1][3]))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(FtkitError, match=f"{shard.name}: .*promises.*; {last} is cut off"): load(tmp_path/"m")
    shutil.rmtree(tmp_path/"m")
    make(tmp_path/"m", INTERNLM2)
    torch.save(load_file(tmp_path/"m/model.safetensors"), tmp_path/"m/pytorch_model.bin")
    (tmp_path/"m/model.safetensors").unlink()
    data = (tmp_path/"m/pytorch_model.bin").read_bytes()
    (tmp_path/"m/pytorch_model.bin").write_bytes(data[:len(data)//2])
    with pytest.raises(FtkitError, match="pytorch_model.bin: not a whole file"): load(tmp_path/"m")


# ------------------------------------------------------------ headers and indices that are wrong

def header(change):
    "Rewrite the header of a safetensors file, and leave the bytes behind it."
    def go(folder):
        file = folder/"model.safetensors"
        data = file.read_bytes()
        n = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:8 + n])
        change(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n:])
    return go


def offsets(entries): return entries[QKV]["data_offsets"]


@pytest.mark.parametrize("change", [
    lambda h: h[QKV].update(dtype="F16"), lambda h: h[QKV].update(dtype="F64"), lambda h: h[QKV].pop("dtype"),
    lambda h: h[QKV].pop("data_offsets"), lambda h: h[QKV].update(data_offsets=["a", "b"]),
    lambda h: h[QKV].update(data_offsets=offsets(h)[::-1]), lambda h: h[QKV].update(shape=None),
    lambda h: h[QKV].update(data_offsets=[o - offsets(h)[0] - 100 for o in offsets(h)]),
    lambda h: h[QKV].update(shape=[-80, -48]), lambda h: h.update({QKV: [1]}), lambda h: h[QKV].update(shape=["a"]),
])
def test_a_header_that_contradicts_itself(tmp_path, change):
    make(tmp_path/"m", INTERNLM2)
    header(change)(tmp_path/"m")
    with pytest.raises(FtkitError, match=f"model.safetensors: its header contradicts itself: {QKV}"): load(tmp_path/"m")


def test_tensors_that_lie_on_each_other(tmp_path):
    make(tmp_path/"m", INTERNLM2)
    header(lambda h: h[QKV].update(data_offsets=[o - offsets(h)[0] for o in offsets(h)]))(tmp_path/"m")
    with pytest.raises(FtkitError, match="model.safetensors: by its header the tensors overlap"): load(tmp_path/"m")


@pytest.mark.parametrize("content, match", [
    ([1], "no weight_map"), ({}, "0 of 0 weight files"), ({"weight_map": [1]}, "no weight_map"), ({"weight_map": {"a": 1}}, "no weight_map"),
    ({"weight_map": {"a": ".."}}, "outside of its folder"), ({"weight_map": {"a": "model"}}, "1 of 1 weight files are missing"),
])
def test_an_index_that_is_none(tmp_path, content, match):
    make(tmp_path/"m", INTERNLM2, size="20KB")
    (tmp_path/"m/model").mkdir()
    (tmp_path/"m/model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(FtkitError, match=f"index.json: .*{match}"): load(tmp_path/"m")


@pytest.mark.parametrize("first", [True, False])
def test_of_two_tensors_of_a_name_the_index_chooses(tmp_path, first):
    model,ids = make(tmp_path/"m", INTERNLM2, size="20KB"),torch.arange(9)[None]
    shards = sorted((tmp_path/"m").glob("model-*"))
    own,other = (shards[0], shards[-1]) if first else (shards[-1], shards[0])
    name = next(iter(load_file(own)))
    state = load_file(other)
    save_file({**state, name: torch.full_like(load_file(own)[name], 7.)}, other)
    assert_close(logits(load(tmp_path/"m"), ids), logits(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change, match", [
    (lambda s: s.update({3: torch.ones(1)}), "other things than plain tensors"),
    (lambda s: s.update({QKV: s[QKV].to_sparse()}), "other things than plain tensors"),
    (lambda s: s.update({"epoch": 3}), "other things than plain tensors"),
])
def test_bin_files_of_other_things(tmp_path, change, match):
    make(tmp_path/"m", INTERNLM2)
    state = load_file(tmp_path/"m/model.safetensors")
    (tmp_path/"m/model.safetensors").unlink()
    change(state)
    torch.save(state, tmp_path/"m/pytorch_model.bin")
    with pytest.raises(FtkitError, match=f"pytorch_model.bin: .*{match}"): load(tmp_path/"m")


def test_a_bin_file_of_text_and_a_folder_in_place_of_a_file(tmp_path):
    make(tmp_path/"m", INTERNLM2)
    (tmp_path/"m/model.safetensors").unlink()
    (tmp_path/"m/model.safetensors").mkdir()
    with pytest.raises(FtkitError, match="there are no weights here"): load(tmp_path/"m")
    (tmp_path/"m/pytorch_model.bin").write_text("hello world")
    with pytest.raises(FtkitError, match="pytorch_model.bin: not a whole file"): load(tmp_path/"m")


def test_the_folders_of_the_hub_are_links(tmp_path):
    model,ids = make(tmp_path/"m", INTERNLM2, size="20KB"),torch.arange(9)[None]
    blobs,snapshot = tmp_path/"hub/blobs",tmp_path/"hub/snapshots/abc"
    blobs.mkdir(parents=True), snapshot.mkdir(parents=True)
    for i,f in enumerate((tmp_path/"m").iterdir()):
        f.rename(blobs/str(i))
        (snapshot/f.name).symlink_to(f"../../blobs/{i}")
    assert_close(logits(load(snapshot), ids), logits(model, ids), atol=1e-5, rtol=1e-5)
    save_model(load(snapshot), load_tokenizer("nano"), None, tmp_path/"out", layout="original")
    assert not any(f.is_symlink() for f in (tmp_path/"out").iterdir())
    assert load_tokenizer(tmp_path/"out")("dark teal") # the base had none


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int32])
def test_weights_of_another_type_are_no_weights(tmp_path, dtype):
    make(tmp_path/"m", INTERNLM2)
    change_safe(tmp_path/"m", lambda s: s.update({QKV: s[QKV].to(dtype)}))
    with pytest.raises(FtkitError, match=f"of a type that no model computes in, e.g. {QKV} in model.safetensors"): load(tmp_path/"m")


@pytest.mark.parametrize("raw, change", [
    (raw, dict(rope_scaling=value)) for raw in (INTERNLM2, MINICPM)
    for value in ("x", [1], {"type": "weird", "factor": 2.}, {"rope_type": "weird"}, {"factor": 2.}, {"type": 3}, {"type": None})] + [
    (QWEN, dict(use_dynamic_ntk=True, seq_length=None)), (QWEN, dict(use_logn_attn=True, seq_length=0))])
def test_what_the_original_could_not_compute_is_refused(raw, change, tmp_path):
    make(tmp_path/"m", raw)
    (tmp_path/"m/config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(FtkitError, match="can't be loaded exactly: .*(rope_scaling|seq_length)"): load(tmp_path/"m")


@pytest.mark.parametrize("change", [dict(rope_scaling={"type": "weird"}), dict(rope_scaling={"type": "longrope"}), dict(hidden_act="x"),
                                    dict(rope_scaling={"rope_type": "llama3", "factor": 2.}), dict(hidden_size=0)])
def test_what_transformers_stumbles_over_names_the_folder(change, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=1,
                                                          num_attention_heads=2)).save_pretrained(tmp_path)
    raw = json.loads((tmp_path/"config.json").read_text())
    raw.pop("rope_parameters", None)
    (tmp_path/"config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(FtkitError, match=re.escape(str(tmp_path))): load(tmp_path)


def test_a_qwen_that_never_looks_far_needs_no_length(tmp_path):
    make(tmp_path/"m", {k: v for k,v in QWEN.items() if k != "seq_length"})
    assert load(tmp_path/"m").model.rotary_emb


def test_large_finite_numbers_are_no_damage(tmp_path):
    make(tmp_path/"m", INTERNLM2)
    change_safe(tmp_path/"m", lambda s: s[QKV].fill_(3e38))
    assert load(tmp_path/"m").model.layers[1].self_attn.q_proj.weight.max() == torch.tensor(3e38)


# ------------------------------------------------------------ fewer bits

@pytest.mark.parametrize("name", ["internlm2_bias", "glm", "qwen_long", "baichuan13_40_heads", "minicpm"])
def test_four_bits_while_loading(name, tmp_path):
    make(tmp_path/"m", SHAPES[name])
    model,ids = load(tmp_path/"m", dtype="bf16", bits=4),torch.arange(4, 20)[None]
    whole = quantize_model(load(tmp_path/"m", dtype="bf16"), 4)
    a,b = model.state_dict(),whole.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert_close(logits(model, ids), logits(whole, ids), atol=0, rtol=0)
    assert len(find_targets(model)) == len(find_targets(whole)) and type(model.lm_head) is torch.nn.Linear
    assert model.config.quantization_config["load_in_4bit"]
    save_model(model, load_tokenizer("nano"), None, tmp_path/"four")
    again = load(tmp_path/"four", dtype="bf16")
    assert_close(logits(again, ids), logits(model, ids), atol=0, rtol=0)
    with pytest.raises(FtkitError, match="quantized already"): load(tmp_path/"four", bits=4)
    with pytest.raises(FtkitError, match="its weights are quantized"): save_original(model, tmp_path)


def test_four_bits_of_experts(tmp_path):
    config = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                  num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **config)).save_pretrained(tmp_path)
    model,ids = load(tmp_path, bits=4),torch.arange(9)[None]
    assert type(model.model.layers[0].mlp.experts) is QExperts
    assert_close(logits(model, ids), logits(quantize_model(load(tmp_path), 4), ids), atol=0, rtol=0)


def test_folders_of_transformers_and_bitsandbytes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    make(tmp_path/"m", {**INTERNLM2, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
                        "num_key_value_heads": 4})
    load(tmp_path/"m", dtype="bf16").save_pretrained(tmp_path/"native")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/"native", dtype=torch.bfloat16, quantization_config=how,
                                                  device_map="cpu")
    theirs.save_pretrained(tmp_path/"theirs")
    ours,ids = load(tmp_path/"theirs", dtype="bf16"),torch.arange(4, 20)[None]
    assert sum(isinstance(m, QLinear) for m in ours.modules()) == 14
    own = load(tmp_path/"m", dtype="bf16", bits=4)
    assert_close(logits(ours, ids), logits(own, ids), atol=0, rtol=0) # quantized alike by both
    own.save_pretrained(tmp_path/"ours")
    back = AutoModelForCausalLM.from_pretrained(tmp_path/"ours", device_map="cpu")
    assert isinstance(back.model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    gap = logits(back, ids).float() - logits(own, ids).float() # their kernel rounds in places of its own
    assert gap.norm() < 0.02*logits(own, ids).float().norm()
    state = load_file(tmp_path/"theirs/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.absmax"
    state.pop(name)
    save_file(state, tmp_path/"theirs/model.safetensors")
    with pytest.raises(FtkitError, match=name): load(tmp_path/"theirs")


def test_eight_bits(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    make(tmp_path/"m", SHAPES["internlm2"])
    model = load(tmp_path/"m", bits=8)
    assert sum(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules()) == 14
    ids = torch.arange(4, 20)[None]
    assert_close(logits(model, ids), logits(quantize_model(load(tmp_path/"m"), 8), ids), atol=0, rtol=0)
    with pytest.raises(FtkitError, match="5 bits can't be had"): load(tmp_path/"m", bits=5)


# ------------------------------------------------------------ training, merging, saving

@pytest.mark.parametrize("name", ["internlm2", "glm", "qwen_long", "baichuan13_40_heads", "minicpm"])
def test_lora_and_both_ways_to_merge(name, tmp_path):
    make(tmp_path/"base", SHAPES[name])
    tokenizer = load_tokenizer("nano")
    tokenizer.save_pretrained(tmp_path/"base")
    model,ids = load(tmp_path/"base"),torch.arange(4, 20)[None]
    assert len(find_targets(model)) == len(model.model.layers)*(6 if name == "glm" else 7)
    add_lora(model, LoraConfig(r=2))
    torch.manual_seed(3)
    for layer in lora_layers(model).values(): torch.nn.init.normal_(layer.B, std=0.1)
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    assert all(l.A.grad.abs().sum() > 0 for l in lora_layers(model).values())
    save_model(model.eval(), tokenizer, None, tmp_path/"adapter")
    wanted = logits(model, ids)
    assert_close(logits(load(tmp_path/"adapter"), ids), wanted, atol=1e-5, rtol=1e-5)
    for layout in "native", "original":
        out = merge(None, tmp_path/"adapter", tmp_path/layout, layout=layout)
        assert_close(logits(load(out), ids), wanted, atol=1e-4, rtol=1e-4)
        if name != "qwen_long" or layout == "original": # transformers reads a Qwen2's by rules of its own
            assert load_tokenizer(out)("dark teal").input_ids == tokenizer("dark teal").input_ids
        assert not list(tmp_path.glob("*/*.py"))
    native,original = (json.loads((tmp_path/n/"config.json").read_text()) for n in ("native", "original"))
    assert original["architectures"] == SHAPES[name]["architectures"] and native["model_type"] != original.get("model_type")
    assert weight_headers(tmp_path/"original") == weight_headers(tmp_path/"base")


def test_original_layout_takes_the_template_along(tmp_path):
    from ftkit.data.families import template
    tokenizer = load_tokenizer("nano")
    make(tmp_path/"base", INTERNLM2)
    tokenizer.save_pretrained(tmp_path/"base")
    (tmp_path/"base/generation_config.json").write_text('{"eos_token_id": 2, "chat_format": "chatml"}')
    (tmp_path/"base/modeling_internlm2.py").write_text("")
    made = template("qwen_chat", tokenizer)
    out = save_model(load(tmp_path/"base"), tokenizer, made, tmp_path/"out", layout="original")
    assert load_tokenizer(out).chat_template == made.jinja and not list(out.glob("*.py"))
    generation = json.loads((out/"generation_config.json").read_text())
    assert generation["eos_token_id"] == made.stop_ids(tokenizer) and generation["chat_format"] == "chatml"


def test_code_that_is_left_behind_is_named(tmp_path, capsys):
    make(tmp_path/"m", {**INTERNLM2, "auto_map": {"AutoConfig": "configuration_x.Config", "AutoModel": "modeling_x.Model",
                                                  "AutoModelForCausalLM": "modeling_x.Model"}})
    (tmp_path/"m/tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.Slow", None]}}))
    save_model(load(tmp_path/"m"), None, None, tmp_path/"a", layout="original")
    assert "needs configuration_x.py, modeling_x.py, tokenization_x.py beside it" in capsys.readouterr().err
    make(tmp_path/"n", {**INTERNLM2, "auto_map": {"AutoConfig": "me/repo--configuration_x.Config"}}) # transformers fetches that itself
    save_model(load(tmp_path/"n"), None, None, tmp_path/"b", layout="original")
    assert "beside it" not in capsys.readouterr().err


@pytest.mark.parametrize("ready", [True, False])
def test_added_tokens_reach_the_original_layout(ready, tmp_path):
    if ready:
        size = len(load_tokenizer("nano"))
        make(tmp_path/"base", {**INTERNLM2, "vocab_size": size})
        load_tokenizer("nano").save_pretrained(tmp_path/"base")
    else:
        ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
        (tmp_path/"base").mkdir()
        (tmp_path/"base/qwen.tiktoken").write_text("".join(f"{base64.b64encode(b).decode()} {i}\n" for b,i in ranks.items()))
        (tmp_path/"base/tokenizer_config.json").write_text(json.dumps(dict(
            tokenizer_class="QWenTokenizer", auto_map={"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]})))
        make(tmp_path/"base", {**QWEN, "vocab_size": (size := len(load_tokenizer_of(tmp_path/"base")))})
    model,tokenizer = load(tmp_path/"base"),load_tokenizer(tmp_path/"base")
    add_lora(model, LoraConfig(r=2, tokens=("<|tool|>", "colour")), tokenizer)
    save_model(model, tokenizer, None, tmp_path/"adapter")
    for layout in "original", "native":
        out = merge(None, tmp_path/"adapter", tmp_path/layout, layout=layout)
        again = load_tokenizer(out)
        assert len(again) == size + 2 == load(out).get_input_embeddings().weight.shape[0]
        assert again("the <|tool|>colour").input_ids == tokenizer("the <|tool|>colour").input_ids
        assert again("<|tool|>").input_ids[-1] == size and again.convert_tokens_to_ids("colour") == size + 1
    own = json.loads((tmp_path/"original/tokenizer_config.json").read_text())
    assert {t["content"] for t in own["added_tokens_decoder"].values()} >= {"<|tool|>", "colour"}


def load_tokenizer_of(folder):
    from ftkit.models.tokenizers import read_tokenizer
    return read_tokenizer(folder, {})


def test_original_layout_needs_an_original(tmp_path):
    tokenizer = load_tokenizer("nano")
    with pytest.raises(FtkitError, match="did not come in a layout of its own"):
        save_model(load("nano"), tokenizer, None, tmp_path/"m", layout="original")
    with pytest.raises(FtkitError, match="unknown layout 'orignal'"):
        save_model(load("nano"), tokenizer, None, tmp_path/"m", layout="orignal")
    assert not list(tmp_path.iterdir())


def test_a_grown_vocabulary_is_written(tmp_path):
    make(tmp_path/"m", SHAPES["glm"])
    model = load(tmp_path/"m")
    model.resize_token_embeddings(100, mean_resizing=False)
    (tmp_path/"out").mkdir()
    save_original(model, tmp_path/"out")
    assert json.loads((tmp_path/"out/config.json").read_text())["padded_vocab_size"] == 100
    ids = torch.tensor([[3, 98, 99]])
    assert_close(logits(load(tmp_path/"out"), ids), logits(model, ids), atol=1e-6, rtol=0)



@pytest.mark.parametrize("name, ids", [("baichuan7", 0), ("baichuan13_v1", 8)])
def test_a_head_that_the_original_would_divide(name, ids, tmp_path):
    "Baichuan2's after training; and that of Baichuan-13B once its vocabulary is no longer the one that tells it apart."
    make(tmp_path/"m", SHAPES[name])
    model,tokenizer = load(tmp_path/"m"),load_tokenizer("nano")
    save_model(model, tokenizer, None, tmp_path/"before", layout="original")
    if ids: model.resize_token_embeddings(64000 + ids, mean_resizing=False)
    else: model.lm_head.weight.data[3] *= 1.01
    with pytest.raises(FtkitError, match="lm_head.weight was trained.* Save it natively"):
        save_model(model, tokenizer, None, tmp_path/"after", layout="original")
    assert not (tmp_path/"after").exists() and save_model(model, tokenizer, None, tmp_path/"after")


def test_unloading_an_adapted_head_unties_it(tmp_path):
    make(tmp_path/"m", MINICPM)
    model = add_lora(load(tmp_path/"m"), LoraConfig(r=2, targets=["lm_head"]))
    for layer in lora_layers(model).values(): torch.nn.init.normal_(layer.B, std=0.3)
    model,ids = unload_lora(model),torch.arange(9)[None]
    (tmp_path/"out").mkdir()
    save_original(model, tmp_path/"out")
    assert json.loads((tmp_path/"out/config.json").read_text())["tie_word_embeddings"] is False
    assert_close(logits(load(tmp_path/"out"), ids), logits(model, ids), atol=1e-5, rtol=0)


def test_every_family_of_the_table_is_tested():
    assert set(ORIGINALS) == {raw["architectures"][0] for raw in SHAPES.values()}
    assert check_config(GOLDEN/"qwen") if GOLDEN.exists() else True


def test_tokenizer_of_an_original_is_read_and_saved_both_ways(tmp_path):
    "A vocabulary of tiktoken, whose class would be code in the folder."
    make(tmp_path/"m", {**QWEN, "vocab_size": 464})
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (tmp_path/"m/qwen.tiktoken").write_text("".join(lines))
    (tmp_path/"m/tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="QWenTokenizer", auto_map={"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]})))
    tokenizer,model = load_tokenizer(tmp_path/"m"),load(tmp_path/"m")
    ids = tokenizer("<|im_start|>né").input_ids
    assert ids == [257, 110, 195, 169]
    for layout in "native", "original":
        out = save_model(model, tokenizer, None, tmp_path/layout, layout=layout)
        assert load_tokenizer(out)("<|im_start|>né").input_ids == ids
    assert AutoTokenizer.from_pretrained(tmp_path/"native")("<|im_start|>né").input_ids == ids
    assert (tmp_path/"original/qwen.tiktoken").exists() and not (tmp_path/"native/qwen.tiktoken").exists()


MEMORY = """
import sys, threading, time, torch
from ftkit import load_model
def mib(): return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1])/1024
load_model("nano", device="cpu")
before,peak,on = mib(),[0.],[True]
def watch():
    while on[0]: peak[0] = max(peak[0], mib()); time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
model = load_model(sys.argv[1], dtype="bf16", device="cpu")
on[0] = False
thread.join()
print(sum(p.nbytes for p in model.parameters())/2**20, peak[0] - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_the_memory_of_the_model(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=2048, hidden_size=1024, intermediate_size=4096,
                                  num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="60MB")
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True)
    size,peak = map(float, run.stdout.split())
    assert size > 250 and peak < size + 64


def test_a_fully_tuned_checkpoint_goes_back_to_the_layout_of_its_authors(tmp_path):
    from ftkit.convert import pth_to_hf
    from ftkit.data.families import template
    tokenizer = load_tokenizer("nano")
    make(tmp_path/"base", {**INTERNLM2, "vocab_size": len(tokenizer)})
    tokenizer.save_pretrained(tmp_path/"base")
    model = load(tmp_path/"base")
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.01)
    made = template("internlm2_chat", tokenizer)
    save_model(model, tokenizer, made, tmp_path/"run/checkpoint-000003", system="Be brief.")
    out = pth_to_hf(tmp_path/"run", tmp_path/"out", layout="original")
    raw = json.loads((out/"config.json").read_text())
    assert raw["architectures"] == INTERNLM2["architectures"]
    assert tensors(out).keys() == tensors(tmp_path/"base").keys()
    ids = torch.randint(96, (2, 12))
    assert_close(logits(load(out), ids), logits(model, ids), atol=0, rtol=0)
    assert load_tokenizer(out).chat_template == made.jinja
    with pytest.raises(FtkitError, match="did not come in a layout of its own"):
        pth_to_hf("nano", tmp_path/"no", layout="original")
    assert not (tmp_path/"no").exists()
