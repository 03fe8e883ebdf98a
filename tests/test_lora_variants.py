"DoRA, PiSSA, trained modules, tokens and experts: the same files and logits as peft's, both ways."
import json, math
from pathlib import Path
from copy import deepcopy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (AutoConfig, AutoModelForCausalLM, DeepseekV2Config, MixtralConfig,
                          MixtralForCausalLM, Qwen2MoeConfig, Qwen3MoeConfig)
from ftkit.core import FtkitError
from ftkit.lora.dora import DoraLinear
from ftkit.lora.experts import LoraExperts
from ftkit.lora.inject import (LoraConfig, adapted, add_lora, count_parameters, lora_disabled,
                               lora_layers, merge_lora, trained_modules, unload_lora, unmerge_lora)
from ftkit.lora.layers import LoraLinear
from ftkit.lora.starts import start_loftq
from ftkit.quant.linear import QExperts, QLinear, quantize_model
from ftkit.lora.io import SETTINGS, WEIGHTS, adapter_config, load_adapter, save_adapter
from toys import IDS, SIZES, tiny_llama as toy

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def family(kind, **kwargs): return AutoConfig.for_model(kind, **SIZES | kwargs)


MIXTURES = dict(
    gpt_oss=lambda: family("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16,
                           layer_types=["full_attention"]*2),
    phimoe=lambda: family("phimoe", num_local_experts=4),
    mixtral=lambda: MixtralConfig(**SIZES, num_local_experts=4),
    qwen2=lambda: Qwen2MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4,
                                 shared_expert_intermediate_size=48, num_experts_per_tok=2),
    qwen3=lambda: Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4,
                                 num_experts_per_tok=2, head_dim=16),
    deepseek=lambda: DeepseekV2Config(
        **SIZES | dict(num_key_value_heads=4), moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=None,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        topk_method="greedy"))


