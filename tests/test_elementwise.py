"Norms, rotary embeddings and gated activations: the kernels against float64, and transformers."
import warnings
from contextlib import nullcontext
import pytest
import torch
from torch.testing import assert_close
from ftkit.kernels import norm
from ftkit.kernels.glu import glu_backward, glu_forward
from ftkit.kernels.launch import interpreted
from ftkit.kernels.middle import factor_at_once, glu_backward_factor
from ftkit.kernels.norm import rms_backward, rms_forward, rms_norm
from ftkit.kernels.rope import rotate_

cuda = torch.cuda.is_available()
dev = "cuda" if cuda else "cpu"
KINDS = torch.float32, torch.float16, torch.bfloat16
# the interpreter cuts a bfloat16 off where the compiled kernel rounds: twice the error
CLOSE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2 if cuda else 3.2e-2}
seeds = iter(range(10**6))


def way(kernel):
    "Kernels, compiled or interpreted; or the formulas, which a GPU never runs."
    if not kernel: return nullcontext()
    return nullcontext() if cuda else interpreted()


WAYS = [True] if cuda else [True, False]


def fresh(*shape, kind=torch.float32, gap=0):
    "Random numbers, in a buffer whose rows are `gap` wider."
    g = torch.Generator().manual_seed(next(seeds))
    x = torch.randn(*shape[:-1], shape[-1] + gap, generator=g).to(dev, kind)
    return x[..., :shape[-1]]


def near(ours, theirs, kind, scale=1.):
    assert ours.dtype == kind
    tolerance = scale*CLOSE[kind]
    assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


# --- norms ---------------------------------------------------------------------------------------

def exact_norm(x, weight, plus, dy, add=None, residual=None, scale=1.):
    "Normed rows and the gradients, in float64, with autograd."
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    s = x if residual is None else residual.double() + scale*x
    y = s*torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5)*(plus + weight)
    dx, dw = torch.autograd.grad(y, (x, weight), dy.double())
    return y.detach(), dx if add is None else dx + add.double(), dw


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plus", [0., 1.])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (7, 128), (5, 1000), (3, 4096)])
def test_norm_both_ways(shape, plus, kind, kernel):
    x, add, dy = (fresh(*shape, kind=kind, gap=3*i) for i in range(3))
    weight = fresh(shape[-1], kind=kind)
    y, dx, dw = exact_norm(x, weight, plus, dy, add)
    with way(kernel):
        ours, inverse, s = rms_forward(x, weight, 1e-5, plus)
        grad, dweight = rms_backward(dy, x, weight, inverse, plus, add, need_weight=True)
    assert s is x and inverse.dtype == torch.float32
    near(ours, y, kind, 2)
    near(grad, dx, kind, 4)
    near(dweight, dw, kind, 4)


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("width", [24, 16400])
def test_norm_of_a_sum_in_place(width, kernel):
    x, r = fresh(4, width, gap=5), fresh(4, width, gap=2)
    weight, dy = fresh(width), fresh(4, width)
    y, dx, _ = exact_norm(x, weight, 0., dy, residual=r, scale=.25)
    expected = r.double() + .25*x.double()
    with way(kernel):
        ours, inverse, s = rms_forward(x, weight, 1e-5, residual=r, summed=r, scale=.25)
    assert s is r
    near(s, expected, torch.float32)
    near(ours, y, torch.float32)
    with way(kernel): grad, nothing = rms_backward(dy, s, weight, inverse, out=dy)
    assert grad is dy and nothing is None
    near(.25*grad, dx, torch.float32)


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1., .25])
@pytest.mark.parametrize("shape", [(1, 1), (9, 33), (3, 1000), (2, 16400), (5, 3, 24), (0, 8)])
def test_the_sum_goes_to_two_places(shape, scale, kind, kernel):
    "To the last bit what is written to one, and nothing beside the rows."
    gap = 0 if len(shape) == 3 else 3
    x, r = fresh(*shape, kind=kind, gap=gap), fresh(*shape, kind=kind, gap=2*gap)
    weight, width = fresh(shape[-1], kind=kind), shape[-1]
    wide = fresh(*shape[:-1], width + 5*bool(gap), kind=kind)
    before, twice = wide.clone(), wide[..., :width]
    with way(kernel):
        expected = rms_forward(x, weight, 1e-5, residual=r, scale=scale)
        found = rms_forward(x, weight, 1e-5, residual=r, scale=scale, twice=twice)
        again = rms_forward(x.clone(), weight, 1e-5, residual=r, summed=r, scale=scale, twice=x)
    assert found[2] is not twice and again[2] is r
    for ours in (*found, twice), (*again, x):
        assert_close(ours, (*expected, expected[2]), rtol=0, atol=0)
    assert torch.equal(wide[..., width:], before[..., width:])


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("plus", [0., 1.])
def test_wide_rows_sum_the_gradient_of_the_weight(plus, kernel):
    x, add, dy = (fresh(7, 8193, gap=i) for i in range(3)) # more rows than programs on a CPU
    weight = fresh(8193)
    _, dx, dw = exact_norm(x, weight, plus, dy, add)
    with way(kernel):
        _, inverse, _ = rms_forward(x, weight, 1e-5, plus)
        grad, dweight = rms_backward(dy, x, weight, inverse, plus, add, out=add, need_weight=True)
    near(grad, dx, torch.float32, 2)
    near(dweight, dw, torch.float32, 2)


