"Products by expert, routing, experts, attention from a latent: like formulas and transformers."
import os
import torch

if not torch.cuda.is_available(): os.environ["TRITON_INTERPRET"] = "1"
from contextlib import nullcontext
from copy import deepcopy
import pytest
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
import ftkit.experts as experts_module
from ftkit.experts import (FastExperts, experts_forward, slow_down_experts, speed_up_experts,
                           why_not_experts)
from ftkit.kernels.attention import Rows
from ftkit.kernels.glu import glu_forward
from ftkit.kernels.grouped import GroupedLinear, drop_mask, grouped_matmul, grouped_outer, new_seed
from ftkit.kernels.launch import interpreted
from ftkit.kernels.routing import combine, gate_backward, route
from ftkit.latent import join_heads, latent_attention, why_not_latent
from ftkit.lora.experts import LoraExperts
from ftkit.lora.inject import LoraConfig, add_lora, merge_lora, lora_disabled, unload_lora
from ftkit.quant.linear import QExperts, quantize_model
from toys import IDS, SIZES

dev = "cuda" if torch.cuda.is_available() else "cpu"
kernels = lambda: nullcontext() if dev == "cuda" else interpreted()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
gen = lambda seed=0: torch.Generator().manual_seed(seed)
TYPES = [torch.float32, torch.float16, torch.bfloat16] # in bfloat16 without a GPU: the formula
TOL = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KINDS = {
    "mixtral": dict(num_local_experts=4),
    "qwen2_moe": dict(moe_intermediate_size=32, num_experts=5, shared_expert_intermediate_size=48,
                      num_experts_per_tok=3, norm_topk_prob=True),
    "qwen3_moe": dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16),
    "deepseek_v2": dict(
        num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3,
        n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_group=4, topk_group=2,
        routed_scaling_factor=2., topk_method="group_limited_greedy")}


def split(counts):
    return torch.tensor([0, *counts]).cumsum(0).int().to(dev)


def rand(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=gen(seed)).to(dev, dtype)


def close(a, b, dtype):
    size = b.abs().max().clamp(min=1e-6)
    assert_close(a.double()/size, b.double()/size, rtol=0, atol=TOL[dtype])


# ---- grouped products