def mixture(name="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[name]()).to(dtype).eval()
    for n, p in model.named_parameters(): # so that biases of experts count
        if "experts" in n and "bias" in n: nn.init.normal_(p, std=0.02)
    return model


def stir(model, std=0.05):
    "Change what is trained, as training does."
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad: p.add_(std*torch.randn(p.shape, generator=g).to(p))
    return model


def tuned(model=None, **kwargs):
    model = toy() if model is None else model
    return stir(add_lora(model, LoraConfig(**dict(r=4, alpha=8) | kwargs)))


def peft_made(folder, model, **kwargs):
    cfg = peft.LoraConfig(**dict(r=4, lora_alpha=8, task_type="CAUSAL_LM") | kwargs)
    made = stir(peft.get_peft_model(model, cfg)).eval()
    made.save_pretrained(folder)
    return made


def peft_load(folder, model): return peft.PeftModel.from_pretrained(model, folder).eval()
def logits(model, ids=IDS): return model(ids).logits.detach()
def close(a, b): assert_close(a, b, rtol=1e-4, atol=1e-5)


def both_ways(folder, base, ours, ids=IDS):
    "Ours → file → peft and ours again, all with the same logits; and the same file again."
    save_adapter(ours, folder, "some/base")
    wanted = logits(ours.eval(), ids)
    close(logits(peft_load(folder, base()), ids), wanted)
    again = load_adapter(base(), folder)
    close(logits(again, ids), wanted)
    assert not any(p.requires_grad for p in again.parameters())
    save_adapter(again, folder/"again", "some/base")
    old, new = load_file(folder/WEIGHTS), load_file(folder/"again"/WEIGHTS)
    assert list(old) == list(new) and all(torch.equal(old[k], new[k]) for k in old)
    old, new = (json.loads((f/SETTINGS).read_text()) for f in (folder, folder/"again"))
    assert old == new
    return wanted


def gradients_like_pefts(folder, base, ours, rename):
    theirs = peft.PeftModel.from_pretrained(base(), folder, is_trainable=True)
    again = load_adapter(base(), folder, trainable=True)
    for m in again, theirs: m.train()(IDS, labels=IDS).loss.backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for n, p in again.named_parameters():
        if not p.requires_grad: continue
        close(p.grad, rename(n, wanted))
    return len(wanted)


# ---- DoRA

@pytest.mark.parametrize("more", [{}, dict(rslora=True), dict(targets=["q_proj", "up_proj"])])
def test_dora(more, tmp_path):
    ours = tuned(dora=True, **more)
    wanted = both_ways(tmp_path, toy, ours)
    assert not torch.equal(wanted, logits(toy()))
    cfg = adapter_config(tmp_path)
    lengths = [k for k in load_file(tmp_path/WEIGHTS) if "magnitude_vector" in k]
    assert cfg["use_dora"] and len(lengths) == len(lora_layers(ours))
    def rename(n, theirs):
        name, part = n.rsplit(".", 1)
        end = "magnitude_vector.default.weight" if part == "magnitude" else f"{part}.default.weight"
        return theirs[f"base_model.model.{name}.lora_{end}"]
    assert gradients_like_pefts(tmp_path, toy, ours, rename) == 3*len(lora_layers(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_of_peft(dtype, tmp_path):
    theirs = peft_made(tmp_path, toy(dtype), use_dora=True, target_modules="all-linear",
                       exclude_modules=["lm_head"])
    ours = load_adapter(toy(dtype), tmp_path)
    assert {type(m) for m in lora_layers(ours).values()} == {DoraLinear}
    rough = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    assert_close(logits(ours), logits(theirs), **rough)
    merged = theirs.merge_and_unload()
    assert_close(logits(unload_lora(ours)), logits(merged), **rough)


def test_dora_starts_at_the_base_and_goes_back():
    for dtype in torch.float32, torch.bfloat16:
        model = add_lora(toy(dtype), LoraConfig(dora=True, dropout=0.5))
        assert torch.equal(logits(model.train()), logits(toy(dtype)))
    model, base = tuned(dora=True), logits(toy())
    before = logits(model)
    assert not torch.equal(before, base)
    with lora_disabled(model): assert torch.equal(logits(model), base)
    close(logits(merge_lora(model)), before)
    assert torch.equal(logits(unmerge_lora(model)), before)


def test_dora_lacks_its_lengths(tmp_path):
    save_adapter(tuned(), tmp_path, "x")
    settings = json.loads((tmp_path/SETTINGS).read_text())
    (tmp_path/SETTINGS).write_text(json.dumps(settings | dict(use_dora=True)))
    with pytest.raises(FtkitError, match="lora_magnitude_vector is missing"):
        load_adapter(toy(), tmp_path)


# ---- PiSSA

@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_pissa_files_fit_the_original_base(start, rslora, dora, tmp_path):
    if dora and rslora: pytest.skip("each by itself is enough")
    torch.manual_seed(1)
    model = add_lora(toy(), LoraConfig(r=4, alpha=8, start=start, rslora=rslora, dora=dora))
    if not dora: close(logits(model), logits(toy()))
    ours = stir(model)
    wanted = both_ways(tmp_path, toy, ours)
    assert adapter_config(tmp_path)["r"] == 8
    with lora_disabled(ours): close(logits(ours), logits(toy()))
    close(logits(unload_lora(deepcopy(ours))), wanted)
    close(logits(unload_lora(ours, merge=False)), logits(toy()))


def test_pissa_starts_like_pefts():
    ours = add_lora(toy(), LoraConfig(r=4, alpha=8, start="pissa", targets=["q_proj", "up_proj"]))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"]))
    for name, layer in lora_layers(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        close(layer.base.weight, other.base_layer.weight)
        close(layer.B @ layer.A, other.lora_B["default"].weight @ other.lora_A["default"].weight)
        close(layer.A.abs(), other.lora_A["default"].weight.abs())


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_of_peft(rslora, tmp_path):
    "Converted by peft, and as peft saves it without conversion."
    base = toy()
    cfg = peft.LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, init_lora_weights="pissa",
                          target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, cfg)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path/"start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    stir(theirs).eval()
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path/"raw")
    close(logits(load_adapter(toy(), tmp_path/"raw")), wanted)
    start = str(tmp_path/"start")
    theirs.save_pretrained(tmp_path/"plain", path_initial_model_for_weight_conversion=start)
    close(logits(load_adapter(toy(), tmp_path/"plain")), wanted)


# ---- modules_to_save

def test_modules_to_save(tmp_path):
    ours = tuned(modules_to_save=["lm_head", "model.norm"])
    assert "in full: model.norm, lm_head" in adapted(ours)
    wanted = both_ways(tmp_path, toy, ours)
    assert sorted(adapter_config(tmp_path)["modules_to_save"]) == ["lm_head", "model.norm"]
    with lora_disabled(ours): assert torch.equal(logits(ours), logits(toy()))
    close(logits(unload_lora(deepcopy(ours))), wanted)
    assert torch.equal(logits(unload_lora(ours, merge=False)), logits(toy()))


def test_modules_to_save_of_peft(tmp_path):
    theirs = peft_made(tmp_path, toy(), target_modules=["q_proj"],
                       modules_to_save=["embed_tokens", "lm_head", "input_layernorm"])
    ours = load_adapter(toy(), tmp_path, trainable=True)
    assert len(trained_modules(ours)) == 4
    close(logits(ours), logits(theirs))
    assert count_parameters(ours)[0] == count_parameters(theirs)[0]


def test_head_of_a_tied_model_by_peft(tmp_path):
    base = lambda: toy(tie_word_embeddings=True)
    theirs = peft_made(tmp_path, base(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    ours = load_adapter(base(), tmp_path)
    close(logits(ours), logits(theirs))
    plain = unload_lora(ours)
    close(logits(plain), logits(theirs))
    assert not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path/"merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged")), logits(theirs))


def test_a_copy_of_the_head_in_half_precision():
    model = tuned(toy(torch.bfloat16), modules_to_save=["lm_head"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16): model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.count_nonzero() for p in model.parameters() if p.requires_grad and p.ndim > 1)


# ---- tokens

MORE = torch.cat([IDS, torch.tensor([[7, 100, 127, 7, 3, 5, 100, 100, 1]])])


@pytest.mark.parametrize("tie", [False, True])
def test_tokens(tie, tmp_path):
    base = lambda: toy(tie_word_embeddings=tie)
    ours = tuned(base(), tokens=[7, 100, 127])
    wanted = both_ways(tmp_path, base, ours, MORE)
    rows = adapter_config(tmp_path)["trainable_token_indices"]
    assert rows == dict.fromkeys(["model.embed_tokens", "lm_head"][:2 - tie], [7, 100, 127])
    with lora_disabled(ours): close(logits(ours, MORE), logits(base(), MORE))
    plain = unload_lora(deepcopy(ours))
    close(logits(plain, MORE), wanted)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    plain.save_pretrained(tmp_path/"merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged"), MORE), wanted)
    def rename(n, theirs):
        if n.endswith("rows"): n = n[:-5] + ".token_adapter.trainable_tokens_delta.default"
        else: n = "{}.lora_{}.default.weight".format(*n.rsplit(".", 1))
        return theirs[f"base_model.model.{n}"]
    gradients_like_pefts(tmp_path, base, ours, rename)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("ids", [[1, 99], dict(embed_tokens=[1, 99], lm_head=[1, 99])])