@pytest.mark.parametrize("kernel", WAYS)
def test_norm_of_heads_in_a_fused_buffer(kernel):
    qkv, weight = fresh(5, 9*24, gap=7), fresh(24)
    q = qkv[:, 24:24*4].unflatten(1, (3, 24))
    dy = fresh(5, 3, 24)
    y, dx, dw = exact_norm(q, weight, 0., dy)
    rest = qkv.clone()
    out = torch.zeros_like(qkv)[:, 24:24*4].unflatten(1, (3, 24))
    with way(kernel):
        ours, inverse, _ = rms_forward(q, weight, 1e-5, out=out)
        near(ours, y, torch.float32)
        grad, dweight = rms_backward(dy, q, weight, inverse, out=q, need_weight=True)
    near(grad, dx, torch.float32)
    near(dweight, dw, torch.float32)
    assert inverse.shape == (5, 3)
    assert torch.equal(qkv[:, :24], rest[:, :24]) and torch.equal(qkv[:, 96:], rest[:, 96:])


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_norms_of_transformers(kind, kernel):
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    for plus, module in (0., LlamaRMSNorm(200, 1e-5)), (1., GemmaRMSNorm(200, 1e-5)):
        module = module.to(dev, kind)
        with torch.no_grad(): module.weight.copy_(fresh(200))
        x, dy = fresh(2, 6, 200, kind=kind), fresh(2, 6, 200, kind=kind)
        theirs = [a := x.clone().requires_grad_(), module(a)][1]
        theirs.backward(dy)
        b, w = x.clone().requires_grad_(), module.weight.detach().clone().requires_grad_()
        with way(kernel):
            ours = rms_norm(b, w, 1e-5, plus)
            ours.backward(dy)
        # both round alike: they differ where the last bit of the float32 norm tips a rounding
        assert (ours != theirs).float().mean() < (.02 if kind == torch.float16 else 1)
        near(ours, theirs, kind)
        near(b.grad, a.grad, kind, 2)
        near(w.grad, module.weight.grad, kind, 6) # theirs sums up in its own type


def test_norm_asks_only_for_what_learns(monkeypatch):
    asked = []
    def spy(*args, need_weight=False, **kwargs):
        asked.append(need_weight)
        return rms_backward(*args, need_weight=need_weight, **kwargs)
    monkeypatch.setattr(norm, "rms_backward", spy)
    x, weight = fresh(3, 8).requires_grad_(), fresh(8)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert asked == [False]
    assert rms_norm(x.transpose(0, 1), fresh(3), 1e-5).shape == (8, 3)


@pytest.mark.parametrize("kernel", WAYS)
def test_norm_of_nothing_and_of_float64(kernel):
    with way(kernel):
        y, inverse, _ = rms_forward(fresh(0, 8), fresh(8), 1e-5)
        dx, dw = rms_backward(y, y, fresh(8), inverse, need_weight=True)
        assert y.shape == dx.shape == (0, 8) and torch.equal(dw, torch.zeros_like(dw))
        x = fresh(3, 8).double().requires_grad_()
        weight = fresh(8).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, 1.), (x, weight))


def test_norm_refuses():
    x, weight = fresh(4, 8), fresh(8)
    for match, call in {
        "does not fit": lambda: rms_forward(x, fresh(7), 1e-5),
        "give \\[tokens": lambda: rms_forward(x[None, None], weight, 1e-5),
        "contiguous rows": lambda: rms_forward(fresh(8, 4).T, weight, 1e-5),
        "as x has": lambda: rms_forward(x, weight, 1e-5, residual=fresh(3, 8)),
        "scale is for a sum": lambda: rms_forward(x, weight, 1e-5, scale=2.),
        "twice is for a sum": lambda: rms_forward(x, weight, 1e-5, twice=x),
        "as x has, found \\(3, 8\\)": lambda: rms_forward(x, weight, 1e-5, residual=x,
                                                        twice=fresh(3, 8)),
        "one number for each": lambda: rms_backward(x, x, weight, fresh(3))}.items():
        for kernel in WAYS:
            with way(kernel), pytest.raises(ValueError, match=match): call()


