"Decoder layers by hand: the same losses and gradients as the model itself, whatever it keeps."
import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest, torch, transformers
from torch import nn
from torch.testing import assert_close

import ftkit.decoder, ftkit.fast
from ftkit.core import FtkitError
from ftkit.data.encode import Encoded
from ftkit.data.packing import collate, make_row
from ftkit.fast import (find_decoder, is_fast, rows_of_call, set_saving, slow_down, speed_up,
                        why_not)
from ftkit.kernels.launch import interpreted
from ftkit.kept import Away, Saving, keep_on_host
from ftkit.kernels.edges import SCRATCH
from ftkit.kernels.lora import Projection
from ftkit.lora.inject import LoraConfig, add_lora, lora_disabled, merge_lora, unload_lora
from ftkit.models.load import load_model
from ftkit.quant.linear import quantize_model
from ftkit.sft import SupervisedTuning

from toys import IDS, SIZES, tiny_llama

LEVELS = ("none", "some", "more", "much", "most")
PLANS = ["all", "norms", *LEVELS, Saving("some", piece=5), Saving("most", host=True, piece=4),
         Saving("more", host=True), Saving("much", host=True), Saving("norms", host=True),
         Saving("none", host=True), Saving("some", host=True, piece=5)]
GOLDEN = Path(__file__).parents[2]/"shared/golden"


@pytest.fixture(autouse=True)
def layers_run(monkeypatch):
    "How many layers went the fast way."
    count, plain = [], ftkit.fast.Fast.layer
    def counted(*args, **kwargs): count.append(1); return plain(*args, **kwargs)
    monkeypatch.setattr(ftkit.fast.Fast, "layer", counted)
    return count


@pytest.fixture
def said(monkeypatch):
    "What was said."
    out = []
    monkeypatch.setattr(ftkit.fast, "say", out.append)
    return out


def tiny(family, **kwargs):
    "A random model of a family, with norms and biases that are not trivial."
    small = dict(head_dim=16)
    more = dict(Gemma=small, Glm=small, Glm4=small | dict(eos_token_id=2), Qwen3=small,
                Gemma2=small | dict(sliding_window=4, query_pre_attn_scalar=8,
                                    attn_logit_softcapping=2.),
                Gemma3Text=small | dict(sliding_window=4, sliding_window_pattern=2,
                                        query_pre_attn_scalar=8),
                DeepseekV2=dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
                                moe_intermediate_size=32, first_k_dense_replace=1, kv_lora_rank=16,
                                q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16,
                                v_head_dim=16, num_key_value_heads=4, n_group=1, topk_group=1),
                Qwen3Moe=small | dict(num_experts=4, moe_intermediate_size=32,
                                      num_experts_per_tok=2), Mistral=dict(sliding_window=4),
                Granite=dict(residual_multiplier=.3, embedding_multiplier=3.,
                             attention_multiplier=.2, logits_scaling=2.),
                Mixtral=dict(num_local_experts=4), Phi3=dict(eos_token_id=2, bos_token_id=1),
                Qwen2Moe=dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2,
                              shared_expert_intermediate_size=32)).get(family, {})
    torch.manual_seed(0)
    if "attn_logit_softcapping" in more: more["attn_implementation"] = "eager" # sdpa may not bend
    config = getattr(transformers, f"{family}Config")(**SIZES | dict(pad_token_id=0) | more | kwargs)
    name = "Gemma3" if family == "Gemma3Text" else family
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for name, p in model.named_parameters():
        if "norm" in name: nn.init.normal_(p, mean=not family.startswith("Gemma"), std=.2)
        if name.endswith("bias"): nn.init.normal_(p, std=.2)
    return model


def with_lora(model, **kwargs):
    add_lora(model, LoraConfig(**dict(r=4) | kwargs))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(".B"): nn.init.normal_(p, std=.1)
    return model


def step(model, ids=IDS, **kwargs):
    "The loss, and the gradient of all that is trained."
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                           if p.grad is not None}


def near(found, expected, tolerance=1e-5):
    "Losses and gradients are equal; a gradient as a whole, by its length."
    assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    assert set(found[1]) == set(expected[1])
    far = {n: ((found[1][n] - g).norm()/(g.norm() + 1e-6)).item() for n, g in expected[1].items()}
    assert max(far.values()) < tolerance, max(far.items(), key=lambda x: x[1])