def test_tokens_of_peft(ids, tie, tmp_path):
    base = lambda: toy(tie_word_embeddings=tie)
    theirs = peft_made(tmp_path, base(), target_modules=["q_proj"], trainable_token_indices=ids)
    both = MORE.where(MORE != 100, 99)
    close(logits(load_adapter(base(), tmp_path), both), logits(theirs, both))


@pytest.mark.parametrize("tie", [False, True])
def test_tokens_that_are_new(tie, tmp_path):
    "The base grows; peft's user has to say so, ftkit does it on loading."
    base = lambda: toy(tie_word_embeddings=tie)
    new = MORE.where(MORE != 100, 129)
    ours = tuned(base(), tokens=[128, 129])
    wanted = logits(ours, new)
    save_adapter(ours, tmp_path, "x")
    again = load_adapter(base(), tmp_path)
    close(logits(again, new), wanted)
    assert again.config.vocab_size == 130
    grown = base()
    grown.resize_token_embeddings(130)
    close(logits(peft_load(tmp_path, grown), new), wanted)
    unload_lora(again).save_pretrained(tmp_path/"merged")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged"), new), wanted)


def test_whole_tables_for_new_tokens(tmp_path):
    base = toy()
    base.resize_token_embeddings(130)
    ours = tuned(base, modules_to_save=["embed_tokens", "lm_head"])
    wanted = logits(ours, new := MORE.where(MORE != 100, 129))
    save_adapter(ours, tmp_path, "x")
    close(logits(load_adapter(toy(), tmp_path), new), wanted)
    grown = toy()
    grown.resize_token_embeddings(130)
    close(logits(peft_load(tmp_path, grown), new), wanted)


