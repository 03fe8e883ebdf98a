"Projections and the small kernels around them, beside the layers one by one."
import os
from contextlib import nullcontext
from copy import deepcopy
import pytest, torch

if not torch.cuda.is_available(): os.environ["TRITON_INTERPRET"] = "1"
from torch import nn
from torch.testing import assert_close
from ftkit.core import FtkitError
from ftkit.kernels.edges import Edges, Moves, Scratch, dropped, product, turned_back
from ftkit.kernels.grouped import both, both_in_one
from ftkit.kernels.launch import interpreted
from ftkit.kernels.lora import Projection, why_not
from ftkit.kernels.rope import rotate_
from ftkit.lora.dora import DoraLinear
from ftkit.lora.layers import LoraLinear
from ftkit.lora.starts import start_pissa
from ftkit.kernels.nf4 import together_kernel
from ftkit.quant.linear import QLinear, dequantize_together
from ftkit.quant.qtensor import dynamic_map, quantize

dev = "cuda" if torch.cuda.is_available() else "cpu"
TIGHT = dict(rtol=1e-5, atol=1e-6)
K = 64


def kernels(): return nullcontext() if dev == "cuda" else interpreted()


def layers(kinds, seed=0, bias=False, dtype=torch.float32, dropout=0., **options):
    "One layer for each kind, e.g. `lora 24 3`: kind, outputs, rank."
    torch.manual_seed(seed)
    out = []
    for kind in kinds:
        name, n, *r = kind.split()
        m = nn.Linear(K, int(n), bias=bias is True or bias == name).requires_grad_(name == "full")
        m = m.to(dtype)
        if name.startswith("q"): m = QLinear.from_linear(m)
        if r:
            m = LoraLinear(m, int(r[0]), alpha=2*int(r[0]) + 1, dropout=dropout, **options)
            nn.init.normal_(m.B, std=0.1)
        out.append(m.to(dev))
    return out


MIXES = {"lora": ["lora 40 4", "lora 8 4", "lora 8 4"], "one": ["lora 24 16"],
         "ranks": ["lora 24 3", "lora 16 17"], "some": ["lora 24 3", "plain 8", "lora 8 2"],
         "none": ["plain 24", "plain 8"], "full": ["full 24", "full 8"], "half": ["full 24", "plain 9"],
         "four": ["qlora 24 4", "qlora 8 4"], "four, some": ["q 24", "qlora 8 4"],
         "mixed": ["qlora 24 4", "lora 9 2"], "four, none": ["q 24"]}


def inputs(T, width, seed=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, width, generator=g).to(dev, dtype)


def reference(modules, x, dy, params):
    "Outputs, gradient of the input and those of the parameters, by autograd in float64."
    x = x.clone().requires_grad_()
    y = torch.cat([m(x) for m in modules], -1)
    return y.detach(), *torch.autograd.grad(y, [x, *params], dy)


def compare(p, modules, x, dy, **close):
    y, dx, *grads = reference(modules, x, dy, p.trainable)
    ours, xa = p.project(x)
    assert_close(ours, y, **close)
    ours_x, ours_grads = p.project_backward(dy, x, xa)
    assert_close(ours_x, dx, **close)
    assert len(ours_grads) == len(grads)
    for a, b in zip(ours_grads, grads): assert_close(a, b, **close)
    return y, dx, grads