def compare(model, layers_run, plans=PLANS, tolerance=1e-5, **kwargs):
    "Every plan against the model itself."
    model.train()
    expected = step(model, **kwargs)
    assert expected[1] and not layers_run
    assert speed_up(model, hold=kwargs.pop("hold", False)), why_not(model)
    for plan in plans:
        set_saving(model, plan)
        layers_run.clear()
        found = step(model, **kwargs)
        assert len(layers_run) == len(find_decoder(model).layers)
        near(found, expected, tolerance)
    layers_run.clear()
    return model


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Gemma", "Phi3", "Granite", "Glm",
                                    "Glm4", "Qwen3", "Gemma2", "Gemma3Text", "Mixtral", "Qwen2Moe",
                                    "Qwen3Moe", "DeepseekV2"])
def test_all_weights_of_every_family(family, layers_run):
    compare(tiny(family), layers_run)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "Phi3", "Granite", "Glm",
                                    "Glm4", "Qwen3", "Gemma2"])
def test_lora_of_every_family(family, layers_run):
    compare(with_lora(tiny(family)), layers_run, ("none", "most"))


@pytest.mark.parametrize("how", [dict(targets=["q_proj", "down_proj"]), dict(rslora=True, r=3, alpha=4),
                                 dict(modules_to_save=("lm_head",)), dict(tokens=(3, 5))])
def test_kinds_of_lora(how, layers_run):
    compare(with_lora(tiny_llama(), **how), layers_run, ("none", "much"))


@pytest.mark.parametrize("bias", [False, True])
def test_four_bits(bias, layers_run):
    model = tiny_llama(attention_bias=bias, mlp_bias=bias)
    compare(with_lora(quantize_model(model)), layers_run)