# ---- experts

@pytest.mark.parametrize("name", MIXTURES)
def test_experts(name, tmp_path):
    base = lambda: mixture(name)
    assert_close(logits(add_lora(base(), LoraConfig())), logits(base()), rtol=1e-5, atol=1e-6)
    ours = tuned(base())
    layers = lora_layers(ours).values()
    assert any(isinstance(m, LoraExperts) for m in layers) and "the experts of" in adapted(ours)
    wanted = both_ways(tmp_path, base, ours)
    assert (wanted - logits(base())).abs().max() > 1e-3
    with lora_disabled(ours): assert torch.equal(logits(ours), logits(base()))
    close(logits(merge_lora(ours)), wanted)
    close(logits(unload_lora(ours)), wanted)


def test_experts_learn_like_pefts(tmp_path):
    save_adapter(tuned(mixture()), tmp_path, "x")
    theirs = peft.PeftModel.from_pretrained(mixture(), tmp_path, is_trainable=True)
    ours = load_adapter(mixture(), tmp_path, trainable=True)
    for m in ours, theirs: m.train()(IDS, labels=IDS).loss.backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, layer in lora_layers(ours).items():
        if not isinstance(layer, LoraExperts): continue
        for stack, inner in dict(gate_up_proj=".base_layer", down_proj="").items():
            key = f"base_model.model.{name}{inner}.lora_"
            A, B = (wanted[f"{key}{p}.default.weight"] for p in "AB")
            close(layer.A[stack].grad.flatten(0, 1), A)
            close(layer.B[stack].grad.permute(1, 2, 0).flatten(1), B)
            assert B.count_nonzero()


@pytest.mark.parametrize("params", [["experts.gate_up_proj", "experts.down_proj"],
                                    ["experts.down_proj"], ["gate_up_proj"]])
@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_experts_of_peft(name, params, tmp_path):
    theirs = peft_made(tmp_path, mixture(name), target_modules=["q_proj"], target_parameters=params,
                       rank_pattern={"experts.gate_up_proj": 2})
    ours = load_adapter(mixture(name), tmp_path)
    close(logits(ours), logits(theirs))
    plan = next(m.plan for m in lora_layers(ours).values() if isinstance(m, LoraExperts))
    assert plan.get("gate_up_proj", (2, 8)) == (2, 8)
    both_ways(tmp_path/"ours", lambda: mixture(name), ours)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name, block, parts", [
    ("mixtral", "block_sparse_moe", "w1 w2 w3"), ("qwen3", "mlp", "gate_proj down_proj up_proj")])
