"The loss without its logits: against float64, in every type and shape, for every class of the table, in a training step."
import os
from contextlib import nullcontext
import pytest
import torch
if not torch.cuda.is_available(): os.environ["TRITON_INTERPRET"] = "1"
import torch.nn.functional as F
import transformers
from torch import nn
from torch.testing import assert_close
from ftkit.kernels.launch import interpreted
from ftkit.kernels.loss import (IGNORE, LAST_STEPS, head_input, linear_cross_entropy, linear_log_probs, piece_rows,
                                plain_head, score_)
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.models.load import load_model
from ftkit.quant.linear import QLinear
from ftkit.sft import SupervisedTuning
from toys import IDS, SIZES, tiny_llama

dev = "cuda" if torch.cuda.is_available() else "cpu"
HOWS = {}, dict(scale=0.125), dict(softcap=1.5), dict(scale=2., softcap=3.), dict(counts=True), dict(bias=True, counts=True)
# error allowed: of the loss, and of gradients as part of their length
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (1e-3, 2e-3)}


def kernels(): return nullcontext() if dev == "cuda" else interpreted()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dev, dtype)


def problem(rows, vocab, dim=24, dtype=torch.float32, bias=False, counts=False, ignored=True):
    out = dict(hidden=draw(rows, dim, seed=rows, dtype=dtype), weight=draw(vocab, dim, seed=vocab, dtype=dtype)*0.3)
    out["targets"] = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(3)).to(dev)
    if ignored: out["targets"][::5] = IGNORE
    if bias: out["bias"] = draw(vocab, seed=4, dtype=dtype)
    if counts: out["counts"] = draw(rows, seed=5).abs()
    return out


def exact(hidden, weight, targets, bias=None, counts=None, scale=1., softcap=None, rounded=None):
    "In float64; the logits rounded to the type that they are held in."
    z = hidden.double() @ weight.double().T
    if bias is not None: z = z + bias.double()
    if rounded: z = z + (z.to(rounded).double() - z).detach()
    z = z*scale
    if softcap: z = softcap*torch.tanh(z/softcap)
    losses = F.cross_entropy(z, targets, reduction="none", ignore_index=IGNORE)
    right = ((z.argmax(-1) == targets)*(1 if counts is None else counts)).sum()
    return (losses if counts is None else losses*counts).sum(), right


def with_gradients(function, given, factor, **how):
    learn = {k: given[k].detach().clone().requires_grad_() for k in ("hidden", "weight", "bias") if k in given}
    loss,right = function(**{**given, **learn}, **how)
    (loss*factor).backward()
    return loss.detach(), right, {k: t.grad for k,t in learn.items()}


def near(ours, wanted, tolerance):
    for k,g in ours.items():
        assert g.dtype != torch.float64 and (g.double() - wanted[k]).norm() <= tolerance*wanted[k].norm(), k


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("formula", [True, False])
def test_against_float64(dtype, how, formula):
    if formula and dev == "cuda": pytest.skip("the kernel runs there")
    how,loss_tol,grad_tol = dict(how), *TOLERANCE[dtype]
    given = dict(bias=how.pop("bias", False), counts=how.pop("counts", False))
    shapes = (13, 97, 5), (1, 1, None), (4, 8200, None), (129, 33, 128)
    for rows,vocab,piece in shapes[:2 if how and not formula and dev == "cpu" else 4]:
        p = problem(rows, vocab, dtype=dtype, **given)
        double = {k: t.double() if t.is_floating_point() else t for k,t in p.items()}
        wanted = with_gradients(exact, double, 0.3, **how, rounded=dtype)
        with nullcontext() if formula else kernels():
            ours = with_gradients(linear_cross_entropy, p, 0.3, **how, piece=piece)
        assert ours[0].dtype == torch.float32 and ours[0].shape == ours[1].shape == ()
        assert_close(ours[0].double(), wanted[0], atol=loss_tol, rtol=loss_tol)
        if dtype == torch.float32: assert_close(ours[1].double(), wanted[1].double(), atol=1e-5, rtol=1e-5)
        near(ours[2], wanted[2], grad_tol + 1e-9) if vocab > 1 else None


