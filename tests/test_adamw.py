"AdamW over all tensors: against torch's and float64, in every precision, stopped and resumed."
import copy, math, os
from contextlib import nullcontext

import pytest, torch
from torch import nn
from torch.testing import assert_close

from ftkit.core import FtkitError
from ftkit.kernels.adamw import FlatAdamW, Mirror
from ftkit.kernels.launch import interpreted, triton
from ftkit.kernels.moments import pack_state, unpack_state
from ftkit.kernels.rounding import (SIGNED, UNSIGNED, dice, dice_key, from_code, hash_bits,
                                    round_randomly, to_code)
from ftkit.sft import SupervisedTuning
from ftkit.training.checkpoint import restore_tensors, trainer_tensors
from ftkit.training.loop import Callback, Trainer
from ftkit.training.optim import OptimConfig, StepInBackward, build_optimizer
from ftkit.training.plan import TrainConfig
from small_runs import batch, tiny_model, tiny_rows, tiny_trainer, untimed

CUDA = torch.cuda.is_available()
dev = "cuda" if CUDA else "cpu"
can = triton is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
kernels = (nullcontext if CUDA else interpreted) if can else nullcontext
needs_kernels = pytest.mark.skipif(not can, reason="needs Triton")
SHAPES = (70, 60), (4096,), (33, 129), (5,), (1, 1), (130, 3)


def made(dtype=torch.float32, device=dev, shapes=SHAPES, seed=None, steps=3, **more):
    "Parameters, optimizer and gradients, on new random numbers each time."
    seed = torch.seed() % 2**31 if seed is None else seed
    g = torch.Generator().manual_seed(seed)
    new = lambda *s: torch.randn(s, generator=g)
    params = [nn.Parameter(new(*s).to(device, dtype)) for s in shapes]
    grads = [[(new(*s)*10**new(1).item()).to(device, dtype) for s in shapes] for _ in range(steps)]
    groups = [dict(params=params[::2], weight_decay=0.1), dict(params=params[1::2], lr=3e-3)]
    more = dict(lr=1e-3, betas=(0.9, 0.999)) | more
    return params, FlatAdamW(groups, **more), grads, seed


def stepped(params, opt, grads, max_norm=1.):
    norms = []
    for gs in grads:
        for p, g in zip(params, gs): p.grad = None if g is None else g.clone()
        norms.append(opt.clip_and_step(max_norm).cpu())
    return [p.detach().cpu().clone() for p in params], torch.stack(norms)


@needs_kernels
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0., 0.), (0.5, 0.95)])
def test_32_bits_are_those_of_torch_in_float64(betas):
    params, opt, grads, seed = made(betas=betas)
    with kernels(): found, norms = stepped(params, opt, grads)
    theirs = [nn.Parameter(p.detach().cpu().double()) for p in made(seed=seed)[0]]
    groups = [dict(params=theirs[::2], weight_decay=0.1),
              dict(params=theirs[1::2], lr=3e-3, weight_decay=0.)]
    plain = torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=1e-8)
    for i, gs in enumerate(grads):
        for p, g in zip(theirs, gs): p.grad = g.cpu().double()
        norm = nn.utils.clip_grad_norm_(theirs, 1.)
        assert_close(norms[i].double(), norm, rtol=1e-6, atol=0)
        plain.step()
    for a, b in zip(found, theirs): assert_close(a.double(), b.detach(), rtol=1e-6, atol=2e-6)
    for p, q in zip(params, theirs):
        for k in "exp_avg", "exp_avg_sq":
            assert_close(opt.state[p][k].cpu().double(), plain.state[q][k], rtol=1e-5, atol=1e-9)
        assert opt.state[p]["step"] == len(grads)