def test_experts_of_older_adapters(name, block, parts, rslora, tmp_path):
    "Where each expert was three linear layers; peft puts them together as well."
    g, tensors, parts = torch.Generator().manual_seed(1), {}, parts.split()
    inner = SIZES["intermediate_size"] if name == "mixtral" else 32
    def pair(key, n_in, n_out):
        for part, shape in dict(A=(4, n_in), B=(n_out, 4)).items():
            tensors[f"base_model.model.{key}.lora_{part}.weight"] = 0.1*torch.randn(shape, generator=g)
    for i in range(2):
        pair(f"model.layers.{i}.self_attn.q_proj", 64, 64)
        for e in range(4):
            for p in parts:
                sizes = (inner, 64) if p in ("w2", "down_proj") else (64, inner)
                pair(f"model.layers.{i}.{block}.experts.{e}.{p}", *sizes)
    save_file(tensors, tmp_path/WEIGHTS)
    (tmp_path/SETTINGS).write_text(json.dumps(dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=rslora,
        base_model_name_or_path="x", target_modules=["q_proj", *parts])))
    ours = load_adapter(mixture(name), tmp_path)
    if not rslora: close(logits(ours), logits(peft_load(tmp_path, mixture(name)))) # there peft doubles α too
    layer = lora_layers(ours)["model.layers.1.mlp.experts"]
    key = f"base_model.model.model.layers.1.{block}.experts.2.{{}}.lora_{{}}.weight"
    scale = 4 if rslora else 2
    for rows, p in zip(((0, inner), (inner, 2*inner)), [parts[0], parts[2]]):
        delta = layer.scaling("gate_up_proj")*layer.B["gate_up_proj"][2] @ layer.A["gate_up_proj"][2]
        wanted = scale*tensors[key.format(p, "B")] @ tensors[key.format(p, "A")]
        close(delta[slice(*rows)].detach(), wanted)
    both_ways(tmp_path/"new", lambda: mixture(name), ours)
    lost = key.format(parts[2], "B")
    save_file({k: t for k, t in tensors.items() if k != lost}, tmp_path/WEIGHTS)
    with pytest.raises(FtkitError, match="not all factors for model.layers.1.mlp.experts.gate_up"):
        load_adapter(mixture(name), tmp_path)


def test_a_mixture_of_xtuner(tmp_path):
    "A .pth with the experts as linear layers becomes an adapter for the base of today."
    from ftkit.convert import pth_to_hf
    from ftkit.models.load import load_model, load_tokenizer, save_model
    g, state, base = torch.Generator().manual_seed(1), {}, tmp_path/"base"
    sizes = MIXTURES["mixtral"]().to_dict() | dict(vocab_size=2048)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(**sizes)).eval()
    save_model(model, load_tokenizer("nano"), None, base)
    for e in range(4):
        for p, (n_in, n_out) in dict(w1=(64, 96), w2=(96, 64), w3=(64, 96)).items():
            for part, shape in dict(A=(4, n_in), B=(n_out, 4)).items():
                key = f"model.layers.1.block_sparse_moe.experts.{e}.{p}.lora_{part}.weight"
                state[f"llm.base_model.model.{key}"] = 0.1*torch.randn(shape, generator=g)
    torch.save(dict(state_dict=state), tmp_path/"e.pth")
    lora = LoraConfig(r=4, alpha=8)
    out = pth_to_hf(tmp_path/"e.pth", tmp_path/"out", str(base), lora, "qwen_chat")
    ours = load_model(out, device="cpu")
    close(logits(ours), logits(peft_load(out, deepcopy(model))))
    with torch.no_grad():
        for e in range(4):
            key = f"llm.base_model.model.model.layers.1.block_sparse_moe.experts.{e}"
            delta = [2*state[f"{key}.w{i}.lora_B.weight"] @ state[f"{key}.w{i}.lora_A.weight"]
                     for i in (1, 2, 3)]
            experts = model.model.layers[1].mlp.experts
            experts.gate_up_proj[e] += torch.cat([delta[0], delta[2]])
            experts.down_proj[e] += delta[1]
    close(logits(ours), logits(model))


def test_only_experts(tmp_path):
    ours = tuned(mixture(), targets=["gate_up_proj", "down_proj"])
    assert adapter_config(save_adapter(ours, tmp_path, "x"))["target_modules"] is None
    both_ways(tmp_path, mixture, ours)


def test_experts_in_half_precision_with_dropout():
    model = tuned(mixture(dtype=torch.bfloat16), dropout=0.3).train()
    with torch.autocast("cpu", dtype=torch.bfloat16): model(IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.grad.dtype for p in trained.values()} == {torch.float32}
    assert sum(bool(p.grad.count_nonzero()) for p in trained.values()) == len(trained)
    assert not torch.equal(logits(model), logits(model))


def test_experts_with_gradient_checkpointing():
    def grads(checkpoint):
        model = tuned(mixture()).train()
        if checkpoint: model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close(grads(True), grads(False))


# ---- 8 bits