@pytest.mark.parametrize("bias", [False, True, "lora"])
@pytest.mark.parametrize("mix", MIXES)
def test_like_the_layers(mix, bias):
    modules = layers(MIXES[mix], bias=bias)
    p = Projection(modules, Scratch())
    assert p.out_features == sum(m.out_features for m in modules) and p.in_features == K
    x, dy = inputs(7, K), inputs(7, p.N, 2)
    y, dx, grads = compare(p, modules, x, dy, **TIGHT)
    # with a stride, with room, with something to add, in place
    roomy, dy_roomy = inputs(7, K + p.R, 3), inputs(7, p.N + p.R, 4)
    roomy[:, :K], dy_roomy[:, :p.N] = x, dy
    wide = torch.zeros(7, p.N + 5, device=dev)
    out, xa = p.project(roomy, out=wide[:, 3:p.N + 3])
    assert_close(wide[:, 3:-2], y, **TIGHT)
    assert not wide[:, :3].any() and not wide[:, -2:].any()
    add = inputs(7, K, 5)
    want = dx + add
    got, ours = p.project_backward(dy_roomy, roomy, xa, out=add, add=add)
    assert got is add
    assert_close(add, want, **TIGHT)
    for a, b in zip(ours, grads): assert_close(a, b, **TIGHT)
    assert p.project_backward(dy, x, xa, need_x=False)[0] is None
    # added to something, with a factor, elsewhere or in place
    for given in (x, roomy):
        start = inputs(7, p.N, 6)
        want = start + .3*y
        assert_close(p.project(given, add=start, alpha=.3)[0], want, **TIGHT)
        assert p.project(given, start, add=start, alpha=.3)[0] is start
        assert_close(start, want, **TIGHT)


@pytest.mark.parametrize("mix", ["lora", "ranks", "some", "none"])
def test_held(mix):
    modules = layers(MIXES[mix], bias=True)
    old = deepcopy(nn.ModuleList(modules).state_dict())
    p, x = Projection(modules, Scratch()), inputs(5, K)
    assert p.hold(torch.float32) and p.hold(torch.float32) and not p.hold(torch.bfloat16)
    compare(p, modules, x, inputs(5, p.N, 2), **TIGHT)
    roomy = torch.cat([x, torch.full((5, p.R), torch.nan, device=dev)], 1)
    y, xa = p.project(roomy)
    assert_close(y, torch.cat([m(x) for m in modules], -1), **TIGHT)
    dy = torch.cat([inputs(5, p.N, 2), torch.full((5, p.R), torch.nan, device=dev)], 1)
    want, _ = p.project_backward(dy[:, :p.N], roomy, xa)
    assert_close(p.project_backward(dy, roomy, xa)[0], want, **TIGHT)
    new = nn.ModuleList(modules).state_dict()
    assert list(new) == list(old)
    for n, t in new.items(): assert torch.equal(t, old[n]) and t.is_contiguous()
    new = {n: t + 1 for n, t in new.items()}  # loading goes into the matrix
    nn.ModuleList(modules).load_state_dict(new)
    assert torch.equal(p.matrix[p.parts[0].rows, :K], p.parts[0].base.weight)
    compare(p, modules, x, inputs(5, p.N, 2), rtol=1e-4, atol=1e-4)
    p.release()
    assert all(m.is_contiguous() for m in nn.ModuleList(modules).state_dict().values())
    assert not any(b._state_dict_hooks for part in p.parts for b in [part.base])
    compare(p, modules, x, inputs(5, p.N, 2), rtol=1e-4, atol=1e-4)
    p.hold(torch.float32)
    with pytest.raises(FtkitError, match="held in"): p.project(x.bfloat16())
    p.parts[0].base.weight = nn.Parameter(p.parts[0].base.weight.clone(), False)
    with pytest.raises(FtkitError, match="replaced"): p.project(x)
    p.release()
    compare(p, modules, x, inputs(5, p.N, 2), rtol=1e-4, atol=1e-4)


def test_full_weights_are_held_contiguous():
    modules = layers(MIXES["full"])
    p = Projection(modules, Scratch())
    assert p.hold(torch.float32) and all(m.weight.is_contiguous() for m in modules)
    compare(p, modules, inputs(5, K), inputs(5, p.N, 2), **TIGHT)


def test_cached_four_bits():
    modules = layers(MIXES["four"])
    p = Projection(modules, Scratch())
    assert not p.hold(torch.float32) and p.matrix is None and p.hold(torch.float32, cache=True)
    compare(p, modules, inputs(5, K), inputs(5, p.N, 2), **TIGHT)
    assert not p.scratch.memory
    p.release()
    assert p.matrix is None
    compare(p, modules, inputs(5, K), inputs(5, p.N, 2), **TIGHT)