@needs_kernels
@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host", [False, True])
def test_kernel_is_the_formula(bits, dtype, host):
    params, opt, grads, seed = made(dtype, bits=bits, host=host)
    grads[1][2] = None # one has no gradient at one step
    with kernels(): found, norms = stepped(params, opt, grads)
    plain, ours, _, _ = made(dtype, "cpu", seed=seed, bits=bits)
    wanted, their_norms = stepped(plain, ours, [[g if g is None else g.cpu() for g in gs]
                                                for gs in grads])
    assert_close(norms, their_norms, rtol=1e-5, atol=0)
    assert all(p._version for p in params) # whoever keeps something made of a weight can see it
    assert opt.steps.cpu().tolist() == ours.steps.tolist() and 2. in ours.steps
    for a, b in zip(found, wanted): # a throw of the dice may fall on the border
        far = (a.float() - b.float()).abs() > 1e-6*b.float().abs() + 2e-6
        assert far.float().mean() < (0.01 if a.numel() > 100 else 0.5)


@needs_kernels
def test_odd_places_and_odd_gradients():
    "Weights that are not aligned, gradients with other strides, tensors without one."
    base = torch.randn(1000, device=dev)
    def run(shift):
        w = torch.empty(1000 + shift, device=dev)[shift:]
        w.copy_(base)
        params = [nn.Parameter(w[:600].view(20, 30)), nn.Parameter(w[600:])]
        assert params[0].data_ptr() % 16 == 4*shift
        opt = FlatAdamW(params, lr=0.1)
        gs = torch.arange(600., device=dev).view(30, 20).t()
        for _ in range(2):
            params[0].grad = gs if shift else gs.contiguous()
            with kernels(): norm = opt.clip_and_step()
        assert opt.steps.tolist() == [2, 0] and torch.equal(params[1].detach(), base[600:])
        return params[0].detach().clone(), norm
    assert_close(run(1), run(0), rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_changes_nothing(bad):
    params, opt, grads, _ = made(bits=8)
    before = copy.deepcopy([{k: v.cpu() for k, v in opt.state[p].items()} for p in params])
    weights = [p.detach().clone() for p in params]
    grads[0][2][3, 3] = bad
    with kernels(): _, norms = stepped(params, opt, grads[:1])
    assert not norms.isfinite().any()
    for p, w, s in zip(params, weights, before):
        assert torch.equal(p.detach(), w)
        for k, v in s.items(): assert torch.equal(opt.state[p][k].cpu(), v)
    with kernels(): _, norms = stepped(params, opt, grads[1:2])
    assert norms.isfinite().all() and opt.steps.tolist() == [1]*len(params)


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_resume_is_exact(bits):
    kernel = kernels if bits == 8 else nullcontext
    few = (70, 60), (5,)
    with kernel():
        straight, _ = stepped(*made(torch.bfloat16, seed=3, bits=bits, steps=4, shapes=few)[:3])
        params, opt, grads, _ = made(torch.bfloat16, seed=3, bits=bits, steps=4, shapes=few)
        stepped(params, opt, grads[:2])
        saved = copy.deepcopy(opt.state_dict())
        again, fresh, _, _ = made(torch.bfloat16, seed=9, bits=bits, steps=1, shapes=few)
        stepped(again, fresh, grads[3:]) # has a state of its own, which must go
        with torch.no_grad():
            for p, q in zip(again, params): p.copy_(q)
        fresh.load_state_dict(saved)
        found, _ = stepped(again, fresh, grads[2:])
    for a, b in zip(found, straight): assert torch.equal(a, b)


def test_state_is_that_of_torch_both_ways():
    def model(): torch.manual_seed(0); return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 2))
    x = torch.randn(16, 8)
    cfg = OptimConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0)  # torch's `step` does not clip
    def go(model, opt, n):
        for _ in range(n): model(x).square().mean().backward(); opt.step(); opt.zero_grad()
    def other(kind, net): return build_optimizer(net, cfg, parts=kind == "flat")
    whole = model()
    go(whole, other("torch", whole), 4)
    for first, second in ("torch", "flat"), ("flat", "torch"):
        a = model(); opt = other(first, a)
        assert isinstance(opt, FlatAdamW) == (first == "flat") or CUDA
        go(a, opt, 2)
        b = model(); fresh = other(second, b)
        restore_tensors(b, fresh, trainer_tensors(a, opt))
        go(b, fresh, 2)
        for p, q in zip(b.parameters(), whole.parameters()): assert_close(p, q)


