"Optimizers and schedules against torch, peft and bitsandbytes; and resuming each of them exactly."
import math
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM
from ftkit.core import FtkitError
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.training.loop import Callback, Trainer
from ftkit.training.optim import (OPTIMIZERS, OptimConfig, build_optimizer, build_schedule,
                                  learning_rate, parameter_groups)
from ftkit.training.plan import TrainConfig
from ftkit.sft import SupervisedTuning
from small_runs import batch, tiny_model, tiny_rows, untimed

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))]
BNB = [n for n in OPTIMIZERS if n.startswith("bnb_")]


def needs(name):
    if name in BNB: pytest.importorskip("bitsandbytes")


class Stop(Callback):
    order = 100
    def __init__(self, step): self.at = step
    def after_step(self, trainer):
        if trainer.step == self.at: raise KeyboardInterrupt


def trainer(name, work_dir=None, callbacks=(), lora=False, device="cpu", **optim):
    "With 8-bit states in it: some weights have 4096 numbers or more."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=24, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, attention_dropout=0.1, pad_token_id=0))
    if lora: add_lora(model, LoraConfig(r=64, dropout=0.1))
    cfg = TrainConfig(batch_size=2, epochs=1, precision="fp32", save_every=2)
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, optimizer=name, **optim)
    return Trainer(model.to(device), SupervisedTuning(), tiny_rows(), cfg, optim, batch, None,
                   callbacks, work_dir)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact_with_every_optimizer(name, lora, device, tmp_path):
    needs(name)
    more = dict(lora=lora, device=device, lora_plus_ratio=4. if lora else 1.)
    whole = trainer(name, **more).fit()
    with pytest.raises(KeyboardInterrupt):
        trainer(name, tmp_path, [Stop(5)], **more).fit()
    second = trainer(name, tmp_path, **more)
    rest = second.fit(resume="auto")
    assert untimed(rest.history) == untimed(whole.history)
    for a, b in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(a, b)
    if "8bit" in name: # and it did have states in 8 bits
        kinds = {t.dtype for s in second.optimizer.state.values() for t in s.values()
                 if isinstance(t, torch.Tensor)}
        assert torch.uint8 in kinds
    if name in BNB and "paged" in name and device == "cuda":
        big = [s["state1"] for s in second.optimizer.state.values() if s["state1"].numel() >= 1e5]
        assert all(getattr(t, "is_paged", False) for t in big)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["bnb_paged_adamw", "bnb_paged_adamw_8bit"])
def test_paged_states_stay_paged_when_restored(name):
    pytest.importorskip("bitsandbytes")
    from ftkit.training.checkpoint import restore_tensors, trainer_tensors
    def steps(model, opt, n, seed):
        g = torch.Generator("cuda").manual_seed(seed)
        for _ in range(n):
            model(torch.randn(8, 512, generator=g, device="cuda")).square().mean().backward()
            opt.step(); opt.zero_grad()
    torch.manual_seed(0)
    model = nn.Linear(512, 512, bias=False).cuda()
    opt = build_optimizer(model, OptimConfig(optimizer=name))
    steps(model, opt, 3, 0)
    saved = trainer_tensors(model, opt)
    steps(model, opt, 3, 1)
    wanted = model.weight.detach().clone()
    again = nn.Linear(512, 512, bias=False).cuda()
    opt = build_optimizer(again, OptimConfig(optimizer=name))
    restore_tensors(again, opt, saved)
    assert opt.state[again.weight]["state1"].is_paged
    steps(again, opt, 3, 1)
    assert torch.equal(again.weight, wanted)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adafactor"])
def test_adamw_of_each_kind_goes_the_same_way(name):
    "Against torch's: to the last digits in 32 bits, nearly in 8."
    needs(name)
    def run(name):
        torch.manual_seed(0)
        model = nn.Linear(128, 64)
        opt = build_optimizer(model, OptimConfig(optimizer=name, lr=1e-2, weight_decay=0.1))
        before = model.weight.detach().clone()
        g = torch.Generator().manual_seed(1)
        for _ in range(10):
            x = torch.randn(16, 128, generator=g)
            (model(x) - x[:, :64]).square().mean().backward()
            opt.step(); opt.zero_grad()
        return model.weight.detach() - before
    ours, plain = run(name), run("adamw")
    if "bit" in name: assert (ours - plain).norm() < 0.1*plain.norm()
    else: assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_adafactor_is_torchs_own():
    model = nn.Linear(32, 16)
    opt = build_optimizer(model, OptimConfig(optimizer="adafactor", lr=1e-2, weight_decay=0.1))
    assert type(opt) is torch.optim.Adafactor and {g["lr"] for g in opt.param_groups} == {1e-2}
    before = model.weight.detach().clone()
    for _ in range(5):
        model(torch.ones(2, 32)).square().mean().backward(); opt.step(); opt.zero_grad()
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()