@pytest.mark.parametrize("vocab", [32001, 50257, 151936])
def test_wide_vocabularies(vocab):
    p = problem(3, vocab, dim=8, ignored=False)
    with kernels(): ours = with_gradients(linear_cross_entropy, p, 1.)
    wanted = with_gradients(exact, {k: t.double() if t.is_floating_point() else t for k,t in p.items()}, 1.)
    assert_close(ours[0].double(), wanted[0], atol=1e-5, rtol=1e-5)
    near(ours[2], wanted[2], 1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_log_probs(frozen):
    p,factors = problem(11, 50, bias=True), draw(11, seed=9)
    for how in {}, dict(scale=0.5, softcap=2.):
        def run(function, double):
            given = {k: t.double() if double and t.is_floating_point() else t for k,t in p.items()}
            learn = ["hidden"] if frozen else ["hidden", "weight", "bias"]
            given |= {k: given[k].clone().requires_grad_() for k in learn}
            out = function(**given, **how)
            (out*factors).sum().backward()
            return out.detach(), {k: given[k].grad for k in learn}
        def long(hidden, weight, targets, bias, scale=1., softcap=None):
            z = (hidden @ weight.T + bias)*scale
            if softcap: z = softcap*torch.tanh(z/softcap)
            return -F.cross_entropy(z, targets, reduction="none", ignore_index=IGNORE)
        wanted = run(long, True)
        with kernels(): ours = run(lambda **kw: linear_log_probs(**kw, piece=4), False)
        assert ours[0].dtype == torch.float32
        assert_close(ours[0].double(), wanted[0], atol=1e-5, rtol=1e-5)
        near(ours[1], wanted[1], 1e-5)


def test_strided_rows_and_ties():
    "Rows of a wider buffer; and of tokens with equal scores the first one is the guess, as for argmax."
    wide = draw(9, 40)
    p = problem(9, 30, dim=24, ignored=False)
    a = linear_cross_entropy(**{**p, "hidden": wide[:,:24]})
    assert_close(a, linear_cross_entropy(**{**p, "hidden": wide[:,:24].contiguous()}))
    for vocab, places in (7, range(7)), (9000, (17, 8200)): # the latter in several blocks
        z = draw(64, vocab).round().bfloat16() # many ties
        if vocab > 8200: z[32:, 17] = z[32:, 8200] = z[48:, 4113] = 99
        t = torch.tensor([places[i % len(places)] for i in range(64)], device=dev)
        for context in nullcontext, kernels:
            losses,hits = torch.empty(2, 64, device=dev)
            with context(): score_(z.clone(), t, losses, hits, grad=False)
            first = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
            assert torch.equal(hits.bool(), first == t) and hits.any()


def test_only_what_is_asked_for():
    p = problem(6, 20)
    frozen = linear_cross_entropy(**p)
    assert not frozen[0].requires_grad
    w = p["weight"].clone().requires_grad_()
    linear_cross_entropy(p["hidden"], w, p["targets"])[0].backward()
    h,w2 = p["hidden"].clone().requires_grad_(), p["weight"].clone().requires_grad_()
    both = linear_cross_entropy(h, w2, p["targets"])
    both[0].backward()
    assert_close(w.grad, w2.grad)
    with torch.no_grad(): assert_close(linear_cross_entropy(h, w2, p["targets"]), frozen)
    assert not both[1].requires_grad


def test_no_rows():
    w,b = draw(20, 8).requires_grad_(), draw(20).requires_grad_()
    h = draw(0, 8).requires_grad_()
    none = torch.empty(0, dtype=torch.long, device=dev)
    with kernels():
        loss,right = linear_cross_entropy(h, w, none, b)
        loss.backward()
    assert loss == right == 0 and not w.grad.any() and not b.grad.any() and h.grad.shape == (0, 8)
    assert linear_log_probs(h, w, none).shape == (0,)
    everything_ignored = torch.full((3,), IGNORE, device=dev)
    h = draw(3, 8).requires_grad_()
    with kernels(): loss,right = linear_cross_entropy(h, w, everything_ignored)
    loss.backward()
    assert loss == right == 0 and not h.grad.any()


def test_bad_input():
    p = problem(6, 20, ignored=False)
    for change,text in ((dict(hidden=draw(6, 5)), "hidden has shape"), (dict(targets=p["targets"][:5]), "targets has shape"),
                        (dict(bias=draw(3)), "bias has shape"), (dict(counts=draw(5)), "counts has shape"),
                        (dict(targets=p["targets"].int()), "not int64")):
        with pytest.raises(ValueError, match=text): linear_cross_entropy(**{**p, **change})
    for bad in 20, -1, 2**32 + 5: # the last one's lower half would be a token
        t = p["targets"].clone()
        t[2] = bad
        cpu = {k: v.cpu() for k,v in p.items()} | {"targets": t.cpu()}
        with pytest.raises(ValueError, match="the head has 20 tokens"): linear_cross_entropy(**cpu)
        losses,hits = torch.empty(2, 6, device=dev)
        with kernels(): score_(draw(6, 20), t, losses, hits) # no look at the targets, and no crash
        assert losses.isnan().tolist() == [i == 2 for i in range(6)] and hits[2] == 0


def test_a_row_without_target_is_not_looked_at():
    z,t = draw(3, 40), torch.tensor([1, IGNORE, 2], device=dev)
    z[1] = float("nan")
    for context in nullcontext, kernels:
        grad,(losses,hits) = z.clone(), torch.empty(2, 3, device=dev)
        with context(): score_(grad, t, losses, hits)
        assert not grad[1].any() and losses[1] == hits[1] == 0 and losses.isfinite().all() and grad[::2].all()


def test_a_logit_that_is_no_number_shows():
    for bad in float("nan"), float("inf"):
        z = draw(3, 40)
        z[1, 7] = bad
        losses,hits = torch.empty(2, 3, device=dev)
        with kernels(): score_(z, torch.tensor([1, 2, IGNORE], device=dev), losses, hits)
        assert losses.isfinite().tolist() == [True, False, True]


def test_pieces():
    for rows,vocab,piece in (1, 128256, None), (8192, 128256, None), (5000, 256000, None), (77, 10, 10), (1000, 10, 300):
        n = piece_rows(rows, vocab, 2, piece)
        assert 1 <= n <= (piece or max(1, 2**28//(2*vocab)))
    assert piece_rows(8192, 128256) == 1024


def test_autocast():
    "Weights in float32, computed in half: as torch's linear does, with a gradient in float32."
    p = problem(40, 300)
    for dtype in (torch.bfloat16, torch.float16) if dev == "cuda" else (torch.bfloat16,):
        def run(function):
            h,w = p["hidden"].clone().requires_grad_(), p["weight"].clone().requires_grad_()
            with torch.autocast(dev, dtype=dtype): loss = function(h, w)
            loss.backward()
            return loss.float().detach(), h.grad, w.grad
        def long(h, w): return F.cross_entropy(F.linear(h, w).float(), p["targets"], reduction="sum")
        ours = run(lambda h, w: linear_cross_entropy(h, w, p["targets"], piece=16)[0])
        wanted = run(long)
        assert all(t.dtype == torch.float32 for t in ours)
        assert_close(ours[0], wanted[0], rtol=1e-3, atol=1e-3)
        for a,b in zip(ours[1:], wanted[1:]): assert (a - b).norm() < 1e-2*b.norm()


# ------------------------------------------------------------ models

MORE = dict(
    Alibi=dict(num_key_value_heads=4), Cohere=dict(logit_scale=0.3), Cohere2=dict(logit_scale=0.3), Gemma=dict(head_dim=16),
    Gemma2=dict(head_dim=16, final_logit_softcapping=2.), Gemma3=dict(head_dim=16, final_logit_softcapping=2.),
    Glm=dict(head_dim=16), Glm4=dict(head_dim=16), GptOss=dict(num_local_experts=4, head_dim=16), Granite=dict(logits_scaling=8.),
    GraniteMoe=dict(logits_scaling=8., num_local_experts=2), Helium=dict(head_dim=16), Ministral=dict(head_dim=16),
    DeepseekV2=dict(num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, q_lora_rank=None, kv_lora_rank=16,
                    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1, num_experts_per_tok=2,
                    first_k_dense_replace=1, n_group=1, topk_group=1))
MORE["DeepseekV3"] = MORE["DeepseekV2"]
for _moe in "Qwen2Moe", "Qwen3Moe", "Glm4Moe", "Ernie4_5_Moe":
    MORE[_moe] = dict(moe_intermediate_size=32, num_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
                      shared_expert_intermediate_size=32, n_group=1, topk_group=1)
NAMES = [n.removesuffix("ForCausalLM") for n in LAST_STEPS]


@pytest.mark.parametrize("name", NAMES)
def test_the_classes_of_the_table(name):
    "What `plain_head` and `head_input` say makes the model's own logits."
    if name == "Alibi": from ftkit.models.classes import AlibiForCausalLM as cls
    else: cls = getattr(transformers, f"{name}ForCausalLM", None)
    if cls is None: pytest.skip("this transformers does not have it")
    torch.manual_seed(0)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = cls(cls.config_class(**SIZES | special | MORE.get(name, {}))).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2*torch.randn_like(p))
        if model.lm_head.bias is not None: model.lm_head.bias.normal_()
        own = model(IDS, use_cache=False).logits
        head = plain_head(model)
        z = F.linear(head_input(model, input_ids=IDS, use_cache=False), head.weight, head.bias)*head.scale
        if head.softcap: z = head.softcap*torch.tanh(z/head.softcap)
    assert_close(z, own, atol=1e-5, rtol=1e-5)
    step = LAST_STEPS[f"{name}ForCausalLM"]
    assert (head.scale != 1 or bool(head.softcap)) == (step is not None) and own.std() > 0.01


def test_heads_that_are_not_plain():
    assert plain_head(tiny_llama()) is not None
    adapted = add_lora(tiny_llama(), LoraConfig(r=2, targets=["lm_head"]))
    assert plain_head(adapted) is None
    assert plain_head(add_lora(tiny_llama(), LoraConfig(r=2))) is not None
    quantized = tiny_llama()
    quantized.lm_head = QLinear(64, 128, bias=False)
    assert plain_head(quantized) is None
    for watch in "register_forward_hook", "register_forward_pre_hook":
        for at in "lm_head", "":
            model = tiny_llama()
            getattr(model.get_submodule(at), watch)(lambda *_: None)
            assert plain_head(model) is None
    changed = tiny_llama()
    changed.forward = lambda **kw: None
    assert plain_head(changed) is None
    class LlamaForCausalLM(transformers.LlamaForCausalLM): pass # someone else's
    assert plain_head(LlamaForCausalLM(tiny_llama().config)) is None
    assert plain_head(nn.Linear(2, 2)) is None
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20))
    assert plain_head(gpt2) is None