@pytest.mark.parametrize("piece", [1, 5, 8, 24, 100])
@pytest.mark.parametrize("mix", ["four", "mixed", "some", "four, none"])
def test_pieces(mix, piece):
    modules = layers(MIXES[mix], bias=True)
    p = Projection(modules, Scratch(), piece=piece)
    compare(p, modules, inputs(5, K), inputs(5, p.N, 2), **TIGHT)


def test_layers_share_scratch_and_see_new_factors():
    scratch = Scratch()
    many = [layers(MIXES["four"], seed=i) for i in range(3)]
    ps = [Projection(m, scratch) for m in many]
    x, dy = inputs(5, K), inputs(5, ps[0].N, 2)
    wanted = [reference(m, x, dy, p.trainable) for m, p in zip(many, ps)]
    xas = [p.project(x)[1] for p in ps]
    assert len(scratch.memory) == 1
    for p, xa, want in reversed(list(zip(ps, xas, wanted))):
        dx, grads = p.project_backward(dy, x, xa)
        for a, b in zip([dx, *grads], want[1:]): assert_close(a, b, **TIGHT)
    with torch.no_grad():
        for t in ps[0].trainable: t.data.mul_(3)  # as an optimizer of ours, unseen by versions
    compare(ps[0], many[0], x, dy, rtol=1e-4, atol=1e-4)
    compare(ps[0], many[0], x, dy, rtol=1e-4, atol=1e-4)
    for other in 1, 2, 0, 1:  # loaded anew, perhaps to where the old ones were
        many[0][0].base.load_state_dict(layers(MIXES["four"], seed=other)[0].base.state_dict())
        if other != 2: compare(ps[0], many[0], x, dy, rtol=1e-4, atol=1e-4)


def test_four_bits_are_unpacked_once_for_forward_and_backward(monkeypatch):
    modules = layers(MIXES["four"])
    p, count = Projection(modules, Scratch()), []
    from ftkit.kernels import lora
    from ftkit.quant.qtensor import QTensor
    real, several = QTensor.dequantize, lora.dequantize_together
    def together(layers, out):  # on a GPU; elsewhere it does nothing
        done = several(layers, out)
        count.extend([1]*len(layers)*done)
        return done
    monkeypatch.setattr(QTensor, "dequantize", lambda *a, **k: count.append(1) or real(*a, **k))
    monkeypatch.setattr(lora, "dequantize_together", together)
    x = inputs(5, K)
    y, xa = p.project(x)
    p.project_backward(y, x, xa)
    assert len(count) == 2
    other = Projection(layers(MIXES["four"], 1), p.scratch)
    count.clear()
    other.project(x)
    p.project_backward(y, x, xa)
    assert len(count) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["lora", "some", "four", "full"])
def test_half_precision(mix, dtype):
    modules, exact = layers(MIXES[mix], bias=True), layers(MIXES[mix], bias=True)
    for m in modules: (m.base if isinstance(m, LoraLinear) else m).to(dtype)
    for m, e in zip(modules, exact): # float64 with the rounded weights
        base, other = (t.base if isinstance(t, LoraLinear) else t for t in (m, e))
        if type(base) is not QLinear:
            other.weight.data = base.weight.data.to(torch.float64)
        if base.bias is not None: other.bias.data = base.bias.data.double()
        e.double()
    p = Projection(modules, Scratch())
    x, dy = inputs(33, K, dtype=dtype), inputs(33, p.N, 2, dtype=dtype)
    for held in False, True:
        if held and not p.hold(dtype, cache=True): assert mix == "full"
        for room in False, True:
            grow = lambda t: torch.cat([t, t.new_zeros(33, p.R)], 1) if room else t
            q = Projection(exact, Scratch())
            want = reference(exact, x.double(), dy.double(), q.trainable)
            y, xa = p.project(grow(x))
            dx, grads = p.project_backward(grow(dy), grow(x), xa)
            assert y.dtype == dx.dtype == dtype
            eps = torch.finfo(dtype).eps
            for ours, theirs, param in zip([y, dx, *grads], want, [y, dx, *p.trainable]):
                assert ours.dtype == param.dtype and ours.shape == theirs.shape
                assert (ours.double() - theirs).abs().max() <= 4*eps*theirs.abs().max()


