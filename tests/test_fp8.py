"Eight bits: codes, kernels, projections and a model's loss, beside float64 and sixteen bits."
import os
from contextlib import nullcontext

import pytest
import torch

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")
from torch import nn
from torch.testing import assert_close
from ftkit.core import FtkitError
from ftkit.kernels.edges import Edges
from ftkit.kernels.eight import EightProjection, eight_why_not, rms_codes
from ftkit.kernels.fp8 import (CodesBeside, codes_beside, qtensor_scales, qtensor_to_fp8,
                               quantize_rows, scaled_linear, transpose_codes, why_not_fp8)
from ftkit.kernels.glu import glu_backward, glu_forward
from ftkit.kernels.launch import capability, interpreted
from ftkit.kernels.lora import Projection
from ftkit.kernels import middle
from ftkit.kernels.middle import glu_backward_codes, glu_codes
from ftkit.kernels.norm import rms_forward
from ftkit.lora.layers import LoraLinear
from ftkit.quant.fp8 import E4M3, fp8_product, from_fp8, row_scales, to_fp8
from ftkit.quant.linear import QLinear
from ftkit.quant.qtensor import quantize

triton = pytest.importorskip("triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(GPU and capability("cuda") < (8, 9),
                                reason="no tensor cores of e4m3")
cuda = pytest.mark.skipif(not GPU, reason="needs a GPU")


def kernels():
    "On a GPU the kernels themselves; on a CPU Triton's interpreter, if this process has it."
    if GPU: return nullcontext()
    if os.environ.get("TRITON_INTERPRET") != "1": pytest.skip("TRITON_INTERPRET=1 comes too late")
    return interpreted()