# --- rotary embeddings ---------------------------------------------------------------------------

def tables(positions, rotary, kind=torch.float32, full=True):
    angle = 3*fresh(positions, rotary//2)
    if full: angle = torch.cat((angle, angle), -1)
    return angle.cos().to(kind), angle.sin().to(kind)


def exact_turn(x, cos, sin, interleaved=False):
    "[tokens, heads, head_dim] in float64, by complex numbers."
    x, n = x.double(), cos.shape[-1]//2
    part, rest = x[..., :2*n], x[..., 2*n:]
    pairs = part.unflatten(-1, (n, 2) if interleaved else (2, n))
    if not interleaved: pairs = pairs.transpose(-1, -2)
    turn = torch.complex(cos[:, :n].double(), sin[:, :n].double())
    turned = torch.view_as_complex(pairs.contiguous())*turn.repeat(len(x)//len(cos), 1)[:, None]
    real = torch.view_as_real(turned)
    part = real.flatten(-2) if interleaved else real.transpose(-1, -2).flatten(-2)
    return torch.cat((part, rest), -1)


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads,kv,dim,rotary", [(4, 2, 16, 16), (1, 1, 80, 32), (7, 1, 24, 20)])
def test_turn(heads, kv, dim, rotary, interleaved, kind, kernel):
    qkv = fresh(6, (heads + 2*kv)*dim, kind=kind, gap=9)
    cos, sin = tables(3, rotary)
    start, turned = qkv.clone(), heads + kv
    expected = exact_turn(start[:, :turned*dim].unflatten(1, (turned, dim)), cos, sin, interleaved)
    with way(kernel): assert rotate_(qkv, cos, sin, heads, kv, dim, interleaved) is qkv
    near(qkv[:, :turned*dim], expected.flatten(1), kind, 2)
    assert torch.equal(qkv[:, turned*dim:], start[:, turned*dim:])
    with way(kernel): rotate_(qkv, cos, sin, heads, kv, dim, interleaved, back=True)
    near(qkv, start, kind, 4)


@pytest.mark.parametrize("kernel", WAYS)
def test_gradient_of_a_turn_with_a_factor(kernel):
    "YaRN's tables have a factor; the way back multiplies by it too."
    cos, sin = (1.3*t for t in tables(4, 8))
    x, dy = fresh(4, 3, 8).double().requires_grad_(), fresh(4, 3*8)
    exact_turn(x, cos, sin).backward(dy.double().view(4, 3, 8))
    with way(kernel): rotate_(dy, cos, sin, 2, 1, 8, back=True)
    near(dy, x.grad.flatten(1), torch.float32)


@pytest.mark.parametrize("kernel", WAYS)
def test_turns_of_transformers(kernel):
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as of_glm
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_llama
    for theirs, interleaved in (of_llama, False), (of_glm, True):
        qkv, (cos, sin) = fresh(2*5, (4 + 2*2)*16), tables(5, 16)
        q, k, _ = qkv.clone().view(2, 5, 8, 16).transpose(1, 2).split((4, 2, 2), 1)
        q, k = (t.transpose(1, 2).reshape(10, -1) for t in theirs(q, k, cos[None], sin[None]))
        with way(kernel): rotate_(qkv, cos[None], sin[None], 4, 2, 16, interleaved)
        near(qkv[:, :96], torch.cat((q, k), 1), torch.float32)


@pytest.mark.parametrize("kernel", WAYS)
def test_tables_of_all_shapes(kernel):
    start, (cos, sin) = fresh(6, 3*8), tables(3, 8)
    expected = start.clone()
    with way(kernel):
        rotate_(expected, cos, sin, 1, 1, 8)
        for change, rotary in ((lambda t: t[:, :4], 8), (lambda t: t[None], None),
                               (lambda t: t[None].expand(2, 3, 8), None),
                               (lambda t: t.repeat(2, 1).view(2, 3, 8), None),
                               (lambda t: torch.cat((t, t), 1)[:, :8], None)):
            qkv = start.clone()
            rotate_(qkv, change(cos), change(sin), 1, 1, 8, rotary_dim=rotary)
            assert torch.equal(qkv, expected)
        assert rotate_(start[:0], cos, sin, 1, 1, 8).shape == (0, 24)


def test_turn_refuses():
    qkv, (cos, sin) = fresh(6, 3*8), tables(3, 8)
    for match, args in {"no multiple": (qkv[:4], cos, sin, 1, 1, 8),
                        "do not hold": (qkv, cos, sin, 3, 1, 8),
                        "do not turn": (qkv, cos, sin[:, :6], 1, 1, 8),
                        "contiguous rows": (qkv.T, cos, sin, 1, 1, 2)}.items():
        with pytest.raises(ValueError, match=match): rotate_(*args)


# --- gated activations ---------------------------------------------------------------------------

ACTS = dict(silu=torch.nn.functional.silu, gelu=torch.nn.functional.gelu,
            gelu_tanh=lambda x: torch.nn.functional.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows,width", [(1, 1), (5, 37), (3, 1025)])
def test_gate_both_ways(rows, width, act, kind, kernel):
    x, dh = 2*fresh(rows, 2*width, kind=kind, gap=3), fresh(rows, width, kind=kind, gap=1)
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    expected = ACTS[act](gate)*up
    expected.backward(dh.double())
    h = fresh(rows, width, kind=kind, gap=2)
    with way(kernel):
        near(glu_forward(x, act), expected, kind)
        near(glu_backward(dh, x, act, h=h), wide.grad, kind, 2)
        near(h, expected, kind)
        assert glu_backward(dh, x, act, out=x, h=dh) is x
    near(x, wide.grad, kind, 2)
    near(dh, expected, kind)


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("act", ACTS)
def test_far_gates_stay_finite(act, kernel):
    gate = torch.tensor([[-6e4, -300., -20., 0., 20., 300., 6e4]], device=dev)
    x = torch.cat((gate, torch.ones_like(gate)), 1)
    with way(kernel), torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore") # the interpreter's overflow of exp, then 1/inf
            h, d = glu_forward(x, act), glu_backward(torch.ones_like(gate), x, act)
    assert_close(h, gate.clamp(min=0), rtol=1e-5, atol=1e-5)
    slope = torch.tensor([[0., 0., 0., .5, 1., 1., 1.]], device=dev)
    assert_close(d[:, :7], slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", WAYS)
def test_up_may_lie_first(kernel):
    x, dh = fresh(3, 10), fresh(3, 5)
    turned = torch.cat((x[:, 5:], x[:, :5]), 1)
    with way(kernel):
        assert torch.equal(glu_forward(turned, up_first=True), glu_forward(x))
        ours, theirs = glu_backward(dh, turned, up_first=True), glu_backward(dh, x)
    assert torch.equal(ours, torch.cat((theirs[:, 5:], theirs[:, :5]), 1))


SIZES = [(1, 1, 1), (70, 33, 16), (130, 200, 40), (67, 64, 64), (9, 40, 80)]
if cuda: SIZES += [(2048, 4864, 16), (1000, 14336, 8), (8192, 1000, 64)]


@pytest.mark.parametrize("kernel", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,width,ranks", SIZES)
def test_gradient_of_the_factor_on_the_way(rows, width, ranks, kind, kernel):
    "That of A is summed in float32, from h rounded as it would be in memory."
    x, dh = fresh(rows, 2*width, kind=kind, gap=6), fresh(rows, width, kind=kind, gap=2)
    dxa, there = fresh(rows, ranks, kind=kind, gap=3), torch.ones(ranks, width, device=dev)
    h = torch.empty_like(dh)
    expected = glu_backward(dh, x, h=h)
    of_a = dxa.double().T @ h.double()
    scale = of_a.abs().max()*(2e-5 if kind == torch.float32 or factor_at_once(x, ranks) else 2e-2)
    with way(kernel):
        for dtype in {torch.float32, kind}:
            found = glu_backward_factor(dh.clone(), x, dxa, kind=dtype)
            near(found[0], expected.double(), kind)
            assert found[1].dtype == dtype
            room = scale + of_a.abs().max()*(0 if dtype == torch.float32 else 8e-3)
            assert (found[1].double() - of_a).abs().max() <= room + 1e-6
        d, found = glu_backward_factor(dh, x, dxa, out=x, into=there, add=True)
    assert d is x and found is there
    near(d, expected.double(), kind)
    assert (there.double() - 1 - of_a).abs().max() <= 2*scale + 1e-5


def test_the_factor_refuses():
    with pytest.raises(ValueError, match="2 rows; 3 are needed"):
        glu_backward_factor(fresh(3, 4), fresh(3, 8), fresh(2, 1))
    assert not factor_at_once(fresh(3, 8), 65) and not factor_at_once(fresh(3, 8), 0)


def test_gate_refuses():
    x = fresh(3, 10)
    for match, call in {"there are silu": lambda: glu_forward(x, "tanh"),
                        "2\\*width": lambda: glu_forward(x[:, :9]),
                        "out: expected": lambda: glu_forward(x, out=x),
                        "dh: expected": lambda: glu_backward(x, x),
                        "contiguous rows": lambda: glu_forward(fresh(10, 4).T)}.items():
        with pytest.raises(ValueError, match=match): call()