@pytest.mark.parametrize("mix", ["lora", "some", "four", "ranks"])
def test_dropout_is_the_same_both_ways(mix):
    modules = layers(MIXES[mix], dropout=0.4)
    p = Projection(modules, Scratch())
    assert p.dropping
    x, dy, seed = inputs(6, K), inputs(6, p.N, 2), 2**41 + 17
    with pytest.raises(ValueError, match="seed"): p.project(x)
    ones = torch.ones_like(x)

    class Masked(nn.Module):
        def __init__(self, mask): super().__init__(); self.mask = mask
        def forward(self, x): return x*self.mask
    twins = deepcopy(modules)
    for i, m in enumerate(twins):
        if isinstance(m, LoraLinear): m.dropout = Masked(dropped(ones, seed, 0.4, i))
    params = [t for part in Projection(twins).parts for _, t in part.trained()]
    y, dx, *grads = reference(twins, x, dy, params)
    out, xa = p.project(x, seed=seed)
    assert_close(out, y, **TIGHT)
    ours_x, ours = p.project_backward(dy, x, xa, seed=seed)
    for a, b in zip([ours_x, *ours], [dx, *grads]): assert_close(a, b, **TIGHT)
    for m in modules: m.eval()
    compare(p, modules, x, dy, **TIGHT)


def test_switched_off():
    modules = layers(MIXES["some"], bias=True)
    p, x = Projection(modules, Scratch()), inputs(4, K)
    for m in modules: m.enabled = False
    y, xa = p.project(x)
    assert xa is None
    assert_close(y, torch.cat([m(x) for m in modules], -1), **TIGHT)
    dx, grads = p.project_backward(y, x, xa)
    assert grads == (None,)*len(p.trainable)
    assert_close(dx, y @ torch.cat([t.base.weight for t in p.parts]), **TIGHT)


def test_frozen_and_odd_parts():
    modules = layers(["lora 24 3", "lora 9 2"], bias=True, rslora=True)
    modules[0].A.requires_grad_(False)
    modules[1].base.weight.requires_grad_(True); modules[1].base.bias.requires_grad_(True)
    p = Projection(modules, Scratch())
    assert [tuple(t.shape) for t in p.trainable] == [(24, 3), (2, K), (9, 2), (9,), (9, K)]
    assert not p.hold(torch.float32)
    compare(p, modules, inputs(7, K), inputs(7, p.N, 2), **TIGHT)
    start_pissa(modules[0])
    compare(Projection(modules, Scratch()), modules, inputs(7, K), inputs(7, p.N, 2), **TIGHT)


def test_autograd():
    modules = layers(MIXES["lora"])
    p = Projection(modules, Scratch())
    x = inputs(6, K).view(2, 3, K).requires_grad_()
    y = p(x)
    want = torch.cat([m(x) for m in modules], -1)
    assert_close(y, want, **TIGHT)
    ours, theirs = (torch.autograd.grad(t.square().sum(), [x, *p.trainable]) for t in (y, want))
    for a, b in zip(ours, theirs): assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_takes_no_part():
    a, b = layers(["lora 24 3", "plain 9"])
    assert why_not([a, b]) is None
    assert "DoraLinear" in why_not([DoraLinear(nn.Linear(K, 3)), b])
    assert "different inputs" in why_not([a, nn.Linear(K + 1, 3)])
    handle = b.register_forward_hook(lambda *_: None)
    assert "hook" in why_not([a, b])
    handle.remove()
    with pytest.raises(FtkitError, match="not one projection"): Projection([DoraLinear(nn.Linear(4, 3))])
    start_pissa(a)
    a.enabled = False
    assert "start" in why_not([a, b])
    p = Projection([b])
    with pytest.raises(ValueError, match="expected"): p.project(torch.zeros(3, K + 1))
    with pytest.raises(ValueError, match="expected"): p.project(torch.zeros(2, 3, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 1030)])
