"The peak of a step, predicted and counted; plans, and steps that are done again."
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ftkit.decoder as decoder
import ftkit.fast as fast
import ftkit.kernels.lora as lora_kernels
import ftkit.kernels.loss as loss_kernels
from ftkit.fast import find_decoder, set_saving, speed_up
from ftkit.kept import Away, Saving
from ftkit.kernels.edges import SCRATCH
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.peaks import Peak, Tally, step_shape
from ftkit.quant.linear import quantize_model
from ftkit.sft import SupervisedTuning


def small(dtype=torch.float32, **more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    return LlamaForCausalLM(LlamaConfig(**sizes | more)).to(dtype)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Kernels that take no memory but their outputs; what they compute is of no account here."
    def rms_forward(x, weight, eps, plus=0., residual=None, out=None, summed=None):
        return torch.zeros_like(x) if out is None else out.zero_(), x.new_zeros(len(x), dtype=torch.float32), x

    def rms_backward(dy, x, weight, inverse, plus=0., add=None, out=None, need_weight=False):
        dw = torch.zeros_like(weight) if need_weight else None
        return (torch.zeros_like(x) if out is None else out), dw

    def attend_forward(q, k, v, rows, **kw):
        return torch.zeros(q.shape, dtype=q.dtype), (q.new_zeros(q.shape[1], len(q), dtype=torch.float32),)

    def attend_backward(dout, q, k, v, out, saved, rows, dq=None, dk=None, dv=None, **kw):
        delta = torch.zeros_like(saved[0])
        grads = [torch.zeros(t.shape, dtype=t.dtype) for t in (q, k, v)]
        return tuple(d.copy_(g) for d, g in zip((dq, dk, dv), grads))

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, eps, plus):
            ctx.save_for_backward(x, w, x.new_zeros(x.shape[:-1]))
            return torch.zeros_like(x)

        @staticmethod
        def backward(ctx, dy): return torch.zeros_like(dy), None, None, None

    for name, f in dict(rms_forward=rms_forward, rms_backward=rms_backward, attend_forward=attend_forward,
                        attend_backward=attend_backward, rotate_=lambda *a, **k: None,
                        glu_forward=lambda *a, **k: None, glu_backward=lambda *a, **k: None).items():
        monkeypatch.setattr(decoder, name, f)
    monkeypatch.setattr(fast, "rms_norm", lambda x, w, eps, plus=0.: Norm.apply(x, w, eps, plus))
    monkeypatch.setattr(lora_kernels, "unpack", lambda base, a, b, out: out)
    monkeypatch.setattr(loss_kernels, "score_", lambda logits, *a, **k: logits)
    SCRATCH.forget()
    yield
    SCRATCH.forget()


def counted_peak(model, tokens, rows=1, passes=1):
    "Bytes at the highest point of a step, weights included."
    ids = torch.randint(0, 320, (rows, tokens//rows))
    batch = dict(input_ids=ids, labels=ids)
    sft = SupervisedTuning()
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with Tally() as tally:
        for _ in range(passes):
            loss, _ = sft(model, batch)
            loss.backward()
    model.zero_grad()
    return weights + tally.peak


KINDS = {"lora": dict(lora=True, dtype=torch.bfloat16), "qlora": dict(lora=True, bits=4, dtype=torch.bfloat16),
         "full": dict(dtype=torch.bfloat16)}


def made(kind, **more):
    how = KINDS[kind]
    model = small(how["dtype"], **more)
    if how.get("bits"): quantize_model(model)
    if how.get("lora"): add_lora(model, LoraConfig(r=8))
    model.train()
    assert speed_up(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["none", "some", "much", "most", "mixed", "host", "pieces"])
def test_the_peak_is_as_predicted(as_on_a_gpu, monkeypatch, kind, plan):
    monkeypatch.setattr(Away, "_room", lambda self, t: away.pop()) # not on the device
    away = [torch.empty(2048, 128, dtype=torch.bfloat16) for _ in range(6)]
    model = made(kind, vocab_size=320, num_hidden_layers=6)
    plan = {"mixed": [Saving("most")]*2 + [Saving("some")]*2 + [Saving()]*2, "host": Saving("most", host=True),
            "pieces": Saving("most", piece=512)}.get(plan, plan)
    set_saving(model, plan)
    said = Peak(step_shape(model, 2048, optimizer="paged_adamw_8bit"), plan)
    found = counted_peak(model, 2048) + said.shape.optimizer
    assert 0.95 < said.bytes/found < 1.05, (said, found, said.line)


@pytest.mark.parametrize("plan", ["none", "some", "most"])
def test_norms_behind_and_inside(as_on_a_gpu, plan):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, use_cache=False)).bfloat16()
    add_lora(model, LoraConfig(r=8)).train()
    assert speed_up(model, plan)
    said = Peak(step_shape(model, 2048, optimizer="paged_adamw_8bit"), plan)
    found = counted_peak(model, 2048) + said.shape.optimizer
    assert 0.95 < said.bytes/found < 1.05, (said, found, said.line)


def test_gradients_that_are_summed(as_on_a_gpu):
    model = made("full")
    set_saving(model, "most")
    said = [Peak(step_shape(model, 512, optimizer="paged_adamw_8bit", accumulate=n), "most") for n in (1, 2)]
    for s, n in zip(said, (1, 2)):
        found = counted_peak(model, 512, passes=n) + s.shape.optimizer
        assert 0.95 < s.bytes/found < 1.05, (s, found)
    assert said[1].bytes > said[0].bytes


def test_a_head_that_dominates(as_on_a_gpu):
    model = made("full", vocab_size=8000, num_hidden_layers=1)
    set_saving(model, "most")
    said = Peak(step_shape(model, 512, optimizer="paged_adamw_8bit"), "most")
    assert said.moment == "loss"
    found = counted_peak(model, 512) + said.shape.optimizer
    assert 0.95 < said.bytes/found < 1.05, (said, found)


def test_one_layer_of_attention_that_is_high(as_on_a_gpu):
    model = made("lora", intermediate_size=32)
    said = Peak(step_shape(model, 2048, optimizer="paged_adamw_8bit"), "none")
    assert said.moment == "attention 3"
    found = counted_peak(model, 2048) + said.shape.optimizer
    assert 0.95 < said.bytes/found < 1.05, (said, found)