def randn(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(DEVICE, dtype)


def off(a, b): return ((a.double() - b.double()).norm()/b.double().norm()).item()


# ------------------------------------------------------------ codes

@pytest.mark.parametrize("scale", (1e-30, 1e-3, 1., 1e30))
def test_rows_of_any_size_come_back(scale):
    x = randn(20, 333)*scale
    codes, scales = to_fp8(x)
    back = from_fp8(codes, scales)
    small = x.abs() < 2**-6*scales  # where the steps no longer shrink
    assert ((back - x).abs() <= torch.where(small, 2**-10*scales, x.abs()/16*1.001)).all()
    assert_close(back.abs().amax(1), x.abs().amax(1))


def test_the_product_and_the_way_back_against_float64():
    x, w, dy = randn(70, 128), 0.02*randn(96, 128, seed=1), randn(70, 96, seed=2)
    w *= torch.logspace(-2, 2, 96, device=DEVICE)[:, None]
    w8, sw = to_fp8(w)
    assert off(fp8_product(*to_fp8(x), w8, sw, torch.float32), x.double() @ w.double().T) < 0.04
    dx = fp8_product(*to_fp8(dy, sw.view(-1)), w8.T, dtype=torch.float32)
    assert off(dx, dy.double() @ w.double()) < 0.045


def test_errors_are_not_one_sided():
    x, w = randn(4000, 64), randn(32, 64, seed=1)
    error = fp8_product(*to_fp8(x), *to_fp8(w), torch.float32) - x @ w.T
    assert abs((error.mean()/error.std()).item()) < 0.02


# ------------------------------------------------------------ kernels

def same(ours, theirs, share=1.):
    "Scales to the last bit, and codes once PyTorch has rounded them."
    assert_close(ours[1], theirs[1], rtol=1e-6, atol=0)
    assert (ours[0].to(E4M3).float() == theirs[0].float()).float().mean() >= share


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("shape", ((1, 1), (7, 33), (3, 1000), (2, 0)))
def test_rows_in_one_pass(shape, dtype):
    if not shape[1]: return
    wide, factors = randn(shape[0], shape[1] + 24, dtype=dtype), randn(shape[1], seed=3)
    x = wide[:, 8:8 + shape[1]]
    for f in None, factors:
        codes = torch.full((shape[0], shape[1] + 5), -1., device=DEVICE)
        with kernels(): ours = quantize_rows(x, f, codes[:, :shape[1]])
        same(ours, to_fp8(x, f), 0.99)
        assert (codes[:, shape[1]:] == -1).all()


def test_rows_that_are_read_twice(monkeypatch):
    monkeypatch.setattr("ftkit.kernels.fp8.WIDEST", 256)
    x, factors = randn(3, 5000), randn(5000, seed=1)
    with kernels(): ours = quantize_rows(x, factors, torch.empty_like(x))
    same(ours, to_fp8(x, factors), 0.99)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("ranks", (1, 16, 48))
@pytest.mark.parametrize("widest", (32768, 64))
def test_numbers_beside_a_row(ranks, widest, dtype, monkeypatch):
    "Two codes each; of rows where they are small, are the largest, or are all there is."
    monkeypatch.setattr("ftkit.kernels.fp8.WIDEST", widest)
    x, small = randn(4, 100, dtype=dtype), randn(4, ranks + 5, seed=1, dtype=dtype)[:, :ranks]
    x[2], small[1] = 0, small[1]*1000
    x[3] = small[3] = 0
    steps, factors = randn(ranks, seed=2).abs() + 0.1, randn(100, seed=3).abs()
    for f in None, factors:
        with kernels(): codes, scales = quantize_rows(
            x, f, torch.empty(4, 100 + 3*ranks, device=DEVICE), beside=(small, steps))
        whole = torch.cat([x.float()*(1 if f is None else f), small.float()*steps], 1)
        assert_close(scales, row_scales(whole), rtol=1e-6, atol=0)
        assert_close(codes[:, :100]*scales, whole[:, :100], rtol=1e-5, atol=1e-6)
        high, low, again = codes[:, 100:].split(ranks, 1)
        assert torch.equal(high, again)
        assert_close((high + low)*scales, whole[:, 100:], rtol=1e-5, atol=1e-6)
        plain, theirs = quantize_rows(x.cpu(), None if f is None else f.cpu(),
                                      beside=(small.cpu(), steps.cpu()))
        high, low, again = plain[:, 100:].float().split(ranks, 1)
        wanted = (whole[:, 100:].cpu()/theirs)
        assert ((high + low - wanted).abs() <= (wanted.abs()/200).clamp(min=2**-10*1.01)).all()
        assert torch.equal(high, again) and high.abs().max() <= 448
        same((codes[:, :100].cpu(), scales.cpu()), (plain[:, :100], theirs), 0.99)


@pytest.mark.parametrize("rows, ranks", ((1, 16), (70, 16), (130, 48)))
def test_factors_beside_a_weight(rows, ranks):
    v, scales = randn(rows, ranks), randn(rows, 1, seed=1).abs() + 0.01
    v[:, 3] = 0
    for v, s in ((v, scales), (v.T.contiguous().T, None)):
        codes, steps = v.new_full((rows, 3*ranks + 2), 7.), v.new_full((ranks,), 7.)
        with kernels(): codes_beside(v, codes[:, :-2], steps, s)
        whole = v if s is None else v/s
        assert_close(steps, whole.abs().amax(0)/448) and steps[3] == 0
        high, again, low = codes[:, :-2].split(ranks, 1)
        assert torch.equal(high, again) and (codes[:, -2:] == 7).all()
        assert_close((high + low)*steps, whole, rtol=1e-5, atol=1e-6)
        plain, theirs = torch.empty(rows, 3*ranks, dtype=E4M3), torch.empty(ranks)
        codes_beside(v.cpu(), plain, theirs, None if s is None else s.cpu())
        assert_close(theirs, steps.cpu())
        parts = plain.float().split(ranks, 1)
        assert off((parts[0] + parts[2])*theirs, whole.cpu()) < 0.004


def beside_calls(shapes, dtype=torch.float32, seed=0):
    "Arguments of `codes_beside`; on a CPU codes are float32, as Triton's interpreter misrounds."
    for i, (rows, ranks, turned) in enumerate(shapes):
        v, s = randn(rows, ranks, seed=seed + i, dtype=dtype), randn(rows, 1, seed=9).abs() + 0.01
        codes = torch.full((rows, 3*ranks + 32), 7., device=DEVICE)
        if GPU: codes = codes.to(E4M3)
        steps = torch.full((ranks,), 7., device=DEVICE)
        yield v.T.contiguous().T if turned else v, codes[:, 16:-16], steps, None if turned else s


def raw(t): return t.contiguous().view(torch.uint8)


def clones(calls):
    for v, codes, steps, s in calls:
        copy = codes._base.clone()
        yield v, copy[:, 16:-16], steps.clone(), s


@pytest.mark.filterwarnings("ignore:invalid value")  # NaN
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_factors_beside_many_weights(dtype):
    "In two launches what comes out one by one, to the last bit; again with other factors."
    shapes = (16, 16, False), (272, 48, False), (592, 64, True), (256, 16, True), (528, 32, False)
    ours = list(beside_calls(shapes, dtype))
    theirs = list(clones(ours))
    with kernels():
        many = CodesBeside(ours)
        assert len(many.table[1]) == 1 + 2*3 + 3*4 + 1 + 3*2
        for change in range(3):
            for v, *_ in ours:
                v.mul_(-1.7**change)
                if change == 0: v[:, 3] = 0
                if change == 2: v[-1, 5], v[3, 7] = float("nan"), float("inf")
            many()
            for call in theirs: codes_beside(*call)
            for a, b in zip(ours, theirs):
                assert torch.equal(raw(a[1]._base), raw(b[1]._base))
                assert torch.equal(raw(a[2]), raw(b[2])) and (change == 2 or a[2][3] == 0)
    assert ours[0][2][5].isnan() and ours[0][2][7].isinf()


def test_factors_beside_many_weights_of_all_kinds():
    "Of several types, at odd places, or by formulas: one by one."
    def both(calls, table=False):
        theirs = list(clones(calls))
        with kernels():
            many = CodesBeside(calls)
            many()
            for call in theirs: codes_beside(*call)
        assert (many.table is not None) == table
        for a, b in zip(calls, theirs): assert torch.equal(raw(a[1]), raw(b[1]))
    some = list(beside_calls([(48, 16, False), (32, 16, True)]))
    both(some, table=True)
    both(some[1:], table=True)  # no scales at all
    both(some + list(beside_calls([(48, 16, False)], torch.float16)))
    for odd in ((40, 16, False), (48, 24, False), (40, 16, True)):
        both(some + list(beside_calls([odd])))
    (v, *rest), = beside_calls([(48, 16, False)])
    both(some + [(v.new_zeros(48*16 + 1)[1:].view(48, 16).copy_(v), *rest)])
    both(some + [(v.new_zeros(48, 40)[:, ::2][:, :16].copy_(v), *rest)])
    CodesBeside([])()
    plain = [tuple(t if t is None else t.cpu() for t in call) for call in some]
    if not GPU:
        CodesBeside(plain)()
        for a, b in zip(plain, some): assert_close(a[2], b[2].cpu())


def test_no_rows():
    with kernels(): codes, scales = quantize_rows(randn(0, 64))
    assert codes.shape == (0, 64) and scales.shape == (0, 1)


@pytest.mark.parametrize("shape", ((1, 1), (128, 128), (130, 257)))
def test_bytes_turn(shape):
    codes = randn(*shape).to(E4M3)
    out = torch.empty(shape[1], shape[0] + 3, dtype=E4M3, device=DEVICE)[:, :shape[0]]
    with kernels(): transpose_codes(codes, out)
    assert torch.equal(out.float(), codes.float().T)


@pytest.mark.parametrize("kind, block, double, shape", (
    ("nf4", 64, True, (130, 192)), ("fp4", 32, False, (64, 72)), ("nf4", 128, True, (33, 40)),
    ("nf4", 64, True, (5, 13))))
def test_from_four_bits(kind, block, double, shape):
    q = quantize(0.02*randn(*shape), kind, block, double)
    scales = qtensor_scales(q)
    assert_close(scales, row_scales(q.dequantize(torch.float32)))
    theirs = to_fp8(q.dequantize(torch.float32))[0]
    wide = torch.full((shape[1], shape[0] + 7), 3., device=DEVICE)
    with kernels():
        straight = qtensor_to_fp8(q, scales, torch.empty(shape, device=DEVICE))
        turned = qtensor_to_fp8(q, scales, wide[:, :shape[0]], transposed=True)
    same((straight, scales), (theirs, scales), 0.995)
    assert torch.equal(turned, straight.T) and (wide[:, shape[0]:] == 3).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("width", (64, 100, 1000))
def test_the_norm_with_codes(width, dtype):
    x, r, weight = randn(5, width, dtype=dtype), randn(5, width, seed=1, dtype=dtype), \
        randn(width, seed=2, dtype=dtype)
    for plus, residual, scale in (0., None, 1.), (1., r, 1.), (0., r, 0.3):
        room = torch.empty(5, width, device=DEVICE)
        with kernels(): ours = rms_codes(x, weight, 1e-6, plus, residual, scale=scale, codes=room)
        theirs = rms_forward(x, weight, 1e-6, plus, residual, scale=scale)
        for a, b in zip(ours, theirs): assert_close(a, b, rtol=2e-3, atol=2e-3)
        same(ours[3:], to_fp8(ours[0]), 0.99)


@pytest.mark.parametrize("act", ("silu", "gelu_tanh", "gelu"))
@pytest.mark.parametrize("width", (48, 700))
def test_the_gated_middle_with_codes(act, width):
    gate_up, dh, factors = randn(4, 2*width), randn(4, width, seed=1), randn(2*width, seed=2).abs()
    for up_first in False, True:
        with kernels():
            h, *codes = glu_codes(gate_up, act, up_first=up_first, codes=torch.empty_like(dh))
        assert_close(h, glu_forward(gate_up, act, up_first=up_first), rtol=1e-5, atol=1e-6)
        same(codes, to_fp8(h), 0.99)
        again = torch.empty_like(dh)
        with kernels():
            d, *codes = glu_backward_codes(dh, gate_up, factors, act, h=again, up_first=up_first,
                                           codes=torch.empty_like(gate_up))
        assert_close(d, glu_backward(dh, gate_up, act, up_first=up_first), rtol=1e-4, atol=1e-5)
        assert_close(again, h, rtol=1e-5, atol=1e-6)
        same(codes, to_fp8(d, factors), 0.99)


@pytest.mark.parametrize("again", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("width", (1, 33, 2048, 4500, 16384, 16400))
def test_the_gated_middle_in_place(width, dtype, again):
    """Against float64, with rows apart; the gradient over gate and up, the result over its own; one
    row too wide for a program to hold."""
    room = randn(3, 2*width + 24, dtype=dtype)
    gate_up, dh = room[:, 8:2*width + 8], randn(3, width + 8, seed=1, dtype=dtype)[:, :width]
    factors, exact = randn(2*width, seed=2).abs(), glu_forward(gate_up.double())
    theirs = glu_backward(dh.double(), gate_up.double())
    made = torch.full((3, 2*width + 8), -1., device=DEVICE)
    near, close = {torch.float32: (1e-5, dict(rtol=1e-4, atol=1e-5)),
                   torch.float16: (2e-3, dict(rtol=2e-3, atol=1e-3)),
                   torch.bfloat16: (8e-3, dict(rtol=1e-2, atol=1e-3))}[dtype]
    with kernels(): h, codes, scales = glu_codes(gate_up, codes=made[:, :width])
    assert_close(h.double(), exact, **close)
    same((codes, scales), to_fp8(h), 0.99)
    assert (made[:, width:] == -1).all()
    edges, was = (room[:, :8].clone(), room[:, -16:].clone()), dh.clone()
    with kernels(): d, codes, scales = glu_backward_codes(
        dh, gate_up, factors, out=gate_up, h=dh if again else None, codes=made[:, :2*width])
    assert d is gate_up and off(d, theirs) < near
    if again: assert_close(dh.double(), exact, **close)
    else: assert torch.equal(dh, was)
    same((codes, scales), to_fp8(d, factors), 0.99)
    assert torch.equal(room[:, :8], edges[0]) and torch.equal(room[:, -16:], edges[1])
    assert (made[:, 2*width:] == -1).all()


@pytest.mark.parametrize("spare", (0, 80, 128))
def test_columns_to_spare_become_zeros(spare):
    "So that a row of codes is whole tiles."
    x, small, steps = randn(5, 100), randn(5, 16, seed=1), randn(16, seed=2).abs()
    for way in kernels, nullcontext:
        codes = torch.full((5, 148 + spare), 7., device=DEVICE)
        with way(): quantize_rows(x, None, codes, beside=(small, steps))
        assert (codes[:, 148:] == 0).all() and (codes[:, 100:148] != 7).any()
    with pytest.raises(ValueError, match="at most 128 more"):
        quantize_rows(x, None, torch.empty(5, 300, device=DEVICE), beside=(small, steps))


def test_rows_that_are_held_are_as_those_that_are_read_back(monkeypatch):
    "To the last bit, in 16 bits: of few numbers, in parts, and whole."
    for width, dtype in (5, torch.bfloat16), (4864, torch.float16), (11008, torch.bfloat16):
        gate_up, dh = randn(2, 2*width, dtype=dtype), randn(2, width, seed=1, dtype=dtype)
        factors, found = randn(2*width, seed=2).abs(), []
        for most in 20480, 0:
            monkeypatch.setattr(middle, "_HELD", most)
            h, like = torch.empty_like(dh), torch.empty_like(gate_up, dtype=torch.float32)
            with kernels(): found.append([h, *glu_codes(gate_up, codes=like[:, :width].clone()),
                *glu_backward_codes(dh, gate_up, factors, h=h, codes=like.clone()),
                *glu_backward_codes(dh, gate_up, factors, codes=like.clone())])
        for a, b in zip(*found): assert torch.equal(a, b)


def test_how_rows_are_held():
    "Eight numbers of a block a thread; never more threads than numbers."
    for way, width, block, steps, warps in (
            (middle._way, 14336, 2048, 7, 8), (middle._way, 18944, 2048, 10, 8),
            (middle._way, 70, 128, 1, 1), (middle._way_back, 14336, 4096, 4, 16),
            (middle._way_back, 18944, 4096, 5, 16), (middle._way_back, 4864, 4096, 2, 16),
            (middle._way_back, 1000, 1024, 1, 4), (middle._way_back, 70, 128, 1, 1)):
        assert way(width)[1] == dict(BLOCK=block, STEPS=steps, num_warps=warps)
    assert middle._way(20480)[0] is middle._codes_kernel is not middle._way(20481)[0]
    assert middle._way_back(20480)[0] is middle._codes_back_kernel
    assert middle._way_back(28672)[1] == dict(BLOCK=8192, STEPS=4, num_warps=32)
    for n in range(16):
        for how in middle._way(2**n)[1], middle._way_back(2**n)[1]:
            assert how["BLOCK"] >= min(2**n, 32*how["num_warps"])


@cuda
def test_compiled_kernels_round_as_pytorch():
    x = randn(300, 4096, dtype=torch.bfloat16)
    codes, scales = quantize_rows(x)
    theirs = to_fp8(x)
    assert torch.equal(scales, theirs[1])
    if capability("cuda") < (9, 0): return  # by way of float16, rounded twice
    assert (codes.float() != theirs[0].float()).float().mean() < 1e-4
    q = quantize(0.02*randn(1024, 4096, dtype=torch.bfloat16))
    scales = qtensor_scales(q)
    straight = qtensor_to_fp8(q, scales)
    theirs = to_fp8(q.dequantize(torch.float32), scales=scales)[0]
    assert (straight.float() != theirs.float()).float().mean() < 1e-3
    assert torch.equal(qtensor_to_fp8(q, scales, transposed=True).float(), straight.float().T)


@cuda
def test_the_product_of_tensor_cores():
    x, w = randn(333, 256, dtype=torch.bfloat16), randn(96, 256, seed=1, dtype=torch.bfloat16)
    codes = *quantize_rows(x), *quantize_rows(w)
    assert off(scaled_linear(*codes), fp8_product(*codes, torch.float32)) < 0.005
    assert off(scaled_linear(*codes), x.double() @ w.double().T) < 0.045


COMPILED = """
import re, subprocess
from pathlib import Path
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ftkit.kernels.eight import _norm_codes_kernel, _onto_kernel
from ftkit.kernels.fp8 import (_all_beside_kernel, _beside_kernel, _rows_kernel, _tops_kernel,
                               _turn_kernel, _turned_kernel, _wide_rows_kernel)
from ftkit.kernels import middle

def compiled(kernel, types, warps=8, arch=90, **constants):
    types = dict(t.split(":") for t in types.split())
    signature = types | {k: "constexpr" for k in constants}
    even = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types) if types[t] != "fp32"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=even)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=warps))

def spilled(k):
    "Bytes of registers that `ptxas` puts into memory."
    arch = k.metadata.target.arch
    Path("k.ptx").write_text(k.asm["ptx"])
    found = subprocess.run([knobs.nvidia.ptxas.path, "-v", f"-arch=sm_{arch}" + "a"*(arch == 90),
                            "k.ptx", "-o", "k.cubin"], capture_output=True, text=True, check=True)
    return int(re.search(r"(\\d+) bytes spill stores", found.stderr)[1])

def typed(kernel, **types):
    return " ".join(f"{n}:{types.get(n, 'i32')}" for n in kernel.arg_names if not n.isupper())

bf16 = lambda names: dict.fromkeys(names.split(), "*bf16")
fp8 = lambda names: dict.fromkeys(names.split(), "*fp8e4nv")
fp32 = lambda names: dict.fromkeys(names.split(), "*fp32")
rows = typed(_rows_kernel, **bf16("x small"), **fp32("factors steps scales"), **fp8("codes"))
many = [compiled(_rows_kernel, rows, 16, 89, FACTORS=True, SMALL=0, BLOCK=16384),
        compiled(_rows_kernel, rows, 4, FACTORS=True, SMALL=16, BLOCK=4096),
        compiled(_rows_kernel, rows, 4, 89, FACTORS=False, SMALL=64, BLOCK=4096),
        compiled(_wide_rows_kernel, rows, FACTORS=False, SMALL=32, BLOCK=4096)]
beside = typed(_beside_kernel, **bf16("v"), **fp32("top scales steps"), **fp8("codes"))
for s in True, False: compiled(_beside_kernel, beside, 4, SCALES=s, SMALL=32, HIGH=64)
all_beside = dict(table="*i64", owners="*i32", tops="*i32", **bf16("v"), **fp32("scales steps"),
                  **fp8("codes"))
for arch in 89, 90:
    tops = compiled(_tops_kernel, typed(_tops_kernel, **all_beside), 4, arch, HIGH=256)
    right = compiled(_all_beside_kernel, typed(_all_beside_kernel, **all_beside), 4, arch,
                     TILES=128, HIGH=256)
    for k in tops, right:
        assert "ld.local" not in k.asm["ptx"] and "ld.global.v4" in k.asm["ptx"]
    assert "div.rn.f32" in tops.asm["ptx"] and "st.global.v4" in right.asm["ptx"]
compiled(_turn_kernel, "codes:*u8 out:*u8 rows:i32 columns:i32 stride:i32 out_stride:i32", SIDE=128)
compiled(_turned_kernel, "codes:*i32 absmax:*u8 nested:*fp32 offset:*fp32 values:*fp32 "
         "table:*fp32 factors:*fp32 out:*fp8e4nv rows:i32 stride:i32 first:i32", COLUMNS=4096,
         BLOCK=64, HIGH=128, WORDS=8, DOUBLE=True, SHUFFLE=True)
norm = compiled(_norm_codes_kernel, "x:*bf16 residual:*bf16 weight:*bf16 y:*bf16 summed:*bf16 "
    "inverse:*fp32 codes:*fp8e4nv scales:*fp32 eps:fp32 scale:fp32 width:i32 xs:i32 rs:i32 ys:i32 "
    "ss:i32 cs:i32", 4, BLOCK=4096, PLUS=0., ADD=True)
def held(kernel, how, arch, **more):
    types = typed(kernel, **bf16("gate up h dh dgate dup"), **fp32("fg fu scales"),
                  **fp8("codes cg cu"))
    warps = how.pop("num_warps")
    return compiled(kernel, types, warps, arch, ACT="silu", **how, **more)

for arch, width in (89, 14336), (90, 14336), (90, 11008), (90, 4864), (89, 18944), (90, 28672):
    middles = [held(*middle._way(width), arch)]
    for again in True, False:
        for words in (True, False)[:1 + (width < 16384)]:
            middles.append(held(*middle._way_back(width), arch, AGAIN=again, WORDS=words))
            alone = "cvt.rn.bf16.f32" in middles[-1].asm["ptx"]  # numbers rounded one by one
            assert alone != words or width > 20480
    for k in middles: assert "bar.sync" in k.asm["ptx"]
    for k in middles: assert spilled(k) <= (32 if width == 18944 else 0)  # almost too wide to hold
    many += middles
factor = typed(middle._factor_kernel, **bf16("dh gate up dgate dup dxa"), **fp32("sums"))
factor = compiled(middle._factor_kernel, factor, 4, ACT="silu", RANK=16, PREC="ieee", HOLD=True,
                  M=32, N=64)
numbers = 32*64//128 # of a thread: each has its exponential once, also for the product
assert factor.asm["ptx"].count("ex2.approx") == numbers and not spilled(factor)
compiled(_onto_kernel, typed(_onto_kernel, factor="fp32", **bf16("y x b residual out")), 4, RANK=16,
         HOW="ieee", M=64, N=64)
for k in norm, *many:
    old = k.metadata.target.arch < 90  # by way of float16
    assert (("e4m3x2.f16x2" if old else "e4m3x2.f32") in k.asm["ptx"])
    assert "ld.local" not in k.asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="they are compiled for the GPU itself")
def test_kernels_compile_without_a_gpu(tmp_path):
    import subprocess, sys
    from pathlib import Path
    (tmp_path/"program.py").write_text(COMPILED)
    env = os.environ | dict(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=(
        os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])))
    done = subprocess.run([sys.executable, tmp_path/"program.py"], env=env, capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


# ------------------------------------------------------------ projections

def layers(*outs, width=64, r=4, quantized=False, bias=True, dropout=0.):
    torch.manual_seed(0)
    made = []
    for i, n in enumerate(outs):
        base = nn.Linear(width, n, bias=bias and i % 2 == 1).requires_grad_(False)
        if quantized: base = QLinear.from_linear(base)
        m = LoraLinear(base, r=r, alpha=2*r, dropout=dropout) if r and i < 2 else base
        if r and i < 2: nn.init.normal_(m.B, std=0.05)
        made.append(m.to(DEVICE))
    return made


def dense(m): return m.weight.detach().float()


@pytest.mark.parametrize("keep", ("both", "one", "none"))
@pytest.mark.parametrize("quantized", (False, True))
def test_a_projection_is_near_that_in_sixteen_bits(keep, quantized):
    modules = layers(64, 32, 32, quantized=quantized)
    x, dy = randn(50, 64), randn(50, 128, seed=1)
    exact, eight = Projection(modules), EightProjection(modules, keep=keep)
    (y, xa), (y8, xa8) = exact.project(x), eight.project(x)
    assert torch.equal(xa, xa8) and 0.005 < off(y8, y) < 0.045
    (dx, grads), (dx8, grads8) = (p.project_backward(dy, x, xa) for p in (exact, eight))
    assert 0.005 < off(dx8, dx) < 0.05
    for a, b in zip(grads, grads8): assert_close(a, b)
    for again in eight.codes(), eight.codes(True).T:  # what the codes say of the weights
        w = torch.cat([dense(m) for m in modules])
        assert off(from_fp8(again, eight.scales), w) < 0.03


def wide(*outs, width=512, r=16, quantized=False, bias=False, dropout=0., std=0.05, weight=None):
    made = layers(*outs, width=width, r=r, quantized=quantized, bias=bias, dropout=dropout)
    for m in made:
        if weight is not None: m.base.weight.data.mul_(weight)
        if isinstance(m, LoraLinear): nn.init.normal_(m.B, std=std)
    return made


def near(modules, T, keep, most=0.045, outliers=False, **how):
    "How far outputs, the gradient of the inputs and the others are from those in sixteen bits."
    width, outs = modules[0].in_features, sum(m.out_features for m in modules)
    x, dy = randn(T, width), randn(T, outs, seed=1)
    if outliers: x[T//2] *= 300; x[:, 5] *= 30; dy[0] *= 1e4
    exact, eight = Projection(modules), EightProjection(modules, keep=keep)
    (y, xa), (y8, xa8) = exact.project(x, **how), eight.project(x, **how)
    (dx, grads), (dx8, grads8) = (p.project_backward(dy, x, xa, **how) for p in (exact, eight))
    if xa is not None: assert_close(xa, xa8)
    for a, b in zip(grads, grads8):
        if a is not None: assert_close(a, b, rtol=1e-4, atol=1e-4*a.abs().max().item())
    rows = [((a - b).norm(dim=1)/b.norm(dim=1)).max().item() for a, b in ((y8, y), (dx8, dx))]
    assert max(rows) < 2*most and max(off(y8, y), off(dx8, dx)) < most, rows
    return eight


@pytest.mark.parametrize("T", (1, 17, 333))
@pytest.mark.parametrize("r, quantized", ((8, False), (16, True), (12, False)))
def test_lora_within(r, T, quantized):
    "There (wide outputs), back (wide inputs) or both ways (square), with factors of all sizes."
    for std in 0.002, 0.5, 50.:
        for outs, width, joined in (((768, 768), 512, (True, False)), ((512,), 1024, (False, True)),
                                    ((512,), 512, (True, True))):
            modules = wide(*outs, width=width, r=r//len(outs), quantized=quantized, std=std)
            assert near(modules, T, "both", outliers=T > 1).joined == joined


@pytest.mark.parametrize("keep", ("both", "one", "none"))
@pytest.mark.parametrize("quantized", (False, True))
def test_only_lora_is_left(keep, quantized):
    "Weights of next to nothing: what comes out is LoRA's, within a percent."
    some = ((512, 1024), 16), ((1024, 512), 16), ((1536, 3072), 64), ((3072, 1536), 64)
    for shape, r in some[:2] if quantized else some:
        p = near(wide(shape[1], width=shape[0], r=r, quantized=quantized, weight=None if quantized
                      else 1e-6, std=1e4 if quantized else 0.05), 17, keep, most=0.01)
        assert sum(p.joined) == 1


def test_lora_within_and_biases_dropout_or_none():
    near(wide(768, 768, width=512, r=8, bias=True), 17, "both")
    near(wide(768, 768, width=512, r=8, bias=True, dropout=0.3), 17, "both", seed=3)
    near(wide(512, width=1536, dropout=0.3), 17, "one", seed=3)
    for m in (some := wide(1024, width=512) + wide(512, width=1024)): m.enabled = False
    assert near(some[:1], 17, "both").joined[0] and near(some[1:], 17, "none").joined[1]


def test_layers_that_share_memory_have_factors_of_their_own():
    "And those that `Edges` spreads are written once until the next time."
    a, b = (EightProjection(wide(1024, quantized=True, std=std)) for std in (0.05, 5.))
    x = randn(17, 512)
    for _ in range(2):
        for p in a, b: assert off(p.project(x)[0], Projection(p.modules).project(x)[0]) < 0.045
    p = EightProjection(modules := wide(1024), wait=False)
    p.hold(torch.float32)
    edges, written = Edges([p]), []
    for i in range(3):
        edges.spread()
        for _ in range(2): y = p.project(x)[0]
        assert off(y, Projection(modules).project(x)[0]) < 0.045
        written.append(p.stamps[0])
        modules[0].B.data.add_(1 + i)
    assert len({id(w) for w in written}) == 3
    assert off(p.project(x)[0], y) == 0  # nothing has been spread since
    edges.close()
    assert off(p.project(x)[0], Projection(modules).project(x)[0]) < 0.045


def right_of(p, turned):
    "The bytes beside held codes, and the steps."
    return p.held[turned].view(torch.uint8)[:, (p.K, p.N)[turned]:].clone(), p.steps[int(turned)]*1


@pytest.mark.parametrize("formula", (False, True))
@pytest.mark.parametrize("keep", ("both", "one", "none"))
def test_factors_of_all_projections_at_once(keep, formula, monkeypatch):
    "What `Edges` has written is, to the last bit, what each projection writes by itself."
    shapes = ((1024,), 512, 16), ((512,), 1024, 16), ((768, 768), 768, 8), ((256,), 768, 5), \
        ((64,), 64, 4)
    loras = [wide(*outs, width=width, r=r) for outs, width, r in shapes]
    make = lambda: [EightProjection(m, keep=keep, wait=False) for m in loras]
    ours, theirs, written = make(), make(), []
    monkeypatch.setattr("ftkit.kernels.eight.codes_beside", lambda *a: written.append(a) or
                        codes_beside(*a))
    for p in ours + theirs: p.hold(torch.bfloat16)
    context = nullcontext if formula else kernels
    with context():
        edges = Edges(ours)
        for i in range(3):
            edges.spread()
            assert not written
            for p, q in zip(ours, theirs):
                q.spread(q.views.A, q.views.sB)
                for turned in p.held:
                    assert (p.stamps[turned] is edges.turn) == p.joined[turned]
                    if not p.joined[turned]: continue
                    assert p._beside(p.views, p.held[turned], turned) is not None and not written
                    q._beside(q.views, q.held[turned], turned)
                    assert written.pop() and right_of(p, turned)[1].any()
                    assert all(map(torch.equal, right_of(p, turned), right_of(q, turned)))
            for t in (t for p in ours for t in p.factors): t.data.mul_(1.5).add_(0.01*i)
        if keep == "none": assert not any(p.held for p in ours)
        tables = [made[1] for made in edges.made.values() if made]
        assert len(tables) == (keep != "none")
        edges.spread()
        assert all(made[1] is t for made, t in zip(edges.made.values(), tables))  # made once
    if tables: assert (tables[0].table is None) == (formula and not GPU)


def test_factors_at_once_are_never_old():
    "With LoRA off, factors elsewhere, weights replaced, or nobody to spread them."
    p = EightProjection(modules := wide(1024), wait=False)
    x, m = randn(17, 512), modules[0]
    right = lambda: off(p.project(x)[0], Projection(modules).project(x)[0]) < 0.045
    p.hold(torch.float32)
    edges = Edges([p])
    def again(change):
        change()
        edges.spread()
        assert p.stamps[0] is edges.turn and right() and p.stamps[0] is edges.turn
    def elsewhere(): m.B.data = randn(1024, 16, seed=4)
    again(lambda: None)
    known, = edges.made.values()
    again(lambda: m.B.data.mul_(-9))
    again(elsewhere)
    assert edges.made[p.together] is known  # these were copied to the same place
    m.enabled = False
    edges.spread()
    assert p.stamps[0] is not edges.turn and right() and edges.made[p.together] is known
    m.enabled = True
    assert right() and p.stamps[0] is edges.turn  # written by itself
    m.base.weight.data.mul_(0.3)
    m.base.weight.data = m.base.weight.data*1
    m.B.data.mul_(-2)
    edges.spread()
    assert right() and right() and p.stamps[0] is edges.turn  # codes were made anew since
    again(lambda: m.B.data.mul_(3))
    assert edges.made[p.together] is not known
    half = x.bfloat16()  # another type than the one that is held
    assert off(p.project(half)[0].float(), Projection(modules).project(x)[0]) < 0.05
    assert right()
    edges.close()
    m.B.data.mul_(-5)
    assert right() and p.stamps[0] is None
    p.release(); p.hold(torch.float32)
    edges = Edges([p])
    again(lambda: m.B.data.mul_(0.1))


def test_hold_and_release_change_nothing():
    p = EightProjection(layers(64, 32))
    x, dy = randn(9, 64), randn(9, 96, seed=1)
    def run():
        y, xa = p.project(x)
        dx, grads = p.project_backward(dy, x, xa)
        return [y, dx, *grads]
    before = run()
    assert p.hold(torch.float32)
    held = run()
    p.release()
    assert not p.held and p.scales is None
    for a, b, c in zip(before, held, run()): assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("outs", ((64, 32), (64,)))  # the second is square
def test_layers_that_share_memory_do_not_mix(outs):
    a, b = (EightProjection(layers(*outs, quantized=True)) for _ in range(2))
    for m in b.modules: m.base.load_qtensor(quantize(-2*dense(m.base)))
    x, dy = randn(9, 64), randn(9, sum(outs), seed=1)
    for _ in range(2):
        for p in a, b:
            w = torch.cat([dense(m.base) for m in p.modules])
            y, xa = p.project(x)
            plain = Projection(p.modules)
            assert off(y, plain.project(x)[0]) < 0.05
            dx, exact = (kind.project_backward(dy, x, xa)[0] for kind in (p, plain))
            assert off(dx, exact) < 0.05
            assert off(from_fp8(p.codes(), p.scales), w) < 0.03


def test_the_way_back_in_sixteen_bits_and_sums():
    modules = layers(64, 32)
    x, dy, more = randn(9, 64), randn(9, 96, seed=1), randn(9, 64, seed=2)
    p, exact = EightProjection(modules, back=False), Projection(modules)
    xa = p.project(x)[1]
    assert_close(p.project_backward(dy, x, xa)[0], exact.project_backward(dy, x, xa)[0])
    p = EightProjection(modules)
    dx, room = p.project_backward(dy, x, xa)[0], more.clone()
    assert_close(p.project_backward(dy, x, xa, out=room, add=room)[0], dx + more)
    assert_close(room, dx + more)
    known = quantize_rows(dy, p.column_factors)
    assert torch.equal(p.project_backward(dy, x, xa, codes=known)[0], dx)
    assert p.project_backward(dy, x, xa, need_x=False)[0] is None


def test_dropout_and_autograd():
    modules = layers(64, 32, dropout=0.5)
    p, exact = EightProjection(modules), Projection(modules)
    x = randn(200, 64).requires_grad_()
    for seed in 1, 2:
        y, y8 = exact(x, seed), p(x, seed)
        assert off(y8, y) < 0.05
        a, b = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, y8))
        assert off(b, a) < 0.08
    with pytest.raises(ValueError, match="seed"): p.project(x)


def test_what_eight_bits_refuse():
    assert eight_why_not(layers(64, 32)) is None
    assert "learn" in eight_why_not([nn.Linear(64, 64)])
    assert "multiple of 16" in why_not_fp8("cpu", 64, 72, 16)
    odd = [nn.Linear(24, 64).requires_grad_(False)]
    with pytest.raises(FtkitError, match="not in eight bits.*24"): EightProjection(odd)
    with pytest.raises(FtkitError, match="no way to keep"): EightProjection(layers(64), keep="all")


# ------------------------------------------------------------ training

@pytest.mark.parametrize("hold", (False, True))
@pytest.mark.parametrize("quantized", (False, True))
def test_a_model_computed_by_hand(quantized, hold):
    from transformers import LlamaConfig, LlamaForCausalLM
    from ftkit import fast
    from ftkit.lora.inject import LoraConfig, add_lora
    from ftkit.quant.linear import quantize_model
    ids, found = torch.randint(0, 128, (2, 40), device=DEVICE), []
    for compute in "auto", "fp8":
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2)).to(DEVICE)
        if quantized: quantize_model(model)
        add_lora(model, LoraConfig(r=4, alpha=8))
        for name, p in model.named_parameters():
            if name.endswith(".B"): nn.init.normal_(p, std=0.02)
        fast.speed_up(model.train(), compute=compute, hold=hold)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        found.append((loss, torch.cat(grads)))
    (loss, grads), (loss8, grads8) = found
    assert loss8.item() == pytest.approx(loss.item(), rel=2e-3) and off(grads8, grads) < 0.08


def small_model(r=4, **how):
    from transformers import LlamaConfig, LlamaForCausalLM
    from ftkit.lora.inject import LoraConfig, add_lora
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2)).to(DEVICE)
    add_lora(model, LoraConfig(r=r, alpha=2*r, **how))
    for name, p in model.named_parameters():
        if name.endswith(".B"): nn.init.normal_(p, std=0.02)
    return model.train()


def step(model):
    ids = torch.arange(30, device=DEVICE).view(2, 15)*7 % 128
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return loss.detach(), torch.cat(grads)


@pytest.mark.parametrize("how", (dict(r=8), dict(r=3), dict(r=8, dropout=0.3),
                                 dict(r=8, targets=["up_proj", "q_proj"])), ids=str)
def test_a_model_with_lora_within(how, monkeypatch):
    "As near to sixteen bits as with LoRA's products by themselves; by formulas and by kernels."
    from ftkit.fast import speed_up
    model = small_model(**how)
    torch.manual_seed(1)
    speed_up(model)
    loss, grads = step(model)
    for share in 8, 0.5:
        monkeypatch.setattr("ftkit.kernels.eight.SHARE", share)
        model = small_model(**how)
        torch.manual_seed(1)
        speed_up(model, compute="fp8")
        loss8, grads8 = step(model)
        assert loss8.item() == pytest.approx(loss.item(), rel=2e-3) and off(grads8, grads) < 0.1
        part = model.model.layers[0].__dict__["_fast"][0].parts[0].mlp
        assert part.gate_up.joined == (share < 1, False) and not part.down.joined[0]
        assert part.down.joined[1] == (share < 1 and "targets" not in how)
    if how != dict(r=8): return
    with kernels(): loss8, grads8 = step(model)
    assert loss8.item() == pytest.approx(loss.item(), rel=5e-3) and off(grads8, grads) < 0.15


@pytest.mark.parametrize("hold", (False, True))
def test_factors_within_are_the_newest(hold, monkeypatch):
    "After an optimizer's step, an accumulated batch and a pass without LoRA."
    from ftkit.fast import speed_up
    monkeypatch.setattr("ftkit.kernels.eight.SHARE", 0.5)
    models = [small_model(r=8), small_model(r=8)]
    speed_up(models[0], compute="fp8", hold=hold)
    for i in range(3):
        loss, grads = step(models[0])
        speed_up(models[1], compute="fp8", hold=False)  # makes all of it anew
        fresh, theirs = step(models[1])
        assert_close(loss, fresh, rtol=1e-5, atol=1e-6), assert_close(grads, theirs, rtol=1e-3,
                                                                      atol=1e-6)
        for model in models:
            for n, p in model.named_parameters():
                if n.endswith(".B"): p.data.mul_(-3).add_(0.1)
        ids, loras = torch.arange(30, device=DEVICE).view(2, 15), [
            m for model in models for m in model.modules() if isinstance(m, LoraLinear)]
        for m in loras: m.enabled = False
        with torch.no_grad(): a, b = (model(input_ids=ids, use_cache=False).logits
                                      for model in models)
        assert_close(a, b, rtol=1e-4, atol=1e-5)
        for m in loras: m.enabled = True


def test_weights_wait_while_they_have_codes(monkeypatch):
    from ftkit import fast
    class Waiting(EightProjection):
        def __init__(self, modules): super().__init__(modules, wait=True)
    monkeypatch.setitem(fast.COMPUTE, "fp8", Waiting)
    model = small_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weight = model.model.layers[0].mlp.down_proj.base.weight
    places = [weight.data_ptr()]
    fast.speed_up(model, compute="fp8", hold=True)
    def note():
        places.append(weight.data_ptr())
        for n, t in model.state_dict().items(): assert torch.equal(t.to(DEVICE), before[n]), n
    loss, grads = step(model); note()
    part = model.model.layers[0].__dict__["_fast"][0].parts[0]
    with torch.no_grad():  # an ordinary call, which multiplies by the weights themselves
        for _ in range(2): model(input_ids=torch.tensor([[1, 2]], device=DEVICE), use_cache=True)
    note()
    again = step(model); note()
    near = lambda a, b: torch.equal(a, b) or GPU and off(a, b) < 1e-5  # sums in another order
    assert near(again[0], loss) and near(again[1], grads)
    assert part is model.model.layers[0].__dict__["_fast"][0].parts[0]  # the codes are the same
    assert places[1] == places[3] != places[2]
    if GPU: assert weight.device.type == "cpu"
    fast.slow_down(model); note()
    assert weight.device.type == DEVICE and not part.mlp.down.copies


def losses(kind, steps, device=DEVICE):
    "A small residual network whose frozen layers carry LoRA, taught another one's answers."
    torch.manual_seed(0)
    blocks = [layers(192, width=64, r=8, bias=False) + layers(64, width=192, r=8, bias=False)
              for _ in range(3)]
    for b in blocks:
        for m in b: nn.init.zeros_(m.B)
    ups, downs = zip(*[[kind([m]) for m in b] for b in blocks])
    teacher = torch.randn(64, 64, device=device)/8
    params = [t for p in ups + downs for t in p.trainable]
    step = torch.optim.AdamW(params, lr=3e-3)
    out = []
    for i in range(steps):
        x = randn(256, 64, seed=i)
        h = x
        for up, down in zip(ups, downs):
            h = h + down(nn.functional.silu(up(nn.functional.rms_norm(h, (64,)))))
        loss = (h - x @ teacher).square().mean()
        step.zero_grad(); loss.backward(); step.step()
        out.append(loss.item())
    return torch.tensor(out)


def test_training_reaches_the_same_loss():
    exact, eight = losses(Projection, 60), losses(EightProjection, 60)
    assert exact[-5:].mean() < 0.7*exact[0]
    assert abs(eight[-5:].mean()/exact[-5:].mean() - 1) < 0.01