def test_parts_step_like_the_whole():
    params, opt, grads, seed = made(torch.bfloat16, bits=16)
    with kernels(): wanted, norms = stepped(params, opt, grads, max_norm=0)
    params, opt, _, _ = made(torch.bfloat16, bits=16, seed=seed)
    with kernels():
        for gs, norm in zip(grads, norms):
            for chosen in (0, 1), (2, 3, 4), (5,):
                for i in chosen: params[i].grad = gs[i]*1
                opt.step_part([params[i] for i in chosen])
            assert_close(opt.parts_norm().cpu(), norm, rtol=1e-5, atol=0)
    assert all(p.grad is None for p in params)
    for a, b in zip(params, wanted): assert torch.equal(a.detach().cpu(), b)
    with kernels():
        params[0].grad = torch.ones_like(params[0])
        opt.step_part([params[0]], 0.5)
        assert_close(opt.parts_norm().cpu(), torch.tensor(0.5*math.sqrt(params[0].numel())))


def test_only_what_is_new_is_copied():
    table = Mirror((3,), torch.int64, torch.device(dev), slots=2)
    for i in range(10):
        assert table.set([i, 2*i, 2**60 + i]) and not table.set([i, 2*i, 2**60 + i])
        assert table.there.tolist() == [i, 2*i, 2**60 + i]


def test_what_it_refuses():
    w = lambda *s, **k: nn.Parameter(torch.ones(s, **k))
    for params, more, words in [([w(2)], dict(bits=4), "32, 16 or 8"),
                                ([w(2, dtype=torch.float16)], {}, "float16"),
                                ([nn.Parameter(torch.ones(2, 3).t())], {}, "contiguous")]:
        with pytest.raises(ValueError, match=words): FlatAdamW(params, **more)
    p = w(2, 2)
    opt = FlatAdamW([p])
    with pytest.raises(RuntimeError, match="no groups"): opt.add_param_group(dict(params=[w(2)]))
    p.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"): opt.step()
    with pytest.raises(FtkitError, match="other parameters"):
        FlatAdamW([w(3)]).load_state_dict(dict(param_groups=[dict(params=[0, 1])], state={}))


def test_rounding_has_the_right_mean_everywhere():
    x = torch.randn(50)*torch.logspace(-30, 30, 50)
    many = x.expand(20_000, 50)
    bits = dice(many.numel(), dice_key(torch.seed() % 2**31)).view(many.shape)
    found = round_randomly(many, bits).double()
    step = (x.abs()*2**-7).double()
    assert ((found - x).abs() <= step).all()
    assert ((found.mean(0) - x).abs() < 0.02*step).all()
    assert torch.equal(round_randomly(x.bfloat16().float(), bits[0]), x.bfloat16())
    assert int(hash_bits(torch.tensor(2**32 + 5))) == int(hash_bits(torch.tensor(5)))


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_keep_size_sign_and_mean(signed):
    n, bits = 700, SIGNED if signed else UNSIGNED
    levels = from_code(torch.arange(2**bits), bits)
    assert torch.equal(to_code(levels, bits), torch.arange(2**bits))
    x = torch.randn(n)*torch.logspace(-5, 2, n) if signed else torch.rand(n)*torch.logspace(-9, 2, n)
    x[5] = 0
    total = torch.zeros(n, dtype=torch.double)
    for i in range(300):
        total += unpack_state(*pack_state(x, dice(n, dice_key(i)), signed), signed).double()
    found = unpack_state(*pack_state(x, dice(n, 0), signed), signed)
    assert found[5] == 0 and (signed or (found > 0).sum() == n - 1)
    assert (found.sign() == x.sign())[x.abs() > 1e-3*x.abs().max()].all()
    large = x.abs() > 1e-2*x.abs().max()
    assert_close(total[large]/300, x[large].double(), rtol=0.03, atol=0)
    for block in range(0, n, 256): # the largest of a block is exact
        i = block + x[block:block + 256].abs().argmax()
        assert_close(found[i], x[i], rtol=1e-6, atol=0)