def test_lora_plus_groups_are_pefts():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer
    theirs = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    opt = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    names = {id(p): n for n, p in theirs.named_parameters()}
    fast = {names[id(p)].removeprefix("base_model.model.").partition(".lora_")[0]
            for g in opt.param_groups if g["lr"] > 1e-3 for p in g["params"]}
    ours = add_lora(tiny_model(), LoraConfig(r=2))
    groups = parameter_groups(ours, OptimConfig(lr=1e-4, lora_plus_ratio=16))
    assert [g["lr"] for g in groups] == [1e-4, 16e-4]
    names = {id(p): n for n, p in ours.named_parameters()}
    assert {names[id(p)] for p in groups[1]["params"]} == {f"{n}.B" for n in fast}
    schedule = build_schedule(build_optimizer(ours, OptimConfig(lr=1e-4, lora_plus_ratio=16)),
                              OptimConfig(lr=1e-4, lora_plus_ratio=16, warmup_ratio=0), 10)
    assert schedule(0) == 1e-4


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("floor", [0., 1e-6, 1e-4])
def test_cosine_is_torchs(warmup, floor):
    cfg = OptimConfig(lr=2e-4, warmup_steps=warmup, min_lr=floor).check()
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=40 - warmup, eta_min=floor)
    for step in range(warmup, 40):
        assert math.isclose(cfg.lr*learning_rate(cfg, step, 40), opt.param_groups[0]["lr"],
                            rel_tol=1e-9, abs_tol=1e-12)
        opt.step(); cosine.step()


def test_linear_and_constant_reach_the_floor():
    for kind, last in dict(linear=1e-6, constant=2e-4, cosine=1e-6).items():
        cfg = OptimConfig(lr=2e-4, schedule=kind, warmup_steps=10, min_lr=1e-6).check()
        rates = [cfg.lr*learning_rate(cfg, s, 1000) for s in range(1001)]
        assert math.isclose(rates[10], 2e-4) and math.isclose(rates[1000], last)
        assert min(rates[10:]) >= last*(1 - 1e-9) and rates[:11] == sorted(rates[:11])


def test_steps_or_ratio_but_not_both():
    steps = [learning_rate(OptimConfig(warmup_steps=20), s, 200) for s in range(200)]
    ratio = [learning_rate(OptimConfig(warmup_ratio=0.1), s, 200) for s in range(200)]
    assert steps == ratio
    default = [learning_rate(OptimConfig(), s, 200) for s in range(200)]
    assert default == [learning_rate(OptimConfig(warmup_ratio=0.03), s, 200) for s in range(200)]
    for wrong, words in [(dict(warmup_steps=3, warmup_ratio=0.1), "warmup_ratio says the same"),
                         (dict(min_lr=1e-5, min_lr_ratio=0.1), "min_lr_ratio says the same"),
                         (dict(min_lr=1.), "is above optim.lr"),
                         (dict(warmup_steps=-1), "at least 0"),
                         (dict(lora_plus_ratio=-1.), "lora_plus_ratio: must be"),
                         (dict(optimizer="adam"), "unknown optimizer")]:
        with pytest.raises(FtkitError, match=words): OptimConfig(**wrong).check()


def test_options_can_be_set_from_text():
    from ftkit.options import change
    cfg = change(OptimConfig(), warmup_steps="100", min_lr="1e-6", warmup_ratio="None",
                 optimizer="paged_adamw_8bit", lora_plus_ratio="16")
    assert (cfg.warmup_steps, cfg.min_lr, cfg.warmup_ratio) == (100, 1e-6, None)
    assert cfg.check().lora_plus_ratio == 16


def test_bitsandbytes_missing(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FtkitError, match=r"optim.optimizer=bnb_adamw_8bit needs it.*ftkit\[gpu\]"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(optimizer="bnb_adamw_8bit"))
