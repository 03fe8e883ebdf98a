"Kernels where numbers, shapes and types are unusual; on a CPU in Triton's interpreter."
import os
from contextlib import nullcontext
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA: os.environ["TRITON_INTERPRET"] = "1"

import ftkit.kernels.backends as backends
import ftkit.kernels.fp8 as fp8
import ftkit.kernels.launch as launch
from ftkit.kernels.attention import Rows, kernel_forward
from ftkit.kernels.backends import BACKENDS, Case, case_of
from ftkit.kernels.edges import Moves, dropped, unpack
from ftkit.kernels.fp8 import quantize_rows, scaled_linear
from ftkit.kernels.launch import interpreted
from ftkit.kernels.loss import score_
from ftkit.kernels.nf4 import dequantize_kernel, together_kernel
from ftkit.quant.fp8 import E4M3, from_fp8, to_fp8
from ftkit.quant.linear import QLinear
from ftkit.quant.qtensor import dynamic_map, quantize

DEV = "cuda" if CUDA else "cpu"
kernels = nullcontext if CUDA else interpreted


@pytest.mark.parametrize("width", [48, 40000])
def test_rows_of_next_to_nothing_are_zeros(width):
    x = torch.zeros(3, width, device=DEV)
    x[0,3],x[1,5],x[2,7] = 1e-40,3e-37,1e-30
    with kernels(): codes,scales = quantize_rows(x)
    for c,s in (codes, scales), to_fp8(x):
        found = from_fp8(c, s)
        assert found.isfinite().all() and (found[:2] == 0).all() and (s[:2] == 1).all()
        torch.testing.assert_close(found[2], x[2], rtol=1e-6, atol=0)


def test_no_tokens_in_eight_bits():
    w = torch.ones(32, 16, device=DEV).to(E4M3)
    x,scales = torch.empty(0, 16, device=DEV).to(E4M3),torch.empty(0, 1, device=DEV)
    assert scaled_linear(x, scales, w).shape == (0, 32)


def test_attention_writes_where_it_is_told_or_says_why_not():
    q,k,v = torch.randn(3, 20, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEV)
    rows,out = Rows(2, 10),torch.zeros(20, 16, 2, device=DEV).transpose(1, 2)
    with kernels(), pytest.raises(ValueError, match="last dimension"):
        kernel_forward(q, k, v, rows, .25, out=out)


def test_heads_that_lie_far_apart():
    "Further than 2³¹ numbers: each head's offset needs 64 bits."
    if not CUDA: pytest.skip("it needs several gigabytes")
    far = torch.empty(3*2**30 + 128, dtype=torch.float16, device=DEV)
    q = far.as_strided((8, 4, 16), (16, 2**30, 1)).normal_()
    k,v = torch.randn(2, 8, 4, 16, device=DEV).half()
    rows = Rows(1, 8)
    near,apart = (kernel_forward(x, k, v, rows, .25) for x in (q.contiguous(), q))
    for a,b in zip(near, apart):
        assert torch.equal(a, b)


def test_cudnn_takes_no_single_tokens(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    case = Case("cuda", (9, 0), torch.bfloat16, 8, 2, 64, False, 1, False, False, True)
    assert "one token" in BACKENDS["cudnn"].refuses(case)


def test_targets_and_counts_with_gaps():
    g = torch.Generator().manual_seed(0)
    z,table = torch.randn(6, 50, generator=g).to(DEV),torch.randint(50, (6, 2), generator=g).to(DEV)
    counts,found = torch.full((1,), .5, device=DEV).expand(6),[]
    for t,c in (table[:,1], counts), (table[:,1].clone(), counts.clone()):
        a,b,x = torch.empty(6, device=DEV),torch.empty(6, device=DEV),z.clone()
        with kernels(): score_(x, t, a, b, c)
        found.append((a, b, x))
    torch.testing.assert_close(*found)


def bits(n=16):
    "What kernels write in bfloat16, by several of them."
    g = torch.Generator().manual_seed(0)
    w,x = torch.randn(n, 64, generator=g).to(DEV),torch.randn(n, 40, generator=g).to(DEV).bfloat16()
    q = quantize(w, double=True, like="cuda")
    facts = q.kind,q.block,q.nested_absmax,q.offset,dynamic_map(q.device)
    out,moved = (torch.empty(n, 64, device=DEV, dtype=torch.bfloat16) for _ in range(2))
    losses,hits = torch.empty(2, n, device=DEV)
    with kernels():
        dequantize_kernel(q.codes, q.absmax, out, *facts)
        Moves([w], [moved], [.5])([w], [moved])
        score_(z := x.clone(), torch.arange(n, device=DEV), losses, hits)
        thin = dropped(x, 5, .25)
        parts = [(q.codes, q.absmax, q.nested_absmax, q.offset)]*2
        both = together_kernel(parts, [n, n], torch.cat([out, out]), table=facts[-1])
    return (out, moved, z, thin),both


def test_bfloat16_where_the_gpu_does_not_round_to_it(monkeypatch):
    new,both = bits()
    monkeypatch.setattr(launch, "_old", lambda device: True)
    old,none = bits()
    assert both and not none
    for a,b in zip(new, old): torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-5)
    if CUDA: assert torch.equal(new[0], old[0]) # the interpreter cuts bits off


def test_eight_bits_need_a_pytorch_that_keeps_to_its_stream(monkeypatch):
    monkeypatch.setattr(fp8, "capability", lambda device: (8, 9))
    for version,why in ("2.11.0+cu130", "another stream"), ("2.12.0a0+git", None):
        monkeypatch.setattr(torch, "__version__", version)
        fp8._wrong_stream.cache_clear(), fp8._too_old.cache_clear()
        assert why is None and fp8.why_not_fp8("cuda:0", 64) is None or \
            why in fp8.why_not_fp8("cuda:0", 64)
    fp8._wrong_stream.cache_clear(), fp8._too_old.cache_clear()


@pytest.mark.parametrize("double", [True, False])
def test_a_layer_of_one_of_many_experts(double):
    "Its scales begin within a block of 256 of their own scales."
    w = torch.randn(3, 40, 64, generator=torch.Generator().manual_seed(0)).to(DEV)
    q = quantize(w*torch.tensor([1., 10., 100.], device=DEV).view(3, 1, 1), double=double)[2]
    layer = QLinear(64, 40, bias=False, double=double, compute_dtype=torch.float32).to(DEV)
    layer.load_qtensor(q)
    right,out = q.dequantize(torch.float32),torch.empty(30, 64, device=DEV)
    assert torch.equal(layer.weight, right) and bool(q.first)
    assert torch.equal(unpack(layer, 10, 40, out), right[10:])


def test_rows_that_old_versions_of_cudnn_read_beyond(monkeypatch):
    q,k = torch.zeros(2, 260, 2, 64, device=DEV)
    for version,answer in (91002, [True, False]), (91501, [True, True]):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
        backends._reads_on.cache_clear()
        assert [case_of(q[:n], k[:n], Rows(2, n//2)).whole for n in (256, 260)] == answer
    backends._reads_on.cache_clear()