class Stop(Callback):
    order = 100
    def after_step(self, trainer):
        if trainer.step == 5: raise KeyboardInterrupt


def bf16_trainer(folder=None, callbacks=(), optimizer="adamw", **cfg):
    torch.manual_seed(0)
    cfg = TrainConfig(batch_size=2, epochs=1, precision="bf16", save_every=2, **cfg)
    optim = OptimConfig(lr=3e-3, optimizer=optimizer, weight_decay=0.1)
    return Trainer(tiny_model().bfloat16(), SupervisedTuning(), tiny_rows(), cfg, optim, batch,
                   None, callbacks, folder)


@pytest.mark.parametrize("inside", [False, True])
def test_weights_in_bfloat16_learn_and_resume_exactly(inside, tmp_path, capsys):
    whole = bf16_trainer(step_in_backward=inside)
    assert isinstance(whole.optimizer, FlatAdamW) and "small updates" not in capsys.readouterr().err
    whole = whole.fit()
    with pytest.raises(KeyboardInterrupt):
        bf16_trainer(tmp_path, [Stop()], step_in_backward=inside).fit()
    rest = bf16_trainer(tmp_path, step_in_backward=inside).fit(resume="auto")
    assert untimed(rest.history) == untimed(whole.history)
    for a, b in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(a, b)
    losses = whole.curve("train")[1]
    assert losses[-1] < losses[0]


def test_steps_in_backward_are_ordinary_steps_without_clipping():
    def run(**more):
        t = tiny_trainer(lr=1e-3, max_steps=4, **more)
        t.optim.max_grad_norm = 0
        if t.inside: t.inside.max_norm = 0
        return t.fit()
    a, b = run(), run(step_in_backward=True)
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert a.curve("train")[1] == pytest.approx(b.curve("train")[1], rel=1e-5)


def test_steps_in_backward_need_what_they_need():
    with pytest.raises(FtkitError, match="accumulate"):
        TrainConfig(step_in_backward=True, accumulate=2).check()
    with pytest.raises(FtkitError, match="fp16"):
        tiny_trainer(step_in_backward=True, precision="fp16")
    with pytest.raises(FtkitError, match="cannot step a part"):
        bf16_trainer(optimizer="adafactor", step_in_backward=True)


def test_a_bad_norm_leaves_the_factor():
    layer = nn.Linear(3, 1)
    inside = StepInBackward(build_optimizer(layer, OptimConfig(), parts=True), 1.)
    factors = []
    for scale in (100., math.inf, 1e-3):
        before = layer.weight.detach().clone()
        with inside.hooks(): (scale*layer(torch.ones(2, 3))).sum().backward()
        inside.finish()
        factors.append(inside.factor.item())
        assert torch.equal(before, layer.weight.detach()) == math.isinf(scale)
    assert factors[0] == factors[1] < 1 == factors[2]


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_in_a_graph():
    "Rates change between replays, gradients come from the graph."
    def run(graph):
        torch.manual_seed(0)
        net, x = nn.Linear(64, 64, device="cuda"), torch.randn(8, 64, device="cuda")
        opt = FlatAdamW(net.parameters(), lr=1e-2)
        def step():
            net(x).square().mean().backward()
            return opt.clip_and_step(1.)
        def clear():
            for p in net.parameters(): p.grad = None
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3): clear(); step()
        torch.cuda.synchronize()
        clear()
        if graph:
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g): norm = step()
        for lr in 1e-2, 1e-3, 5e-3:
            opt.param_groups[0]["lr"] = lr
            if graph: opt.set_rates(); g.replay()
            else: clear(); norm = step()
        return net.weight.detach().clone(), norm.clone(), opt.steps.clone()
    for a, b in zip(run(True), run(False)): assert_close(a, b)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("host", [False, True])
def test_nothing_is_waited_for(host):
    params, opt, grads, _ = made(steps=4, bits=8, host=host)
    stepped(params, opt, grads[:1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for gs in grads[1:]:
            for p, g in zip(params, gs): p.grad = g.clone()
            opt.clip_and_step(1.)
    finally: torch.cuda.set_sync_debug_mode("default")