def in_8_bits(model):
    bnb = pytest.importorskip("bitsandbytes")
    for n, m in [*model.named_modules()]:
        if not isinstance(m, nn.Linear) or n == "lm_head": continue
        new = bnb.nn.Linear8bitLt(m.in_features, m.out_features, m.bias is not None,
                                  has_fp16_weights=False)
        new.load_state_dict(m.state_dict())
        model.set_submodule(n, new.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_over_8_bits(dora, tmp_path):
    base = lambda: in_8_bits(toy())
    ours = tuned(base(), dora=dora)
    save_adapter(ours, tmp_path, "x")
    close(logits(load_adapter(base(), tmp_path)), logits(ours))
    ours.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.count_nonzero() for p in ours.parameters() if p.requires_grad)
    with lora_disabled(ours.eval()): close(logits(ours), logits(base()))
    before = logits(ours)
    plain = unload_lora(ours)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    # inputs are rounded to 8 bits in the layer of bitsandbytes, and not in the plain one
    assert (logits(plain) - before).norm() < 0.1*before.norm()


def test_no_pissa_over_8_bits():
    with pytest.raises(FtkitError, match="q_proj.*fewer bits|lora.start.*fewer bits"):
        add_lora(in_8_bits(toy()), LoraConfig(start="pissa"))


# ---- 4 bits

def in_4_bits(model, **options): return quantize_model(model, **options).eval()