def test_dropout_kernel(shape, dtype):
    x = inputs(shape[0], shape[1] + 7, dtype=dtype)[:, :shape[1]]
    for seed, share, which in ((0, 0.1, 0), (2**63 - 1, 0.9, 6), (12345, 0.5, 1)):
        with kernels(): ours = dropped(x, seed, share, which)
        want = dropped(x.cpu(), seed, share, which)
        assert torch.equal(ours.cpu() == 0, want == 0)
        assert_close(ours.cpu(), want)
        base = inputs(*shape, seed=9, dtype=dtype)
        with kernels(): more = dropped(x, seed, share, which, add=base.clone())
        assert_close(more.float(), base.float() + ours.float(), rtol=2e-3, atol=2e-3)
    big = torch.ones(400, 500)
    masks = [dropped(big, s, 0.2, w) != 0 for s in (1, 2) for w in (0, 1)]
    for i, m in enumerate(masks):
        assert abs(m.float().mean() - 0.8) < 0.01
        assert (m.float().mean(0) - 0.8).abs().max() < 0.1
        assert all(abs((m & n).float().mean() - 0.64) < 0.01 for n in masks[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads, kv, head, turned", [(3, 1, 16, 16), (4, 2, 12, 8), (9, 9, 4, 0)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_side_by_side(heads, kv, head, turned, interleaved, dtype):
    "Like copies and the inverse rotation; rows of one gradient lie apart, and heads of another."
    n, g = 6, torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(dev)
    parts = [draw(n, h, head + pad)[..., :head] for h, pad in ((heads, 0), (kv, 3), (kv, 0))]
    parts[2] = draw(n, kv*head + 5)[:, :-5].unflatten(1, (kv, head))
    parts = [t.to(dtype) if i < 2 else torch.empty_like(t, dtype=dtype).copy_(t)
             for i, t in enumerate(parts)]
    angles = draw(3, turned//2).repeat(1, 2)
    cos, sin = (angles.cos(), angles.sin()) if turned else (None, None)
    want = torch.cat([t.flatten(1) for t in parts], 1).double()
    if turned: rotate_(want, cos.double(), sin.double(), heads, kv, head, interleaved, back=True)
    out = torch.full((n, (heads + 2*kv)*head + 7), 5., dtype=dtype, device=dev)
    with kernels(): turned_back(parts, out[:, :-7], cos, sin, interleaved)
    close = TIGHT if dtype == torch.float32 else dict(rtol=1e-3, atol=1e-3)
    assert_close(out[:, :-7].double(), want, **close)
    assert (out[:, -7:] == 5).all()
    plain = torch.empty(n, want.shape[1], dtype=dtype, device=dev)
    if dev == "cpu": assert_close(turned_back(parts, plain, cos, sin, interleaved).double(), want, **close)
    if turned:
        with pytest.raises(ValueError, match="multiple"), kernels():
            turned_back([t[:5] for t in parts], plain[:5], cos, sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_moves_kernel(dtype):
    shapes = [(1, 1), (7, 300), (300, 7), (5, 2048), (64, 64)]
    srcs = [inputs(a, b + 3, i)[:, 2:b + 2] for i, (a, b) in enumerate(shapes)]
    dsts = [inputs(a, b + 1, 9, dtype)[:, :b] for a, b in shapes]
    start, scales = [d.clone() for d in dsts], [1., 0.5, 3., 1., 0.1]
    with kernels():
        moves = Moves(srcs, dsts, scales)
        moves(srcs, dsts)
        for s, d, f in zip(srcs, dsts, scales): assert_close(d, (s*f).to(dtype))
        for d, old in zip(dsts, start): d.copy_(old)
        moves(srcs, dsts, add=True)
    for s, d, f, old in zip(srcs, dsts, scales, start):
        assert_close(d, (old.float() + s*f).to(dtype), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mix", ["lora", "ranks", "some", "four", "mixed"])
@pytest.mark.parametrize("held", [False, True])
def test_with_kernels(mix, held):
    modules = layers(MIXES[mix], bias=True, dropout=0.25)
    p = Projection(modules, Scratch())
    if held: assert p.hold(torch.float32, cache=True)
    x, dy = inputs(6, K + p.R), inputs(6, p.N + p.R, 2)
    y, xa = p.project(x, seed=3)
    want = p.project_backward(dy, x, xa, seed=3)
    with kernels():
        got, xa = p.project(x, seed=3)
        ours = p.project_backward(dy, x, xa, seed=3)
        for m in modules:
            if isinstance(m, LoraLinear):
                for t in m.A, m.B: t.data = t.data.clone()  # factors that have moved
        assert_close(p.project(x, seed=3)[0], y, **TIGHT)
    for a, b in zip([got, ours[0], *ours[1]], [y, want[0], *want[1]]): assert_close(a, b, **TIGHT)


DIAGONALS = {"one": [(33, 16)], "two": [(300, 8), (130, 8)], "odd": [(7, 3), (129, 45)],
             "gaps": [(5, 0), (140, 4), (9, 0), (31, 17), (2, 0)],
             "wide": [(64, 64), (200 if dev == "cpu" else 1100, 64)],
             "many": [(16, 16)]*5, "more": [(40, 65), (8, 15)]}


def diagonal(parts):
    return torch.block_diag(*(torch.ones(n, r) for n, r in parts)).to(dev, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DIAGONALS)
@pytest.mark.parametrize("T", [1, 17, 130] + [3000]*(dev == "cuda"))
def test_both_of_one_reading(T, name, dtype):
    "Beside float64; rows that lie apart, given places, other types, added to what is there."
    parts = DIAGONALS[name]
    N, R = map(sum, zip(*parts))
    wide, b, wx = (inputs(*s, i, dtype) for i, s in enumerate([(T, N + R), (N, R), (T, R + 16)]))
    dy, x, own = wide[:, :N], wx[:, 16:], diagonal(parts)
    b[own == 0] = torch.nan  # nobody reads it
    want = (dy.double() @ torch.where(own == 0, 0, b.double()), dy.double().T @ x.double()*own)
    close = dict(rtol=1e-4, atol=1e-3) if dtype == torch.float32 else dict(rtol=8e-3, atol=.1)
    out, old = wide[:, N:], torch.full((N, R), 2., device=dev)
    with kernels():
        hopper = dev == "cuda" and torch.cuda.get_device_capability()[0] == 9
        fast = dtype != (torch.float32 if hopper else torch.bfloat16) and (hopper or dev == "cpu")
        assert both_in_one(dy, b, x, parts) == (fast and max(r for _, r in parts) <= 64)
        dxa, B = both(dy, b, x, parts, out)
        assert dxa is out and B.dtype == torch.float32
        for ours, exact in zip((dxa, B), want): assert_close(ours.double(), exact, **close)
        assert both(dy, b, x, parts, into=old, add=True)[1] is old
        assert_close(old, B + 2, **close)
        if T == 17:
            again, low = both(dy, b, x, parts, kind=torch.float16)
            assert torch.equal(again, dxa) and low.dtype == torch.float16
            assert_close(low.float(), B, rtol=2e-3, atol=1e-2)
    with pytest.raises(ValueError, match="x: "): both(dy, b, x[:, 1:], parts)
    with pytest.raises(ValueError, match="expected torch.float64"): both(dy.double(), b, x, parts)
    with pytest.raises(ValueError, match="into: "): both(dy, b, x, parts, into=old[1:])


@pytest.mark.skipif(dev != "cuda", reason="sizes of an 8B's layer")
@pytest.mark.parametrize("parts", [[(14336, 16)]*2, [(4096, 16), (1024, 16), (1024, 16)],
                                   [(14336, 32)]*2, [(28672, 64)], [(4001, 5), (333, 8)]])
def test_both_of_large_gradients(parts):
    N, R = map(sum, zip(*parts))
    dy, b, x = (torch.randn(*s, device=dev, dtype=torch.bfloat16)/8
                for s in ((8190, N), (N, R), (8190, R)))
    dxa, B = both(dy, b, x, parts)
    own = diagonal(parts).float()
    assert_close(dxa.float(), dy.float() @ (b.float()*own), rtol=1e-2, atol=2e-2)
    assert_close(B, dy.float().T @ x.float()*own, rtol=1e-2, atol=2e-2)
    assert torch.equal(both(dy, b, x, parts)[1], B)  # no order is left to chance


@pytest.mark.parametrize("mix", ["lora", "ranks", "some", "four", "mixed"])
@pytest.mark.parametrize("dropout", [0., 0.25])
def test_gradients_of_one_reading(mix, dropout):
    "Like those of two products, in room behind the gradient or elsewhere."
    dtype = torch.float16 if dev == "cuda" else torch.float32
    modules = layers(MIXES[mix], bias=True, dropout=dropout)
    p = Projection(modules, Scratch())
    x, dy = inputs(9, K + p.R, 1, dtype), inputs(9, p.N + p.R, 2, dtype)
    with kernels():
        for given in ((dy, x), (dy[:, :p.N], x[:, :K])):
            y, xa = p.project(given[1], seed=3)
            want = p.project_backward(*given, xa, seed=3)
            p.large = 0
            V = p._views(x[:, :K], True)
            used = p._both(dy[:, :p.N], xa, V)[1] is not None
            assert used == both_in_one(dy[:, :p.N], V.sB, xa, p.diagonal)
            assert used or dev == "cuda"
            ours = p.project_backward(*given, xa, seed=3)
            del p.large
            for a, b in zip([ours[0], *ours[1]], [want[0], *want[1]]):
                assert_close(a, b, **(TIGHT if dtype == torch.float32 else dict(rtol=.01, atol=.05)))
    for t in p.trainable: t.requires_grad_(False)
    p = Projection(modules, Scratch())
    with kernels(): assert p._both(dy[:, :p.N], xa, p._views(x[:, :K], True))[1] is None


def stack(n=3):
    "Projections one after the other, and what they compute."
    ps = [Projection(layers(["lora 40 4", f"lora {K - 40} 5"], seed=i), Scratch()) for i in range(n)]
    for p in ps: p.hold(torch.float32)
    def run(x):
        for p in ps: x = p(x).sin()
        return x.square().sum()
    return ps, run


@pytest.mark.parametrize("kernel, large", [(False, 0), (True, 0), (True, Projection.large)])
@pytest.mark.parametrize("defer", [False, True])
def test_edges_of_all_layers(defer, kernel, large):
    with kernels() if kernel else nullcontext():
        ps, run = stack()
        for p in ps: p.large = large
        params = [t for p in ps for t in p.trainable]
        xs = [inputs(4, K, i) for i in range(2)]
        want = [torch.autograd.grad(run(x), params) for x in xs]
        edges = Edges(ps, defer=defer)
        def check(*wanted):
            for t, *parts in zip(params, *wanted):
                assert_close(t.grad, sum(parts), rtol=1e-4, atol=1e-5)
        for _ in range(2):
            edges.spread(); run(xs[0]).backward(); check(want[0])
            edges.spread(); run(xs[1]).backward(); check(*want)        # accumulated
            for t in params: t.grad = None
        edges.spread(); (run(xs[0]) + run(xs[1])).backward(); check(*want) # one pass over both
        for t in params: t.grad = None
        ps[1].parts[0].lora.A.grad = torch.zeros_like(ps[1].parts[0].lora.A)
        edges.spread(); run(xs[0]).backward(); check(want[0])          # some gradients are there
        for t in params: t.grad = None
        edges.spread(); ps[0](xs[0]).sum().backward()                  # not all layers take part
        assert all((t.grad is None) == (i >= 4) for i, t in enumerate(params))
        for t in params: t.grad = None
        with torch.no_grad():
            for t in params: t.data.mul_(2)
        edges.spread()
        new = run(xs[0])
        edges.close()
        assert_close(run(xs[0]), new)
        ps[0].release()
        edges = Edges(ps)
        edges.spread()
        assert_close(run(xs[0]), new, rtol=1e-4, atol=1e-5)


def test_edges_refuse_mixed_types():
    ps, _ = stack(1)
    other = Projection([LoraLinear(nn.Linear(K, 8), r=2, dtype=torch.float64)])
    other.modules[0].base.to(dev); other.hold(torch.float32)
    with pytest.raises(FtkitError, match="common launch"): Edges([*ps, other], defer=True)


def test_product():
    a, b = inputs(5, 7), inputs(7, 3, 2)
    for dtype in torch.float32, torch.bfloat16:
        x, y = a.to(dtype), b.to(dtype)
        out = torch.ones(5, 3, device=dev)
        want = x.double() @ y.double()
        close = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else TIGHT
        assert_close(product(x, y, torch.float32).double(), want, **close)
        assert product(x, y, torch.float32, out) is out
        assert_close(out.double(), want, **close)
        assert_close(product(x, y, torch.float32, out, add=True).double(), 2*want, **close)


@pytest.mark.parametrize("piece", [None, 8])
def test_projections_of_all_shapes_share_one_memory(piece):
    scratch, x = Scratch(), inputs(5, K)
    many = [layers(MIXES[m], bias=True, seed=i) for i, m in enumerate(("four", "four, none", "four"))]
    ps = [Projection(m, scratch, piece) for m in (*many, layers(MIXES["four"], seed=4)[:1])]
    many.append(list(ps[-1].modules))
    for p in ps: p.slot = "all", max((p.N + p.R)*(p.K + p.R) for p in ps)
    if piece: ps[0].piece = None  # whole, between others' pieces
    for i in (0, 1, 2, 3, 0, 0, 3, 1, 3, 2, 0):
        compare(ps[i], many[i], x, inputs(5, ps[i].N, 2), **TIGHT)
    assert len(scratch.memory) == 1


@pytest.mark.parametrize("shapes", [(40, 24, 8), (130, 3), (1, 1, 1)])
@pytest.mark.parametrize("kind, block, double", [("nf4", 64, True), ("fp4", 128, False)])
def test_weights_are_unpacked_together(shapes, kind, block, double):
    dtype = torch.float16 if dev == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    qs = [quantize(torch.randn(n, 264, dtype=dtype, device=dev), kind, block, double) for n in shapes]
    wide = torch.full((sum(shapes), 280), 7., dtype=dtype, device=dev)
    parts = [(q.codes, q.absmax, q.nested_absmax, q.offset) for q in qs]
    with kernels(): assert together_kernel(parts, shapes, wide[:, :264], kind, block, dynamic_map(dev))
    assert torch.equal(wide[:, :264], torch.cat([q.dequantize() for q in qs]))
    assert (wide[:, 264:] == 7).all()
    assert not together_kernel(parts[:1], shapes[:1], wide[:, :264])
    assert not together_kernel(parts, shapes, wide[:, :260])
    if dev == "cuda":
        ms = [QLinear.from_linear(nn.Linear(264, n, dtype=dtype, device=dev)) for n in shapes]
        assert dequantize_together(ms, wide[:, :264])
        assert torch.equal(wide[:, :264], torch.cat([m.weight for m in ms]))
    assert not dequantize_together([nn.Linear(2, 2)]*2, torch.empty(4, 2))