SPLITS = [[0, 0, 5], [17, 0, 1, 33], [64], [1]*20, [0, 0], [3, 70, 0]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("counts", SPLITS)
@pytest.mark.parametrize("transposed", [False, True])
def test_product(counts, transposed, dtype):
    E, M, N, K = len(counts), sum(counts), 37, 75
    x = rand(M, 2*K, dtype=dtype)[:, :K] # rows further apart than they are wide
    w = rand(E, *((K, N) if transposed else (N, K)), dtype=dtype, seed=1)
    w = w.transpose(1, 2) if transposed else w
    with kernels(): y = grouped_matmul(x, w, split(counts))
    e = torch.repeat_interleave(torch.arange(E), torch.tensor(counts)).to(dev)
    if not M: assert y.shape == (0, N); return
    close(y, torch.einsum("mk,mnk->mn", x.double(), w.double()[e]), dtype)


@pytest.mark.parametrize("p", [0., 0.3])
def test_product_with_all(p):
    counts, E, M, N, K, R = [9, 0, 30], 3, 39, 70, 33, 18
    x, w = rand(12, K), rand(E, N, K, seed=1)
    small, B = rand(M, R, seed=2), rand(E, N, R, seed=3)
    rows = torch.randint(12, (M,), generator=gen()).int().to(dev)
    drop = (torch.tensor([7], device=dev), p) if p else None
    out = torch.zeros(M + 1, N, device=dev)
    with kernels():
        y = grouped_matmul(x, w, split(counts), rows, (small, B), out[:M], 0.5, drop)
        mask = drop_mask(*drop, (M, N)).double() if p else 1.
        dropped = grouped_matmul(x, w, split(counts), rows, drop=drop)
        inputs = drop_mask(*drop, (M, K)).double() if p else 1.
    e, taken = torch.tensor([0]*9 + [2]*30).to(dev), x[rows.long()].double()
    main = lambda t: torch.einsum("mk,mnk->mn", t, w.double()[e])
    wanted = main(taken) + mask*torch.einsum("mr,mnr->mn", small.double(), B.double()[e])
    close(y, wanted/2, torch.float32)
    close(dropped, main(taken*inputs), torch.float32)
    assert not out[M].any()


def test_a_part_of_the_experts_and_rows_of_none():
    x, w, offsets = rand(10, 8), rand(4, 6, 8, seed=1), split([2, 3, 1, 2]) # two rows of no expert
    out = torch.full((10, 6), 9., device=dev)
    with kernels():
        grouped_matmul(x, w[1:3], offsets[1:4], out=out)
        whole = grouped_matmul(x, w, offsets)
    assert_close(out[2:6], whole[2:6])
    assert (out[:2] == 9).all() and (out[6:] == 9).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("counts", SPLITS)
def test_outer(counts, dtype):
    E, M, P, Q = len(counts), sum(counts), 5, 70
    a, b = rand(M, 2*P, dtype=dtype)[:, P:], rand(30, Q, dtype=dtype, seed=1)
    rows = torch.randint(30, (M,), generator=gen()).int().to(dev)
    seed = torch.tensor([5], device=dev)
    with kernels():
        plain = grouped_outer(a, b, split(counts), None, rows)
        dropped = grouped_outer(a, b, split(counts), None, rows, drop=(seed, 0.25))
        mask = drop_mask(seed, 0.25, (M, Q)).double() if M else 1.
    b = b[rows.long()].double()
    wanted = lambda b: torch.stack([s.T @ t for s, t in zip(a.double().split(counts),
                                                            b.split(counts))])
    close(plain, wanted(b), dtype)
    close(dropped, wanted(b*mask), dtype)
    assert plain.shape == (E, P, Q)


def test_grouped_linear():
    x, w, offsets = rand(9, 6).double(), rand(3, 4, 6, seed=1).double(), split([2, 0, 7])
    inputs = [t.requires_grad_() for t in (x, w)]
    assert torch.autograd.gradcheck(lambda x, w: GroupedLinear.apply(x, w, offsets), inputs)


def test_dropout_share_and_scale():
    with kernels(): a, b = (drop_mask(new_seed(dev), 0.1, (90, 100)) for _ in range(2))
    assert not torch.equal(a, b)
    assert abs((a == 0).float().mean() - 0.1) < 0.02 and abs(a.max() - 1/0.9) < 1e-6


@pytest.mark.parametrize("bad", [
    lambda x, w, o: grouped_matmul(x, w, o.long()), lambda x, w, o: grouped_matmul(x, w, o[1:]),
    lambda x, w, o: grouped_matmul(x[:, :3], w, o), lambda x, w, o: grouped_matmul(x.half(), w, o),
    lambda x, w, o: grouped_matmul(x, w, o, rows=torch.arange(4)),
    lambda x, w, o: grouped_matmul(x, w, o, extra=(x[:2, :1], w[:, :, :1])),
    lambda x, w, o: grouped_outer(x, x[:2], o), lambda x, w, o: route(torch.zeros(3).long(), 4),
    lambda x, w, o: gate_backward(x[:, :3], x, x[:, :1], route(x[:, :1].long()*0, 1), "relu")])
def test_refusals(bad):
    with pytest.raises(ValueError): bad(rand(4, 6), rand(2, 5, 6), split([1, 3]))


# ---- routing

@pytest.mark.parametrize("T,k,E", [(1, 1, 1), (13, 2, 4), (40, 6, 160), (7, 3, 3)])
def test_route_and_combine(T, k, E):
    index = torch.randint(E + 1, (T, k), generator=gen()).to(dev) # the last means none
    to, y, w = route(index, E), rand(T*k, 50), torch.rand(T, k, generator=gen()).to(dev)
    number = index.flatten()[to.order]
    assert (number.diff() >= 0).all() and torch.equal(to.rows, (to.order//k).int())
    assert torch.equal(to.offsets[1:].diff(), torch.stack([(index == e).sum().int()
                                                           for e in range(1, E)])) if E > 1 else 1
    y[int(to.offsets[-1]):] = torch.nan # never written by the products
    with kernels(): out, bare = combine(y, to, w), combine(y, to)
    answers = y[to.places.long()].double().nan_to_num(0)
    assert_close(out.double(), (answers*w[..., None]).sum(1), rtol=1e-5, atol=1e-5)
    assert_close(bare.double(), answers.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [10, 1500])
def test_gate(act, dtype, width):
    to = route(torch.tensor([[1, 0], [0, 2], [2, 1]]).to(dev), 3)
    x, dh, p = rand(6, 2*width, dtype=dtype), rand(6, width, dtype=dtype, seed=1), rand(3, 2).abs()
    x64, p64 = x.double().requires_grad_(), p.double().requires_grad_()
    a, u = x64.chunk(2, -1)
    h64 = dict(silu=nn.functional.silu, gelu=nn.functional.gelu,
               gelu_tanh=lambda t: nn.functional.gelu(t, approximate="tanh"))[act](a)*u
    (h64*dh.double()*p64.flatten()[to.order][:, None]).sum().backward()
    with kernels():
        first = glu_forward(x, act)
        none, _ = gate_backward(dh, x.clone(), p, to, act, keep=False)
        h, dp = gate_backward(dh, x, p, to, act)
    assert none is None
    for ours, wanted in (first, h64), (h, h64), (x, x64.grad), (dp, p64.grad):
        close(ours, wanted.detach(), dtype)


# ---- experts in models

def mixture(kind, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind]))
    for n, p in model.named_parameters(): # so that the router decides, and experts count
        if "gate.weight" in n or "experts" in n: nn.init.normal_(p, std=0.1, generator=gen(1))
    return model.to(dev, dtype).train()


def stirred(model):
    for n, p in model.named_parameters():
        if p.requires_grad and ".B" in n: p.data.copy_(rand(*p.shape, seed=2)/10)
    return model


def grads(model, ids):
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def variants(kind, how):
    model = mixture(kind)
    if how == "full": return model
    if "nf4" in how: quantize_model(model, block=32, double="double" in how)
    if how.startswith("nf4 only"): return model
    dropout = 0.2 if "dropout" in how else 0.
    targets = ["q_proj", "gate_up_proj"] if "one" in how else ["gate_up_proj", "down_proj"]
    return stirred(add_lora(model, LoraConfig(r=4, alpha=8, dropout=dropout, targets=targets)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["full", "lora", "lora one", "nf4 lora", "nf4 lora double"])
def test_like_transformers(kind, how, monkeypatch):
    model, ids = variants(kind, how).to(dev), IDS.to(dev)
    wanted, old = grads(model, ids)
    for recompute in False, True:
        done, reasons = speed_up_experts(model, recompute)
        assert done == (1 if kind == "deepseek_v2" else 2) and not reasons
        if recompute: monkeypatch.setattr(experts_module, "PIECE", 1) # one expert at a time
        ours, new = grads(model, ids)
        assert_close(ours.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        assert old.keys() == new.keys() and any("experts" in n for n in new)
        for n in old: assert_close(new[n], old[n], rtol=1e-3, atol=1e-5*(1 + old[n].abs().max()))
    slow_down_experts(model)
    assert not any(isinstance(m, FastExperts) for m in model.modules())
    assert torch.equal(grads(model, ids)[0].logits, wanted.logits)


def test_gradients_of_frozen_experts_reach_the_router():
    model, ids = mixture("mixtral"), IDS.to(dev)
    for m in model.modules():
        if type(m).__name__ == "MixtralExperts": m.requires_grad_(False)
    _, old = grads(model, ids)
    speed_up_experts(model)
    _, new = grads(model, ids)
    assert old.keys() == new.keys() and any("gate.weight" in n for n in new)
    for n in old: assert_close(new[n], old[n], rtol=1e-3, atol=1e-5)


def test_kernels_give_the_same():
    model = variants("mixtral", "lora").model.layers[0].mlp.experts
    x, w = rand(9, 64).requires_grad_(), torch.rand(9, 2, generator=gen()).to(dev).requires_grad_()
    index = torch.rand(9, 4, generator=gen()).topk(2)[1].to(dev)
    wants = [x, w, *model.A.values(), *model.B.values()]
    plain = model(x, index, w)
    old = torch.autograd.grad(plain.square().sum(), wants)
    with kernels():
        ours = experts_forward(model, x, index, w)
        new = torch.autograd.grad(ours.square().sum(), wants)
    assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(new, old): assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("run", [nullcontext, kernels])
def test_dropout(run, monkeypatch):
    "The gradients are those of what was computed: the same masks both ways, for A's input alone."
    m = LoraExperts(mixture("mixtral").model.layers[0].mlp.experts,
                    {"gate_up_proj": (3, 6), "down_proj": (2, 4)}, dropout=0.3)
    stirred(m)
    seed = torch.tensor([11], device=dev)
    monkeypatch.setattr(experts_module, "new_seed", lambda device: seed)
    index = torch.rand(6, 4, generator=gen()).topk(2)[1].to(dev)
    x, w = rand(6, 64).requires_grad_(), torch.rand(6, 2, generator=gen()).to(dev).requires_grad_()
    wants = dict(x=x, w=w, **{n: p for n, p in m.named_parameters() if p.requires_grad})
    to = route(index, 4)
    with run():
        ours = experts_forward(m, x, index, w)
        new = torch.autograd.grad(ours.square().sum(), wants.values())
        masks = [drop_mask(seed, 0.3, (12, n)) for n in (64, 96)]
    def layer(name, v, mask, e):
        linear = lambda v, s: torch.einsum("mk,mnk->mn", v, s[e])
        return linear(v, getattr(m.base, name)) + 2*linear(linear(v*mask, m.A[name]), m.B[name])
    e = index.flatten()[to.order]
    g, u = layer("gate_up_proj", x[to.rows.long()], masks[0], e).chunk(2, -1)
    y = layer("down_proj", nn.functional.silu(g)*u, masks[1], e)
    wanted = (y[to.places.long()]*w[..., None]).sum(1)
    assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    old = torch.autograd.grad(wanted.square().sum(), wants.values())
    for n, a, b in zip(wants, new, old): assert_close(a, b, rtol=1e-3, atol=1e-4)
    free = experts_forward(m.eval(), x, index, w)
    assert_close(free, m(x, index, w), rtol=1e-4, atol=1e-5)


def test_autocast():
    model, ids = variants("mixtral", "nf4 lora"), IDS.to(dev)
    with torch.autocast(dev, torch.bfloat16):
        wanted, old = grads(model, ids)
        speed_up_experts(model)
        ours, new = grads(model, ids)
    assert ours.logits.dtype == wanted.logits.dtype
    assert_close(ours.loss, wanted.loss, rtol=1e-2, atol=0)
    for n in old:
        assert new[n].dtype == old[n].dtype
        assert (new[n] - old[n]).norm() < 0.1*old[n].norm(), n


def test_adapters_come_and_go():
    model, ids = variants("mixtral", "lora"), IDS.to(dev)
    base = mixture("mixtral")(ids).logits
    speed_up_experts(model)
    fast = model(ids).logits
    with lora_disabled(model): assert_close(model(ids).logits, base, rtol=1e-4, atol=1e-5)
    merge_lora(model.eval())
    assert_close(model(ids).logits, fast, rtol=1e-4, atol=1e-5)
    assert_close(model.train()(ids).logits, fast, rtol=1e-4, atol=1e-5)
    plain = unload_lora(model)
    assert_close(plain(ids).logits, fast, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, (LoraExperts, FastExperts)) for m in plain.modules())


def test_nf4_and_back():
    model, ids = variants("qwen2_moe", "nf4 only"), IDS.to(dev)
    names = list(model.state_dict())
    with torch.no_grad():
        wanted = model(ids).logits
        speed_up_experts(model)
        assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        copy = deepcopy(model)
        many = torch.randint(128, (2, 40), generator=gen()).to(dev) # enough rows for the fast path
        assert_close(copy(many).logits, slow_down_experts(model)(many).logits, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == list(copy.state_dict()) == names
    m = next(m for m in copy.modules() if isinstance(m, QExperts))
    assert not isinstance(m.to_experts(), FastExperts)


def test_generation_goes_the_ordinary_way(monkeypatch):
    model = mixture("mixtral").eval()
    wanted = model.generate(IDS.to(dev), max_new_tokens=3, do_sample=False)
    speed_up_experts(model)
    monkeypatch.setattr(experts_module, "experts_forward", None)
    assert torch.equal(model.generate(IDS.to(dev), max_new_tokens=3, do_sample=False), wanted)


def test_checkpointing():
    model, ids = variants("mixtral", "lora"), IDS.to(dev)
    _, old = grads(model, ids)
    speed_up_experts(model)
    for reentrant in True, False:
        model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        model.enable_input_require_grads()
        _, new = grads(model, ids)
        for n in old: assert_close(new[n], old[n], rtol=1e-3, atol=1e-5)


def test_others_stay_and_say_why():
    config = AutoConfig.for_model("gpt_oss", **SIZES, num_local_experts=4, num_experts_per_tok=2,
                                  head_dim=16, layer_types=["full_attention"]*2)
    model = AutoModelForCausalLM.from_config(config)
    done, reasons = speed_up_experts(model)
    assert done == 0 and reasons == ["its experts have biases"]
    m = mixture("mixtral").model.layers[0].mlp.experts
    m.act_fn = nn.ReLU()
    assert "ReLU" in why_not_experts(m)


# ---- attention from a latent

def latent_model(**kwargs):
    sizes = SIZES | KINDS["deepseek_v2"] | kwargs
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v2", **sizes)).to(dev)


@pytest.mark.parametrize("kwargs", [{}, dict(q_lora_rank=24), dict(v_head_dim=12), dict(
    rope_scaling=dict(rope_type="yarn", factor=4., mscale=0.7, mscale_all_dim=0.7,
                      original_max_position_embeddings=32))])
@pytest.mark.parametrize("how", ["plain", "nf4 lora"])
def test_latent_like_transformers(kwargs, how):
    model = latent_model(**kwargs)
    if how != "plain":
        quantize_model(model, block=32)
        names = [n for n, m in model.named_modules() if "self_attn" in n and hasattr(m, "weight")
                 and "norm" not in n]
        stirred(add_lora(model, LoraConfig(r=4, targets=[n.split(".")[-1] for n in names]))).to(dev)
    module = model.model.layers[0].self_attn
    x = rand(2, 9, 64).requires_grad_()
    table = model.model.rotary_emb(x, torch.arange(9, device=dev)[None])
    wants = [x, *(p for p in module.parameters() if p.requires_grad)]
    wanted, _ = module(x, position_embeddings=table, attention_mask=None)
    old = torch.autograd.grad(wanted.square().sum(), wants)
    ours = latent_attention(module, x.flatten(0, 1), table, Rows(2, 9)).view_as(x)
    new = torch.autograd.grad(ours.square().sum(), wants)
    assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(new, old): assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", [(3, 6, 4, 8), (2, 5, 2, 16), (17, 128, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_join(sizes, dtype):
    heads, nope, rope, value = sizes
    T, positions = 6, 3
    xs = [rand(T, n + 4, dtype=dtype, seed=n)[:, :n] for n in
          (heads*(nope + rope), heads*(nope + value), rope)]
    angles = rand(positions, rope//2)
    table = torch.polar(torch.ones_like(angles), angles)
    ups = [rand(T, heads, max(nope + rope, value), dtype=dtype, seed=i) for i in range(3)]
    def run(xs, table, ups):
        xs = [x.detach().requires_grad_() for x in xs]
        outs = join_heads(*xs, table, sizes)
        return [*outs, *torch.autograd.grad(outs, xs, ups)]
    wanted = run([x.double() for x in xs], table, [u.double() for u in ups])
    with kernels(): ours = run(xs, table, ups)
    for a, b in zip(ours, wanted): close(a.detach(), b.detach(), dtype)


def test_latent_refusals():
    assert why_not_latent(nn.Linear(2, 2))
    module = latent_model().train().model.layers[0].self_attn
    module.attention_dropout = 0.1
    assert "drops" in why_not_latent(module) and why_not_latent(module.eval()) is None
    with pytest.raises(ValueError, match="widths"):
        join_heads(rand(2, 5), rand(2, 4), rand(2, 2), torch.ones(2, 1).cfloat(), (1, 2, 2, 2))
    with pytest.raises(ValueError, match="table"):
        join_heads(rand(2, 4), rand(2, 4), rand(2, 2), torch.ones(2, 1), (1, 2, 2, 2))