@pytest.mark.parametrize("defer", [False, True])
def test_weights_in_one_matrix(defer, layers_run):
    model = with_lora(tiny_llama()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = step(model)
    speed_up(model, hold=True, defer=defer)
    for plan in PLANS[1:]: # and gradients that add up
        set_saving(model, plan)
        step(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        near((expected[0], {n: p.grad/2 for n, p in model.named_parameters()
                            if p.grad is not None}), expected)
    near(step(model), expected)
    held = model.model.layers[0].mlp.up_proj.base.weight
    assert not held.is_contiguous()
    after = model.state_dict()
    assert_close(after, before, rtol=0, atol=0)
    assert all(t.is_contiguous() for t in after.values())
    near(step(copy.deepcopy(model)), expected)
    slow_down(model)
    assert model.model.layers[0].mlp.up_proj.base.weight.is_contiguous()
    near(step(model), expected)


AHEAD = {"plain": (lambda: tiny("Llama"), True), "lora": (lambda: with_lora(tiny_llama()), True),
         "held": (lambda: with_lora(tiny_llama()), True),
         "four bits": (lambda: with_lora(quantize_model(tiny_llama())), True),
         "biases": (lambda: with_lora(tiny_llama(mlp_bias=True)), False),
         "factor": (lambda: tiny("Granite"), False), "norm behind": (lambda: tiny("Gemma2"), False)}


@pytest.mark.parametrize("kind", AHEAD)
@pytest.mark.parametrize("plan", ["all", Saving("some", piece=5), "most"])
def test_the_output_starts_from_the_middle(kind, plan, monkeypatch):
    "Put there by the norm or by the product: to the last bit the same, both ways, where it may be."
    make, may = AHEAD[kind]
    model, dev = make().train(), "cuda" if torch.cuda.is_available() else "cpu"
    model, ids, plain, asked = model.to(dev), IDS.to(dev), ftkit.decoder._starts_there, []
    speed_up(model, plan, hold=kind == "held")
    ways = [nullcontext] if dev == "cuda" else [nullcontext] + [interpreted]*(plan == "all")
    for way in ways:
        def run():
            with way(): return step(model, ids)
        monkeypatch.setattr(ftkit.decoder, "_starts_there", lambda *args: False)
        loss, grads = run()
        monkeypatch.setattr(ftkit.decoder, "_starts_there",
                            lambda *args: asked.append(plain(*args)) or asked[-1])
        found, again = run()
        assert torch.equal(found, loss) and again.keys() == grads.keys()
        if dev == "cuda": near((found, again), (loss, grads)) # attention adds up in any order there
        else: assert all(torch.equal(g, grads[n]) for n, g in again.items())
    assert asked and set(asked) == {may and plan != "most"}


def test_eight_bits_start_from_the_middle_itself():
    p = Projection([nn.Linear(4, 4, bias=False)])
    coded, joined = (SimpleNamespace(takes_codes=True, joined=(j, j), biased=False) for j in (0, 1))
    def starts(gate_up, down): return ftkit.decoder._starts_there(
        SimpleNamespace(gate_up=gate_up, down=down, factor=1., after=None), IDS[0], IDS[1])
    assert starts(p, p) and starts(joined, p)
    assert not starts(coded, p) and not starts(p, coded) and not starts(p, joined)


def test_dropout_is_the_same_on_the_way_back(layers_run):
    model = with_lora(tiny_llama(), dropout=.3).train()
    speed_up(model)
    def one(plan):
        set_saving(model, plan)
        torch.manual_seed(2)
        return step(model)
    expected = one("none")
    for plan in LEVELS[1:]: near(one(plan), expected)
    torch.manual_seed(3)
    assert step(model)[0] != expected[0]
    model.eval()
    a, b = (step(model, use_cache=False)[0] for _ in range(2))
    slow_down(model)
    assert a == b
    assert_close(a, step(model, use_cache=False)[0])


def test_dropout_gradient_is_right():
    "The loss moves along the gradient of A as a first derivative should, with a fixed mask."
    model = with_lora(tiny_llama().double(), dropout=.5, dtype="base").train()
    speed_up(model, "most")
    def loss():
        torch.manual_seed(4)
        logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    loss().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    name = "model.layers.0.mlp.down_proj.A"
    p, g = dict(model.named_parameters())[name], grads[name]
    ends = []
    for sign in (1, -1):
        with torch.no_grad(): p.add_(g*sign*1e-5/g.norm())
        ends.append(loss().detach())
        with torch.no_grad(): p.sub_(g*sign*1e-5/g.norm())
    assert_close((ends[0] - ends[1])/2e-5, g.norm(), rtol=1e-3, atol=0)


def samples(*lengths):
    g = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(1, 128, (n,), generator=g).tolist()
    return [Encoded(ids := draw(n), ids) for n in lengths]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Glm"])
def test_packed_rows(family, layers_run):
    "Two rows of several samples, one shorter than the other; a window in Mistral."
    rows = [make_row(samples(3, 7, 2)), make_row(samples(5, 4))]
    model, task = tiny(family, num_hidden_layers=2).train(), SupervisedTuning()
    batch = task.prepare(collate(rows, 0, mask=None))
    def run():
        model.zero_grad()
        loss, metrics = task(model, batch)
        loss.backward()
        return loss.detach(), metrics, [p.grad.clone() for p in model.parameters()]
    expected = run()
    speed_up(model)
    layers_run.clear()
    assert_close(run(), expected, rtol=1e-5, atol=1e-5)
    assert len(layers_run) == 2 and "attention_mask" not in task.inputs(model, batch)
    del batch["cu_seqlens"] # found in the positions
    inputs = dict(task.inputs(model, batch), use_cache=False)
    found = model(**inputs).logits
    slow_down(model)
    assert_close(found, model(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("real", [[[1]*9, [1]*6 + [0]*3], [[1]*9, [0]*4 + [1]*5],
                                  [[0, 0] + [1]*5 + [0, 0]]*2])
def test_padding(real, layers_run):
    model, mask = tiny_llama().train(), torch.tensor(real)
    labels = IDS.masked_fill(mask == 0, -100)
    labels[:, 1:][(mask[:, :-1] == 0)] = -100 # what padding says is not scored
    def run():
        model.zero_grad()
        model(input_ids=IDS, labels=labels, attention_mask=mask).loss.backward()
        return [p.grad.clone() for p in model.model.layers.parameters()]
    expected = run()
    speed_up(model, "most")
    assert_close(run(), expected, rtol=1e-5, atol=1e-6)
    assert len(layers_run) == 2


def test_odd_masks_go_the_ordinary_way_and_say_so_once(layers_run, said):
    model = tiny_llama().train()
    holes = torch.ones(2, 9).long()
    holes[:, 3] = 0
    own = torch.zeros(2, 1, 9, 9).masked_fill_(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    expected = [step(model, attention_mask=m) for m in (holes, own)]
    speed_up(model)
    for _ in range(2):
        for m, e in zip((holes, own), expected): near(step(model, attention_mask=m), e)
    assert not layers_run and len(said) == 1 and "holes" in said[0]


def test_rows_of_call():
    ask = lambda **kw: rows_of_call((2, 4), **kw)
    assert not ask().packed
    assert not ask(position_ids=torch.arange(4)[None]).packed
    assert not ask(position_ids=torch.arange(3, 7)[None]).packed
    packed = ask(position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
    assert packed.cu_seqlens.tolist() == [0, 2, 4, 8] and packed.longest == 4
    assert ask(position_ids=torch.zeros(3, 2, 4)) is None
    assert ask(attention_mask=torch.ones(2, 5)) is None
    assert not ask(attention_mask=torch.zeros(2, 4)).packed


def test_several_passes_before_the_backward_pass():
    "As DPO does: two forward passes, one backward; and gradients that add up."
    model, other = tiny_llama().train(), IDS.flip(1)
    def run():
        model.zero_grad()
        both = [model(input_ids=x, labels=x).loss for x in (IDS, other)]
        (both[0] - 2*both[1]).backward()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]
    expected = run()
    speed_up(model)
    for plan in ("none", Saving("most", host=True)):
        set_saving(model, plan)
        assert_close(run(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", ["model.embed_tokens", "layers.1.", "layers.1.mlp",
                                     "layers.0.self_attn", "layernorm", "layers.0.mlp.down"])
def test_parts_that_are_frozen(trained, layers_run):
    model = tiny_llama(num_hidden_layers=3)
    for name, p in model.named_parameters(): p.requires_grad_(trained in name)
    compare(model, layers_run, ("none", "most"))


def test_evaluation_keeps_nothing(layers_run):
    model = tiny_llama()
    expected = model(IDS).logits
    speed_up(model)
    with torch.no_grad():
        assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(layers_run) == 2
    assert_close(model(IDS).logits, expected, rtol=0, atol=0) # a cache: the ordinary way
    assert len(layers_run) == 2


@pytest.mark.parametrize("bits,defer", [(None, False), (None, True), (4, False)])
def test_training_goes_on_after_inference_mode(bits, defer):
    wanted = None
    for first in (False, True):
        SCRATCH.forget()
        model = tiny_llama()
        if bits: quantize_model(model, bits)
        with_lora(model)
        speed_up(model.train(), hold=True, defer=defer)
        if first:
            with torch.inference_mode(): assert model(IDS, use_cache=False).logits.isfinite().all()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        if first: assert_close(found, wanted)
        wanted = found


def test_generation_saving_and_copies(tmp_path):
    model = with_lora(tiny_llama())
    write = lambda: model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected, names = write(), list(model.state_dict())
    speed_up(model)
    step(model.train())
    assert torch.equal(model.eval() and write(), expected) and list(model.state_dict()) == names
    twin = copy.deepcopy(model).train()
    before = step(twin)[1]
    with torch.no_grad(): twin.model.layers[0].mlp.up_proj.A.zero_()
    assert step(twin)[1].keys() == before.keys()
    assert model.model.layers[0].mlp.up_proj.A.any() and is_fast(twin)
    unload_lora(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)


def test_changes_are_noticed(layers_run, said):
    model = tiny_llama().train()
    speed_up(model)
    step(model)
    with_lora(model)
    fast = step(model)
    assert all(n.endswith((".A", ".B")) for n in fast[1]) and len(fast[1]) == 28
    with lora_disabled(model), torch.no_grad(): off = model(input_ids=IDS, labels=IDS).loss
    model.model.layers[1].input_layernorm.weight.requires_grad_(True)
    assert len(step(model)[1]) == 29
    model.model.layers[0].mlp.up_proj.enabled = False # one of them only
    layers_run.clear()
    step(model)
    assert not layers_run and "switched off" in said[0]
    model.model.layers[0].mlp.up_proj.enabled = True
    unload_lora(model, merge=False)
    assert_close(step(model.requires_grad_(True))[0], off)
    assert len(layers_run) == 2
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    step(model)
    assert len(layers_run) == 2 and "hook" in said[1]
    hook.remove()
    step(model)
    assert len(layers_run) == 4


KINDS_OF_HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
                  "register_full_backward_pre_hook")


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm", "mlp.act_fn", "self_attn.q_proj"])
def test_hooks_are_called(layers_run, said, name):
    model, called = tiny_llama().train(), []
    speed_up(model)
    loss, grads = step(model)
    module = model.model.layers[1].get_submodule(name)
    first = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: called.append("first"))
    step(model)
    assert called.pop() == "first" and len(layers_run) == 2
    for kind in KINDS_OF_HOOKS:  # beside one that is there already, and alone
        hook = getattr(module, kind)(lambda *_: called.append(kind))
        again, same_grads = step(model)
        assert kind in called, kind
        assert_close(again, loss)
        for n in grads: assert_close(same_grads[n], grads[n], rtol=1e-4, atol=1e-5)
        if first: first.remove(); first = None
        called.clear(); layers_run.clear()
        step(model)
        assert kind in called and not layers_run
        hook.remove(); called.clear()
        step(model)
        assert not called and len(layers_run) == 2
    assert len(said) == 2 and all("has hooks" in s for s in said)


def test_hooks_that_only_listen_when_asked(layers_run):
    model = tiny_llama().train()
    speed_up(model)
    assert len(model(IDS, output_attentions=True, output_hidden_states=True).hidden_states) == 3
    assert any(m._forward_hooks for m in model.modules())
    layers_run.clear()
    step(model)
    assert len(layers_run) == 2


def test_hooks_on_what_is_called_as_ever(layers_run):
    "A layer itself."
    model, called = tiny_llama().train(), []
    speed_up(model)
    model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    step(model)
    assert called and len(layers_run) == 2


@pytest.mark.parametrize("hold", [True, False])
def test_another_alpha_is_noticed(hold):
    model = with_lora(tiny_llama())
    speed_up(model.train(), hold=hold)
    step(model)
    for m in model.modules():
        if hasattr(m, "start_A"): m.alpha *= 2
    found = step(model)
    slow_down(model)
    assert_close(found, step(model), rtol=1e-4, atol=1e-5)


def test_models_it_does_not_know(said):
    assert not speed_up(tiny("Olmo2")) and "olmo2" in said[0]
    model = tiny_llama(attention_dropout=.1)
    assert "dropout" in why_not(model) and not speed_up(model) and not is_fast(model)
    assert find_decoder(nn.Linear(1, 1)) is None and "Linear" in why_not(nn.Linear(1, 1))


def test_dora_is_left_alone(said):
    model = tiny_llama()
    add_lora(model, LoraConfig(r=2, dora=True))
    assert not speed_up(model) and len(said) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(dtype, layers_run):
    "In autocast, and with weights of that type: about as far from the exact ones as the model."
    exact = step(with_lora(tiny_llama()).train())
    model = with_lora(tiny_llama().to(dtype), dtype="fp32").train()
    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16): return step(model)
    def far(found):
        whole = lambda grads: torch.cat([g.float().flatten() for g in grads.values()])
        return ((whole(found[1]) - whole(exact[1])).norm()/whole(exact[1]).norm()).item()
    ordinary = far(run())
    speed_up(model, hold=True)
    for level in ("none", "most"):
        set_saving(model, level)
        assert far(run()) < max(1.5*ordinary, .01)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_with_kernels(family, layers_run):
    "On a GPU, or by Triton's interpreter: strided buffers suit every kernel."
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    model, ids = with_lora(tiny(family, **sizes)).to(dev).train(), IDS[:, :5].to(dev)
    expected = step(model, ids)
    speed_up(model, hold=True)
    for plan in (["none", "all", Saving("most", host=True, piece=3)] if dev == "cuda" else ["much", "all"]):
        set_saving(model, plan)
        with nullcontext() if dev == "cuda" else interpreted(): found = step(model, ids)
        near(found, expected, 1e-3 if dev == "cuda" else 3e-5)
    assert layers_run


@pytest.mark.parametrize("how", ["plain", "held", "four bits", "no A", "dropout", "pieces"])
def test_the_last_factor_on_the_way(how, monkeypatch):
    "Its gradient is the same whether h is read at once or by a product of its own."
    dev, calls = "cuda" if torch.cuda.is_available() else "cpu", []
    there = dev == "cpu" or torch.cuda.get_device_capability()[0] == 9  # of GPUs these alone take that way
    make = tiny("Llama", hidden_size=64, intermediate_size=96)
    if dev == "cuda": make.bfloat16()
    if how == "four bits": quantize_model(make)
    model = with_lora(make, dropout=.5*(how == "dropout")).to(dev).train()
    if how == "no A":
        for name, p in model.named_parameters():
            if name.endswith("down_proj.A"): p.requires_grad_(False)
    speed_up(model, hold=how == "held")
    set_saving(model, Saving("some", piece=4) if how == "pieces" else "all")
    inner = ftkit.decoder.glu_backward_factor
    monkeypatch.setattr(ftkit.decoder, "glu_backward_factor", lambda *a: calls.append(0) or inner(*a))
    with nullcontext() if dev == "cuda" else interpreted():
        torch.manual_seed(2)
        found = step(model, IDS.to(dev))
        ran = len(calls)
        monkeypatch.setattr(ftkit.decoder, "factor_at_once", lambda *a: False)
        torch.manual_seed(2)
        expected = step(model, IDS.to(dev))
    near(found, expected, 2e-2 if dev == "cuda" else 1e-5)
    least = len(model.model.layers) if there and how != "dropout" else 0
    assert ran >= least and len(calls) == ran and (how != "dropout" or not ran)


@pytest.mark.parametrize("hold", [False, True])
def test_eight_bits(hold, layers_run):
    "Near sixteen bits, and the same whatever is kept."
    model = with_lora(tiny("Llama", hidden_size=64, intermediate_size=96)).train()
    exact = step(model)
    assert speed_up(model, compute="fp8", hold=hold), why_not(model, "fp8")
    plans = [set_saving(model, plan) or step(model) for plan in ("none", "most", "norms", "all")]
    for plan in plans[1:]: near(plan, plans[0])
    assert_close(plans[0][0], exact[0], rtol=.01, atol=0)
    for n, g in exact[1].items(): assert (plans[0][1][n] - g).norm() < .3*g.norm(), n


def test_eight_bits_notice_what_changes_before_generating(layers_run):
    model = with_lora(tiny("Llama", hidden_size=64, intermediate_size=96)).train()
    speed_up(model, compute="fp8", hold=True)
    assert step(model)[1]
    unload_lora(model, merge=False)
    model.model.norm.weight.requires_grad_(True)
    model.eval().generate(IDS, max_new_tokens=2, do_sample=False)
    layers_run.clear()
    found, count = step(model.train()), len(layers_run)
    assert list(found[1]) == ["model.norm.weight"] and count == 2
    slow_down(model)
    assert_close(found[0], step(model)[0], rtol=.01, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 1 or torch.cuda.get_device_capability() < (8, 9),
                    reason="needs a GPU with eight bits")
@pytest.mark.parametrize("merge", [merge_lora, unload_lora])
def test_weights_that_wait_are_merged(merge):
    model = with_lora(tiny("Llama", hidden_size=64, intermediate_size=96)).cuda().train()
    speed_up(model, compute="fp8")
    step(model, IDS.cuda())
    wanted = model.model.layers[0].mlp.up_proj.delta()
    wanted = wanted + model.model.layers[0].mlp.up_proj.base.weight.cuda()
    merge(model.eval())
    assert_close(model.model.layers[0].mlp.up_proj.weight, wanted)
    assert model(IDS.cuda(), use_cache=False).logits.isfinite().all()


def test_backward_can_run_once():
    model = tiny_llama().train()
    speed_up(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(FtkitError, match="has run already"): loss.backward()


def test_host_memory_is_used_again():
    away = Away("cpu")
    tickets = [away.put(torch.full((3,), float(i))) for i in range(4)]
    assert [t.fetch()[0][0].item() for t in reversed(tickets)] == [3, 2, 1, 0]
    kept = away.put(torch.ones(3))
    assert sum(map(len, away.free.values())) == 3
    del tickets, kept


def test_what_waits_on_the_host(monkeypatch):
    "All that the level keeps but for gate and up, one layer fetched ahead, memory used again."
    model = with_lora(tiny_llama(num_hidden_layers=4)).train()
    expected, many, put = step(model), [], Away.put
    def counted(self, *tensors): many.append(sum(t is not None for t in tensors)); return put(self, *tensors)
    monkeypatch.setattr(Away, "put", counted)
    speed_up(model)
    for level, n in dict(none=4, some=4, much=2, most=1).items():
        set_saving(model, Saving(level, host=True))
        many.clear()
        near(step(model), expected)
        assert many == [n]*4
    away = model.model.__dict__["_fast"].away
    free = [len(v) for v in away.free.values()]
    step(model)
    assert [len(v) for v in away.free.values()] == free and not away.leaving


def test_gradients_find_room(monkeypatch):
    "From layer to layer without a copy; a gradient that somebody looks at or changes stays whole."
    model = with_lora(tiny_llama(num_hidden_layers=4)).train()
    expected, found, real = step(model), [], ftkit.decoder._found
    def counted(dy): found.append(real(dy) is not None); return real(dy)
    monkeypatch.setattr(ftkit.decoder, "_found", counted)
    speed_up(model)
    near(step(model), expected)
    assert found == [False, True, True, True]
    for change in (lambda g: seen.append((g, g.clone())), lambda g: seen.append((g, g.clone())) or g*1.,
                   lambda g: seen.append((g, g.clone())) or g + g.new_zeros(())):
        seen = []
        def watch(module, args, out): out.register_hook(change)
        hooks = [layer.register_forward_hook(watch) for layer in model.model.layers]
        near(step(model), expected)
        assert len(seen) == 4 and all(torch.equal(a, b) for a, b in seen)
        for h in hooks: h.remove()


def test_scratch_is_given_back():
    model = with_lora(quantize_model(tiny_llama())).train()
    speed_up(model)
    step(model)
    assert SCRATCH.memory and SCRATCH.views
    slow_down(model)
    assert not SCRATCH.memory and not SCRATCH.views


def test_embedding_on_the_host(layers_run):
    for family in ("Llama", "Gemma"):
        layers_run.clear()
        model = with_lora(tiny(family, tie_word_embeddings=False)).train()
        expected = step(model)
        keep_on_host(model)
        assert "model.embed_tokens.weight" in model.state_dict()
        near(step(model), expected)
        compare(model, layers_run, ("some",))
    with pytest.raises(FtkitError, match="trained"): keep_on_host(tiny_llama())
    with pytest.raises(FtkitError, match="same tensor"):
        keep_on_host(tiny_llama(tie_word_embeddings=True).requires_grad_(False))


def test_copies_of_what_is_on_the_host():
    cuda = torch.cuda.is_available()
    away = Away("cuda" if cuda else "cpu")
    away.put(torch.ones(3, device=away.device)).fetch()
    twin = copy.deepcopy(away)
    assert away.free and not twin.free and (twin.device, twin.in_flight) == (away.device, 1)
    model = with_lora(tiny("Llama", tie_word_embeddings=False)).train()
    keep_on_host(model)
    table = copy.deepcopy(model).get_input_embeddings().weight
    assert table.is_pinned() == cuda and table.data_ptr() != model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("name", ["internlm2", "internlm2_bias", "llama3", "qwen2", "qwen", "gemma",
                                  "minicpm", "chatglm3", "phi3", "mixtral", "baichuan2_7b",
                                  "deepseek_v2"])
def test_models_as_they_are_loaded(name, layers_run):
    if not (GOLDEN/name).exists(): pytest.skip("the golden checkpoints are not here")
    model = load_model(GOLDEN/name, dtype="fp32")
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(6))
    compare(with_lora(model), layers_run, ("none", "most"), tolerance=1e-4, ids=ids)


@pytest.mark.parametrize("compute", ["auto", "fp8"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Granite"])
def test_what_is_kept_beyond_products_changes_no_bit(family, compute):
    "What is kept is what would be computed again."
    how = dict(hidden_size=64, intermediate_size=96)
    model = with_lora(tiny(family, **how), dropout=.2, targets=["q_proj", "up_proj", "down_proj"]).train()
    assert speed_up(model, compute=compute, hold=True), why_not(model, compute)
    def run(plan):
        set_saving(model, plan)
        torch.manual_seed(3)
        return step(model)
    expected = run("none")
    for plan in "norms", "all":
        loss, grads = run(plan)
        assert torch.equal(loss, expected[0])
        near((loss, grads), expected, 1e-6)  # the way back has a formula of its own for the product
        if plan == "norms": assert all(torch.equal(g, expected[1][n]) for n, g in grads.items())