@pytest.mark.parametrize("dora", [False, True])
def test_over_4_bits(dora, tmp_path):
    "Trained over four bits; merged into the whole base it is what peft merges there."
    ours = tuned(in_4_bits(toy()), dora=dora)
    assert {type(m.base) for m in lora_layers(ours).values()} == {QLinear}
    ours.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.count_nonzero() for p in ours.parameters() if p.requires_grad)
    before = logits(ours.eval())
    with lora_disabled(ours): assert torch.equal(logits(ours), logits(in_4_bits(toy())))
    save_adapter(ours, tmp_path, "x")
    close(logits(load_adapter(in_4_bits(toy()), tmp_path)), before)
    merged = unload_lora(load_adapter(toy(), tmp_path))
    close(logits(merged), logits(peft_load(tmp_path, toy()).merge_and_unload()))
    close(logits(merge_lora(ours)), before)
    plain = unload_lora(ours)
    assert not any(isinstance(m, QLinear) for m in plain.modules())
    close(logits(plain), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_bits_start_at_the_base(dtype):
    base = lambda: in_4_bits(toy(dtype), compute_dtype=dtype)
    for dora in False, True:
        model = add_lora(base(), LoraConfig(dora=dora))
        assert torch.equal(logits(model), logits(base()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.train()(IDS, labels=IDS).loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_in_4_bits(name, tmp_path):
    base = lambda: in_4_bits(mixture(name))
    ours = tuned(base())
    inside = [m.base for m in lora_layers(ours).values() if isinstance(m, LoraExperts)]
    assert inside and all(isinstance(m, QExperts) for m in inside)
    with lora_disabled(ours): assert torch.equal(logits(ours), logits(base()))
    before = logits(ours)
    save_adapter(ours, tmp_path, "x")
    close(logits(load_adapter(base(), tmp_path)), before)
    close(logits(load_adapter(mixture(name), tmp_path)), logits(peft_load(tmp_path, mixture(name))))
    ours.train()(IDS, labels=IDS).loss.backward()
    idle = [n for n, p in ours.named_parameters() if p.requires_grad and not p.grad.count_nonzero()]
    assert not idle
    close(logits(unload_lora(ours.eval())), before)
    assert not any(isinstance(m, (QLinear, QExperts)) for m in ours.modules())


@pytest.mark.parametrize("start", ["pissa", "loftq", "loftq_iter_3"])
def test_starts_for_4_bits(start, tmp_path):
    "The base is nearer to the whole one than four bits alone, and the file is for the whole one."
    whole = logits(toy())
    ours = add_lora(toy(), LoraConfig(r=16, alpha=32, start=start))
    if start == "pissa": quantize_model(ours)
    assert {type(m.base) for m in lora_layers(ours).values()} == {QLinear}
    plain = quantize_model(add_lora(toy(), LoraConfig(r=16, alpha=32)))
    assert (logits(ours) - whole).norm() < 0.9*(logits(plain) - whole).norm()
    save_adapter(ours, tmp_path/"start", "x")
    close(logits(load_adapter(toy(), tmp_path/"start")), whole)
    ours.train()(IDS, labels=IDS).loss.backward()
    save_adapter(stir(ours), tmp_path/"end", "x")
    close(logits(load_adapter(toy(), tmp_path/"end")), logits(peft_load(tmp_path/"end", toy())))
    with pytest.raises(FtkitError, match="in fewer bits here already"):
        add_lora(in_4_bits(toy()), LoraConfig(start=start))


@pytest.mark.parametrize("turns", [1, 3])
def test_loftq_like_peft(turns):
    "Against peft's own function, which asks for a GPU and gets the CPU here."
    import inspect
    import peft.utils.loftq_utils as theirs
    pytest.importorskip("bitsandbytes")
    source = inspect.getsource(theirs.loftq_init).replace('else "cuda"', 'else "cpu"')
    exec(source, space := dict(vars(theirs)))
    linear = nn.Linear(64, 96)
    weight = linear.weight.detach().clone()
    q, A, B = space["loftq_init"](weight, num_bits=4, reduced_rank=8, num_iter=turns)
    layer = start_loftq(LoraLinear(linear, r=8, alpha=8), turns, double=False)
    close(layer.base.weight, q)
    close(layer.B @ layer.A, B @ A)


# ---- in a run

def trainer(work_dir=None, callbacks=(), **lora):
    "Whatever is drawn for the start comes from the seed, as in a recipe."
    from ftkit.training.loop import Trainer
    from ftkit.training.optim import OptimConfig
    from ftkit.training.plan import TrainConfig
    from ftkit.sft import SupervisedTuning
    from small_runs import batch, tiny_rows
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=24, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, pad_token_id=0))
    model = quantize_model(add_lora(model, LoraConfig(r=4, dropout=0.1, **lora)))
    cfg = TrainConfig(batch_size=2, epochs=1, precision="fp32", save_every=2)
    return Trainer(model, SupervisedTuning(), tiny_rows(), cfg, OptimConfig(lr=1e-2), batch, None,
                   callbacks, work_dir, lambda folder: save_adapter(model, folder, "x"))


@pytest.mark.parametrize("lora", [
    dict(), dict(targets=["q_proj", "v_proj"], start="pissa_niter_4"),
    dict(targets=["q_proj"], dora=True, tokens=[1, 2, 25]),
    dict(modules_to_save=["lm_head", "norm"])])
def test_resume_is_exact_with_every_variant(lora, tmp_path):
    from ftkit.training.loop import Callback
    from small_runs import untimed
    class Stop(Callback):
        order = 100
        def after_step(self, trainer):
            if trainer.step == 5: raise KeyboardInterrupt
    whole = trainer(**lora).fit()
    with pytest.raises(KeyboardInterrupt): trainer(tmp_path, [Stop()], **lora).fit()
    rest = trainer(tmp_path, **lora).fit(resume="auto")
    assert untimed(rest.history) == untimed(whole.history)
    for a, b in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(a, b)
    losses = rest.curve()[1]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("more", [
    {"lora.tokens": ("<colour>", "</colour>"), "lora.modules_to_save": ("norm",),
     "optim.lora_plus_ratio": 4},
    {"lora.start": "loftq", "model.bits": 4}, {"lora.dora": True, "model.bits": 4}])
def test_a_recipe_from_start_to_merge(more, tmp_path, capsys):
    import ftkit as ft
    run = ft.train("nano_lora_colors_e4", tmp_path/"run", **{
        "train.max_steps": 2, "metric": None, "prompts": (), "data.eval_path": None, **more})
    assert "weights are trained: LoRA on 28 linear layers (q_proj" in capsys.readouterr().err
    assert all(math.isfinite(v) for v in run.curve()[1])
    model = ft.load_model(tmp_path/"run", device="cpu")
    tokenizer = ft.load_tokenizer(tmp_path/"run")
    ids = tokenizer("dark teal <colour>", return_tensors="pt").input_ids
    if "lora.tokens" in more: assert ids[0, -1] == len(tokenizer) - 2
    wanted = logits(model, ids)
    ft.merge(None, tmp_path/"run", tmp_path/"merged")
    plain = ft.load_model(tmp_path/"merged", device="cpu", dtype=str(model.dtype)[6:])
    off = (logits(plain, ids).float() - wanted.float()).norm()/wanted.float().norm()
    assert off < 0.02 # the merged weights are rounded to the base's 16 bits


# ---- on a GPU

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@CUDA
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fewer_bits_on_cuda(bits, dora, dtype, tmp_path):
    base = lambda: quantize_model(toy(dtype).cuda(), bits, compute_dtype=dtype)
    ids = IDS.cuda()
    cfg = LoraConfig(r=4, alpha=8, dora=dora, modules_to_save=["norm"], tokens=[7])
    model = add_lora(base(), cfg)
    assert_close(logits(model, ids), logits(base(), ids), rtol=0.02, atol=0.02)
    with torch.autocast("cuda", dtype=dtype): model.train()(ids, labels=ids).loss.backward()
    for n, p in model.named_parameters():
        if p.requires_grad: assert p.grad.dtype == torch.float32 and p.grad.isfinite().all(), n
    save_adapter(stir(model).eval(), tmp_path, "x")
    again = load_adapter(base(), tmp_path)
    assert_close(logits(again, ids), logits(model, ids), rtol=0.05, atol=0.05)
    assert_close(logits(unload_lora(again), ids), logits(model, ids), rtol=0.1, atol=0.1)


@CUDA
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("bits", [None, 4])
def test_experts_on_cuda(name, bits, tmp_path):
    base = lambda: mixture(name).cuda() if not bits else in_4_bits(mixture(name).cuda())
    ids = IDS.cuda()
    ours = tuned(base())
    save_adapter(ours, tmp_path, "x")
    close(logits(load_adapter(base(), tmp_path), ids), logits(ours, ids))
    if not bits: close(logits(peft_load(tmp_path, base()).cuda(), ids), logits(ours, ids))
    with torch.autocast("cuda", dtype=torch.bfloat16): ours.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)