# ------------------------------------------------------------ the objective

def batch(counts=False):
    g = torch.Generator().manual_seed(1)
    labels = torch.where(torch.rand(2, 9, generator=g) < 0.5, IDS, IGNORE)
    out = {"input_ids": IDS, "labels": labels}
    if counts: out["weights"] = torch.tensor([[1.], [2.5]]).expand(2, 9)
    return SupervisedTuning().prepare(out)


def step(model, ready, plain):
    "Loss, metrics and gradients; without `plain` by the model's own logits."
    if not plain: model.lm_head.register_forward_hook(lambda *_: None)
    assert (plain_head(model) is not None) == plain
    model.zero_grad()
    loss,metrics = SupervisedTuning()(model, ready)
    loss.backward()
    return loss.detach(), metrics, {n: p.grad for n,p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("kind", ["full", "tied", "lora", "gemma2", "recomputed"])
def test_a_step_is_the_same_as_by_logits(kind, counts):
    def make():
        if kind == "gemma2":
            torch.manual_seed(0)
            config = transformers.Gemma2Config(**SIZES | MORE["Gemma2"], pad_token_id=0)
            return transformers.Gemma2ForCausalLM(config).train()
        model = tiny_llama(tie_word_embeddings=kind == "tied").train()
        if kind == "lora":
            torch.manual_seed(0)
            add_lora(model, LoraConfig(r=2))
            for n,p in model.named_parameters():
                if n.endswith(".B"): nn.init.normal_(p, std=0.1)
        if kind == "recomputed": model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    ours,wanted = (step(make(), batch(counts), plain) for plain in (True, False))
    assert_close(ours[0], wanted[0], atol=1e-5, rtol=1e-6)
    assert_close(ours[1]["accuracy"].float(), wanted[1]["accuracy"].float())
    assert ours[2].keys() == wanted[2].keys()
    near(ours[2], wanted[2], 1e-4)


def test_a_step_of_nano_in_the_kernel():
    "The built-in model, with the kernel in place of the formula."
    model = load_model("nano", dtype="fp32", device=dev)
    ids = torch.randint(3, 2000, (1, 12), generator=torch.Generator().manual_seed(0))
    ready = {k: v.to(dev) for k,v in SupervisedTuning().prepare({"input_ids": ids, "labels": ids}).items()}
    with torch.no_grad():
        plain = SupervisedTuning()(model, ready)
        with kernels(): ours = SupervisedTuning()(model, ready)
        wanted = model(input_ids=ids.to(dev), labels=ids.to(dev)).loss*11
    assert_close(ours, plain, atol=1e-4, rtol=1e-5)
    assert_close(ours[0], wanted, atol=1e-4, rtol=1e-5)


def test_wrapped_for_several_processes(tmp_path):
    "The wrapper is called, so it exchanges gradients; here with itself alone."
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    if dist.is_initialized(): pytest.skip("another test has a group")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wanted = step(tiny_llama().train(), batch(), True)
        wrapped,calls = DistributedDataParallel(tiny_llama().train()), []
        def exchange(_, bucket):
            calls.append(1)
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        wrapped.register_comm_hook(None, exchange)
        for _ in range(2): # a second step finds nothing left over from the first
            calls.clear()
            wrapped.zero_grad()
            loss,_ = SupervisedTuning()(wrapped, batch())
            loss.backward()
            assert calls
        assert_close(loss.detach(), wanted[0])
        for n,p in wrapped.module.named_parameters(): assert_close(p.grad, wanted[2][n])
        assert "forward" not in wrapped.module.__dict__
    finally: dist.destroy_process_group()