def test_options_from_the_command_line():
    import ftkit as ft
    set_ = ft.recipe("nano_lora_colors_e4").set
    assert set_("lora.tokens", "<a>,</a>").lora.tokens == ("<a>", "</a>")
    assert set_("lora.tokens", "7,8").lora.tokens == (7, 8)
    assert set_("lora.modules_to_save", "lm_head").lora.modules_to_save == ("lm_head",)
    r = set_("lora.dora", "true").set("lora.start", "pissa_niter_16")
    assert r.lora.dora is True and r.lora.start == "pissa_niter_16"
    assert set_("lora.targets", "q_proj,k_proj").lora.targets == ("q_proj", "k_proj")


TUTORIAL = """lora.r=64 lora.alpha=128 lora.dropout=0.05 lora.targets=q_proj,k_proj,v_proj,o_proj
    optim.lr=2e-4 optim.warmup_steps=100 optim.weight_decay=0.01 optim.min_lr=1e-6"""
XTUNER = """lora.r=64 lora.alpha=16 lora.dropout=0.1 lora.targets=all-linear optim.lr=2e-4
    optim.warmup_ratio=0.03 optim.weight_decay=0"""


@pytest.mark.parametrize("line", [TUTORIAL, XTUNER])
@pytest.mark.parametrize("name", ["llama2_7b_chat_qlora_alpaca_e3", "llama2_7b_chat_lora_alpaca_e3"])
def test_the_lines_of_the_page_about_values(name, line):
    import ftkit as ft
    r = ft.recipe(name).set(**dict(pair.split("=") for pair in line.split()))
    assert r.optim.check().lr == 2e-4 and r.lora.r == 64
    model = add_lora(toy(), r.lora)
    assert len(lora_layers(model)) == (8 if line is TUTORIAL else 14)
    page = (Path(__file__).parent.parent/"nbs/66_training.optim.ipynb").read_text()
    assert all(pair in page for pair in line.split())
