"Attention: kernels and back ends against the formula in float64, forward and backward."
import os
from contextlib import nullcontext
import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA: os.environ["TRITON_INTERPRET"] = "1"

import ftkit.attention as attention
import ftkit.kernels.attention as kernels
import ftkit.kernels.backends as backends
from ftkit.attention import (attend, attend_backward, attend_forward, explain, measure, packed_rows,
                             pick, preference, register_attention)
from ftkit.core import FtkitError
from ftkit.kernels.attention import (Rows, bounds, kernel_backward, kernel_forward,
                                     reference_backward, reference_forward, tiles)
from ftkit.kernels.backends import BACKENDS, STEADY, Case, case_of
from ftkit.kernels.launch import capability, dot_precision, interpreted

DEV = "cuda" if CUDA else "cpu"
run_kernels = nullcontext if CUDA else interpreted
HOPPER = Case("cuda", (9, 0), torch.bfloat16, 32, 8, 128, False, 2048, False, False, True)
HALVES = [torch.float16, torch.bfloat16] if CUDA and capability(DEV) >= (8, 0) else [torch.float16]
TOL = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def packed(*lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return Rows(cu_seqlens=cu.to(DEV), longest=max(lengths), total=sum(lengths))


def numbers(rows, heads=2, kv_heads=1, head_dim=16, dtype=torch.float32, seed=0):
    "q, k, v as parts of one wide matrix, and a gradient with a gap between its rows."
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows.total, heads + 2*kv_heads + 1, head_dim, generator=g).to(DEV, dtype)
    dout = torch.randn(rows.total, heads + 1, head_dim, generator=g).to(DEV, dtype)
    return *wide[:, 1:].split([heads, kv_heads, kv_heads], 1), dout[:, :heads]


def right(q, k, v, dout, rows, scale, window=None, softcap=None):
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    out, lse = reference_forward(q, k, v, rows, scale, window, softcap)
    return out, *reference_backward(dout, q, k, v, out, lse, rows, scale, window, softcap)


def near(ours, theirs, dtype, factor=1):
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs):
        off = ((a.double() - b).abs().max()/b.abs().max().clamp(min=.1)).item()
        assert off < factor*TOL[dtype], (name, off)


LAYOUTS = dict(dense=Rows(2, 32), odd=Rows(2, 37), single=Rows(5, 1),
               packed=packed(2, 43, 0, 1, 24), ones=packed(*[1]*20),
               tail=packed(30, 34, 5))


@pytest.mark.parametrize("how", [{}, dict(window=1), dict(window=17), dict(softcap=3.)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_in_every_layout(name, how):
    rows = LAYOUTS[name]
    q, k, v, dout = numbers(rows)
    with run_kernels():
        out, lse = kernel_forward(q, k, v, rows, .3, **how)
        grads = kernel_backward(dout, q, k, v, out, lse, rows, .3, **how)
    near((out, *grads), right(q, k, v, dout, rows, .3, **how), q.dtype)


WIDTHS = [(2, 2, 8), (3, 1, 80), (2, 1, 96), (2, 2, 20), (2, 1, 128), (4, 2, 64), (1, 1, 192),
          (2, 1, 256)]


@pytest.mark.parametrize("place", range(len(WIDTHS)))
def test_kernels_for_every_width(place):
    rows, (heads, kv_heads, head_dim) = packed(9, 25), WIDTHS[place]
    types = torch.float32, *HALVES
    if CUDA: types = [types[-1 if place % 2 else 1], *types[:place == 3]] # each is compiled anew
    for dtype in types:
        q, k, v, dout = numbers(rows, heads, kv_heads, head_dim, dtype)
        scale = head_dim**-.5
        with run_kernels():
            out, lse = kernel_forward(q, k, v, rows, scale, window=20)
            grads = kernel_backward(dout, q, k, v, out, lse, rows, scale, window=20)
        near((out, *grads), right(q, k, v, dout, rows, scale, window=20), dtype)


@pytest.mark.skipif(CUDA, reason="tiles of the GPU are not for choice here")
@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)], ids=str)
def test_other_tiles(shape, monkeypatch):
    monkeypatch.setattr(kernels, "_fits", {})
    monkeypatch.setattr(kernels, "tiles", lambda *args: [(*shape, 4, 1)])
    for rows in (packed(2, 43, 0, 1, 24), Rows(1, 64)):
        q, k, v, dout = numbers(rows)
        with run_kernels():
            out, lse = kernel_forward(q, k, v, rows, .3, window=29)
            grads = kernel_backward(dout, q, k, v, out, lse, rows, .3, window=29)
        near((out, *grads), right(q, k, v, dout, rows, .3, window=29), q.dtype)


def test_smaller_tiles_when_they_do_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources
    monkeypatch.setattr(kernels, "_fits", {})
    real, tried = kernels._forward_kernel, []
    class Picky:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                tried.append(kwargs["M"])
                if kwargs["M"] > 16: raise OutOfResources(1, 0, "shared memory")
                return real[grid](*args, **kwargs)
            return run
    monkeypatch.setattr(kernels, "_forward_kernel", Picky())
    monkeypatch.setattr(kernels, "tiles", lambda *args: [(64, 16, 4, 1), (16, 16, 4, 1)])
    rows = packed(20, 5)
    q, k, v, dout = numbers(rows)
    with run_kernels():
        out, _ = kernel_forward(q, k, v, rows, .3)
        kernel_forward(q, k, v, rows, .3)
    assert tried == [64, 16, 16]
    near([out], right(q, k, v, dout, rows, .3), q.dtype)
    monkeypatch.setattr(kernels, "tiles", lambda *args: [(64, 16, 4, 1)])
    monkeypatch.setattr(kernels, "_fits", {})
    with run_kernels(), pytest.raises(RuntimeError, match="no tile of forward fits"):
        kernel_forward(q, k, v, rows, .3)


def test_tiles_are_whole_and_shrink():
    for kind in ("forward", "queries", "keys"):
        for wide in (16, 64, 128, 256):
            for size in (2, 4):
                for chip in ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
                    shapes = tiles(kind, wide, size, chip)
                    assert shapes[-1] == (16, 16, 4, 1)
                    assert all(m >= 16 and n >= 16 and m & (m - 1) == n & (n - 1) == 0
                               for m, n, _, _ in shapes)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="old PyTorch")
@pytest.mark.parametrize("how", ["ieee", "tf32"])
def test_the_new_switch_of_tf32(how):
    rows, switch = packed(3, 9), torch.backends.cuda.matmul
    q, k, v, _ = numbers(rows)
    before, switch.fp32_precision = switch.fp32_precision, how
    try:
        assert dot_precision(q) == how
        with run_kernels(): out, _ = kernel_forward(q, k, v, rows, .3)
    finally: switch.fp32_precision = before
    assert (out - right(q, k, v, q, rows, .3)[0]).abs().max() < (1e-5 if how == "ieee" else 1e-2)


def test_samples_do_not_touch():
    "Another sample changes no bit of this one's output or gradients."
    rows = packed(21, 30, 13)
    q, k, v, dout = (x.clone() for x in numbers(rows))
    results = []
    for factor in (1, -7):
        for x in (q, k, v, dout): x[21:51] *= factor
        with run_kernels():
            out, lse = kernel_forward(q, k, v, rows, .3)
            results.append((out, *kernel_backward(dout, q, k, v, out, lse, rows, .3)))
    for a, b in zip(*results):
        assert torch.equal(a[:21], b[:21]) and torch.equal(a[51:], b[51:])


def test_large_scores_stay_finite():
    rows = packed(40, 3)
    q, k, v, dout = (30*x for x in numbers(rows))
    for cap in (None, 20.):
        with run_kernels():
            out, lse = kernel_forward(q, k, v, rows, 1., softcap=cap)
            grads = kernel_backward(dout, q, k, v, out, lse, rows, 1., softcap=cap)
        assert all(x.isfinite().all() for x in (out, lse, *grads))
        near([out], right(q, k, v, dout, rows, 1., softcap=cap), q.dtype, factor=5)


def test_gradients_go_where_they_are_wanted():
    rows = packed(9, 40)
    q, k, v, dout = numbers(rows)
    for name in BACKENDS:
        with run_kernels():
            if BACKENDS[name].refuses(case_of(q, k, rows)): continue
            wide = torch.full((rows.total, 5, 16), 77., device=DEV)
            dq, dk, dv = wide[:, :4].split([2, 1, 1], 1)
            out, saved = attend_forward(q, k, v, rows, backend=name)
            given = attend_backward(dout, q, k, v, out, saved, rows, None, name, dq, dk, dv)
        assert all(a is b for a, b in zip(given, (dq, dk, dv))) and (wide[:, 4] == 77).all()
        near((out, dq, dk, dv), right(q, k, v, dout, rows, .25), q.dtype)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_back_ends(name):
    "Every back end that may run here, in all layouts it takes."
    tried = 0
    dtypes = (torch.float32, *HALVES) if CUDA or name != "triton" else (torch.float32,)
    cases = [(2, 1, 24)]
    layouts = [LAYOUTS[n] for n in ("odd", "packed")]
    if CUDA:
        cases += [(32, 8, 128), (4, 4, 64), (4, 1, 80), (8, 2, 96), (2, 1, 256)]
        layouts = [*LAYOUTS.values(), Rows(4, 256), packed(200, 37, 128, 1, 300)]
        if name in ("triton", "flex"): # compiled anew for each, and other tests try them all
            cases, layouts, dtypes = cases[1:2], [layouts[1], layouts[-1]], dtypes[-1:]
    for rows in layouts:
        for heads, kv_heads, head_dim in cases:
            for dtype in dtypes:
                for how in (dict(), dict(window=11), dict(softcap=5.)):
                    q, k, v, dout = numbers(rows, heads, kv_heads, head_dim, dtype)
                    with run_kernels():
                        if BACKENDS[name].refuses(case_of(q, k, rows, **how)): continue
                        out, saved = attend_forward(q, k, v, rows, .2, name, **how)
                        grads = attend_backward(dout, q, k, v, out, saved, rows, .2, name, **how)
                    near((out, *grads), right(q, k, v, dout, rows, .2, **how), dtype, factor=2)
                    tried += 1
    if not tried: pytest.skip(f"{name} cannot run here")


FLEX = dict(LAYOUTS, long=Rows(2, 300), many=packed(200, 37, 128, 1, 300), whole=packed(128, 256))


@pytest.mark.parametrize("name", FLEX)
def test_flex_in_every_layout(name, monkeypatch):
    "Its own gradients too, which PyTorch forbids on a CPU but has the formula for."
    if not CUDA:
        flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *xs: None)
    rows, dtype = FLEX[name], HALVES[-1] if CUDA else torch.float32
    hows = {}, dict(window=1), dict(window=17), dict(window=150, softcap=3.)
    if CUDA: hows = hows[3:] if list(FLEX).index(name) % 2 else hows[:3] # each is compiled twice, for seconds
    for how in hows:
        q, k, v, dout = numbers(rows, 6, 2, 16, dtype)
        if BACKENDS["flex"].refuses(case_of(q, k, rows)._replace(steady=True)): pytest.skip("refused")
        how = (.3, how.get("window"), how.get("softcap"))
        out, saved = BACKENDS["flex"].forward(q, k, v, rows, *how)
        grads = backends._flex_run(dout, q, k, v, rows, *how)
        assert saved == () and out.is_contiguous() and not out.requires_grad
        near((out, *grads), right(q, k, v, dout, rows, *how), dtype, factor=2)
        if not CUDA:
            grads = BACKENDS["flex"].backward(dout, q, k, v, out, saved, rows, *how, None, None, None)
            near((out, *grads), right(q, k, v, dout, rows, *how), dtype)


@pytest.mark.parametrize("name", FLEX)
def test_tiles_of_flex_are_those_that_pytorch_finds(name):
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
    rows = FLEX[name]
    n = rows.total if rows.packed else rows.seq
    for window in (None, 1, 17, 128, 129, 257):
        ours = backends._flex_mask(rows, window, DEV)
        assert backends._flex_mask(rows, window, DEV) is ours
        right = torch.zeros(n, n, dtype=torch.bool)
        for a, b in ([(0, n)] if not rows.packed else backends._spans(rows)): right[a:b, a:b] = True
        right = right.tril() & right.triu(1 - (window or n))
        i = torch.arange(n, device=DEV)
        assert torch.equal(ours.mask_mod(0, 0, i[:, None], i).cpu(), right)
        theirs = flex_attention.create_block_mask(ours.mask_mod, 1, 1, n, n, DEV)
        for part in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part)), (part, window)
        assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_flex_is_compiled_few_times(monkeypatch):
    "Numbers of tokens beyond the first few share what is compiled, and so do windows."
    monkeypatch.setattr(backends, "_totals", {})
    monkeypatch.setattr(backends, "_compiled", {})
    compiled, real = [], torch.compile
    def counting(graph, inputs):
        compiled.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, **{**how, "backend": counting}))
    def run(total, window=None):
        rows = packed(total - 20, 20)
        q, k, v, dout = numbers(rows)
        out = backends._flex_forward(q, k, v, rows, .3, window, None)[0]
        near([out], right(q, k, v, dout, rows, .3, window), q.dtype)
    for total in range(200, 200 + 9*backends.TOTALS, 9): run(total)
    assert len(compiled) == backends.TOTALS == len(backends._compiled)
    run(200, window=30)
    assert len(compiled) == backends.TOTALS
    for total in range(300, 800, 37): run(total, window=total//2) # 14 of them
    assert len(compiled) <= backends.TOTALS + 3 and len(backends._compiled) == backends.TOTALS + 1


def test_flex_that_cannot_be_compiled(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_compiled", {})
    monkeypatch.setattr(attention, "_picks", {})
    monkeypatch.setattr(attention, "_failed", {})
    def broken(*args, **how): raise RuntimeError("out of resource:\n shared memory")
    monkeypatch.setattr(torch, "compile", lambda f, **how: broken)
    rows, dtype = packed(20, 30), HALVES[-1] if CUDA else torch.float32
    q, k, v, _ = numbers(rows, dtype=dtype)
    for _ in range(2):
        with pytest.raises(FtkitError, match="cannot be compiled: out of resource: shared"):
            attend_forward(q, k, v, rows, backend="flex")
    assert not backends._compiled
    flex = BACKENDS["flex"]
    monkeypatch.setitem(BACKENDS, "flexible", type(flex)("flexible", *list(vars(flex).values())[1:]))
    times = measure(2, 1, 16, dtype, rows, DEV, repeat=1)
    assert "flex" not in times or CUDA
    if not backends._flex_refuses(case_of(q, k, rows)):
        assert "cannot be compiled" in times["flexible"] and "flexible is left out" in caplog.text
        assert "not flexible: flex: it cannot be compiled" in explain(case_of(q, k, rows))
    assert pick(case_of(q, k, rows)) != "flexible"
    if not CUDA: return
    def full(*args, **how): raise torch.OutOfMemoryError("full")
    monkeypatch.setattr(torch, "compile", lambda f, **how: full)
    with pytest.raises(torch.OutOfMemoryError): flex.forward(q, k, v, rows, .3, None, None)


def test_what_flex_refuses(monkeypatch):
    monkeypatch.setattr(backends, "triton", backends.triton or object())
    why = BACKENDS["flex"].refuses
    for change, reason in ((dict(), None), (dict(head_dim=96), "power of two"), (dict(head_dim=8), "power"),
                           (dict(head_dim=512), "power of two"), (dict(softcap=True, window=True), None),
                           (dict(chip=(7, 5)), "older"), (dict(dtype=torch.float32), "16 bits"),
                           (dict(steady=False), "shapes have come"), (dict(device="mps"), "NVIDIA"),
                           (dict(packed=True), None)):
        said = why(HOPPER._replace(**change))
        assert said is None if reason is None else reason in said, change
    monkeypatch.setattr(backends, "triton", None)
    assert "Triton" in why(HOPPER)
    for chip in ((9, 0), (8, 0), (12, 0)):
        for is_packed in (False, True):
            assert preference(HOPPER._replace(chip=chip, packed=is_packed))[-2:] == ("flex", "math")
    assert all("flex" not in preference(HOPPER._replace(**c)) for c in (dict(device="cpu"), dict(chip=(7, 5))))


def test_flex_without_tokens():
    x, rows = torch.zeros(0, 2, 16, device=DEV), Rows(1, 0)
    out, saved = backends._flex_forward(x, x, x, rows, .3, None, None)
    assert out.shape == x.shape
    assert all(d.shape == x.shape for d in backends._flex_run(x, x, x, x, rows, .3, None, None))


@pytest.mark.skipif(not CUDA, reason="it takes a GPU")
def test_flex_in_a_graph(monkeypatch):
    rows = packed(20, 30)
    q, k, v, dout = numbers(rows, dtype=HALVES[-1])
    case = case_of(q, k, rows)
    if why := BACKENDS["flex"].refuses(case): pytest.skip(why)
    def run():
        out, saved = BACKENDS["flex"].forward(q, k, v, rows, .3, None, None)
        return out, *BACKENDS["flex"].backward(dout, q, k, v, out, saved, rows, .3, None, None, *[None]*3)
    run()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side): run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): results = run()
    q.mul_(2)
    graph.replay()
    near(results, right(q, k, v, dout, rows, .3), q.dtype, factor=2)
    monkeypatch.setattr(backends, "_compiled", {})
    with pytest.raises(FtkitError, match="not compiled yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run()


@pytest.mark.parametrize("backend", [None, "flex"])
def test_autograd_accumulates_into_the_buffer(backend):
    if backend and CUDA: pytest.skip("it computes in 16 bits")
    rows = packed(5, 20, 3)
    wide = torch.randn(28, 8, 16, device=DEV, requires_grad=True)
    q, k, v = wide.split([4, 2, 2], 1)
    dout = torch.randn(28, 4, 16, device=DEV)
    attend(q, k, v, rows, backend=backend).backward(dout)
    _, *grads = right(q.detach(), k.detach(), v.detach(), dout, rows, .25)
    torch.testing.assert_close(wide.grad.double(), torch.cat(grads, 1), atol=1e-4, rtol=1e-4)


def test_rows_and_their_intervals():
    rows = packed(2, 0, 3)
    assert [b.tolist() for b in bounds(rows, DEV)] == [[0, 0, 2, 2, 2], [2, 2, 5, 5, 5]]
    assert [b.tolist() for b in bounds(Rows(2, 2), "cpu")] == [[0, 0, 2, 2], [2, 2, 4, 4]]
    padded = Rows(cu_seqlens=torch.tensor([0, 2, 5, 5, 5]), longest=3, total=5)  # a fixed length
    assert bounds(padded, "cpu")[1].tolist() == [2, 2, 5, 5, 5]
    assert padded.borders("cpu").dtype == torch.int32
    for bad in ((), (2,), (None, 3)):
        with pytest.raises(ValueError, match="either"): Rows(*bad)


@pytest.mark.parametrize("change,match", [
    (lambda q, k, v: (q[:, 0], k, v), "wants"), (lambda q, k, v: (q, k[..., :3], v), "wants"),
    (lambda q, k, v: (q[:, :1], q, q), "do not share"), 
    (lambda q, k, v: (q[:-1], k[:-1], v[:-1]), "tokens"),
    (lambda q, k, v: (q.double(), k, v), "differ"), 
    (lambda q, k, v: (q.long(), k.long(), v.long()), "int64")])
def test_bad_input(change, match):
    rows = packed(5, 4)
    q, k, v, _ = numbers(rows)
    for function in (attend, attend_forward):
        with pytest.raises(ValueError, match=match): function(*change(q, k, v), rows)


def test_no_tokens():
    rows = Rows(1, 0)
    x = torch.zeros(0, 2, 16, device=DEV)
    with run_kernels():
        out, lse = kernel_forward(x, x, x, rows, 1.)
        grads = kernel_backward(x, x, x, x, out, lse, rows, 1.)
    assert out.shape == grads[0].shape == x.shape


# ------------------------------------------------------------ the choice

def test_the_table(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(attention, "_picks", {})
    turing = HOPPER._replace(chip=(7, 5), dtype=torch.float16)
    expected = {HOPPER: "cudnn", HOPPER._replace(packed=True): "flash",
                HOPPER._replace(head_dim=192): "flash", HOPPER._replace(whole=False): "flash",
                HOPPER._replace(chip=(12, 0)): "flash", HOPPER._replace(chip=(10, 0)): "cudnn",
                HOPPER._replace(head_dim=256): "cudnn", HOPPER._replace(window=True): "flash",
                HOPPER._replace(softcap=True): "triton", HOPPER._replace(steady=False): "flash",
                HOPPER._replace(head_dim=100): "triton", HOPPER._replace(head_dim=512): "efficient",
                HOPPER._replace(head_dim=320, softcap=True): "math",
                HOPPER._replace(dtype=torch.float32): "efficient",
                HOPPER._replace(dtype=torch.float64): "math",
                HOPPER._replace(chip=(8, 0)): "flash",
                HOPPER._replace(chip=(8, 9), head_dim=64): "flash",
                turing: "efficient", turing._replace(packed=True): "efficient",
                turing._replace(window=True): "triton",
                turing._replace(dtype=torch.bfloat16): "math"}
    for case, name in expected.items():
        if name == "triton" and BACKENDS["flash_attn"].refuses(case) is None: continue
        assert pick(case) == name, str(case)
    assert "cudnn, by table" in explain(HOPPER)
    assert "packed path" in explain(HOPPER._replace(packed=True))
    assert len(explain().splitlines()) > len(expected)
    assert all(set(preference(c)) <= set(BACKENDS) for c in expected)


def test_cases(monkeypatch):
    import ftkit.kernels.backends as backends
    monkeypatch.setattr(backends, "_shapes", {})
    q, k, *_ = numbers(Rows(2, 33))
    assert case_of(q, k, Rows(2, 33)).length == 64 and case_of(q, k, packed(64, 2)).length == 64
    assert not case_of(q, k, Rows(2, 33), window=33).window
    steady = [case_of(q, k, Rows(1, n)).steady for n in range(1, STEADY + 3)]
    assert steady[-4:] == [True, False, False, False] # one shape came before
    assert case_of(q, k, Rows(1, 3)).steady and case_of(q, k, packed(64, 2)).steady


def test_a_named_back_end_has_to_fit():
    rows = packed(5, 4)
    q, k, v, _ = numbers(rows)
    for name, match in (("cudnn", "cudnn cannot take"), ("tritn", "triton")):
        with pytest.raises(FtkitError, match=match): attend(q, k, v, rows, backend=name)


def test_measuring(monkeypatch, caplog):
    monkeypatch.setattr(attention, "_picks", {})
    good = BACKENDS["math"]
    slow = attention.BACKENDS
    broken = type(good)("broken", lambda c: None, lambda *a: 1/0, good.backward)
    failing = type(good)("failing", lambda c: None,
                         lambda *a: (_ for _ in ()).throw(RuntimeError("no plan")), good.backward)
    def double(*args):
        out, saved = good.forward(*args)
        return 2*out, saved
    wrong = type(good)("wrong", lambda c: None, double, good.backward)
    for b in (failing, wrong): monkeypatch.setitem(slow, b.name, b)
    rows = packed(20, 30)
    times = measure(2, 1, 16, torch.float32, rows, DEV, repeat=1, exclude=())
    assert times["failing"] == "no plan" and "off by" in times["wrong"]
    assert "failing is left out" in caplog.text and "wrong is left out" in caplog.text
    q, k, *_ = numbers(rows)
    case = case_of(q, k, rows)
    best = min((n for n in times if isinstance(times[n], tuple)), key=lambda n: sum(times[n]))
    assert pick(case) == best and "by measurement" in explain(case)
    monkeypatch.setitem(slow, "broken", broken)
    with pytest.raises(ZeroDivisionError): measure(4, 2, 16, torch.float32, rows, DEV, repeat=1)


# ------------------------------------------------------------ models of transformers

def tiny(kind, **more):
    import transformers
    config = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=16, **more)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind}ForCausalLM")._from_config(
        config, attn_implementation="eager").to(DEV)


@pytest.mark.parametrize("kind,more", [
    ("Llama", {}), ("Mistral", dict(sliding_window=4)),
    ("Gemma2", dict(sliding_window=4, attn_logit_softcapping=5., query_pre_attn_scalar=16))])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_packed_rows_of_a_model(kind, more, checkpointed):
    "Logits and gradients are those of the samples one by one."
    model = tiny(kind, **more).train()
    lengths = (5, 9, 2)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (1, 16), generator=g).to(DEV)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEV)
    apart = torch.cat([model(x).logits for x in ids.split(lengths, 1)], 1)
    weights = torch.randn(apart.shape, generator=g).to(DEV)
    (apart*weights).sum().backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(register_attention())
    if checkpointed: model.gradient_checkpointing_enable(dict(use_reentrant=False))
    with packed_rows(packed(*lengths)):
        together = model(ids, position_ids=positions, use_cache=False).logits
        (together*weights).sum().backward()
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[n], atol=1e-4, rtol=1e-3, msg=n)


def test_two_rows_of_packed_samples():
    model = tiny("Llama").eval()
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(2)).to(DEV)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]], device=DEV)
    with torch.no_grad():
        apart = torch.cat([model(ids[i:i+1, a:b]).logits[0]
                           for i, a, b in ((0, 0, 3), (0, 3, 8), (1, 0, 6), (1, 6, 8))])
        model.set_attn_implementation(register_attention())
        with packed_rows(packed(3, 5, 6, 2)):
            together = model(ids, position_ids=positions, use_cache=False).logits
        with packed_rows(packed(3, 5)), pytest.raises(ValueError, match="16 tokens, but"):
            model(ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(together.flatten(0, 1), apart, atol=1e-5, rtol=1e-4)


def test_without_borders_it_is_pytorchs():
    model = tiny("Llama").eval()
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(2)).to(DEV)
    padding = torch.ones(2, 8, dtype=torch.long, device=DEV)
    padding[0, :3] = 0
    with torch.no_grad():
        theirs = [model(ids).logits, model(ids, attention_mask=padding).logits[0, 3:]]
        written = model.generate(ids, max_new_tokens=3, do_sample=False)
        model.set_attn_implementation(register_attention())
        ours = [model(ids).logits, model(ids, attention_mask=padding).logits[0, 3:]]
        assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), written)
    for a, b in zip(ours, theirs): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_other_masks_are_kept():
    from transformers import masking_utils
    from transformers.masking_utils import (
        and_masks, causal_mask_function, chunked_causal_mask_function, or_masks,
        packed_sequence_mask_function, sliding_window_causal_mask_function)
    packed = getattr(masking_utils, "packed_sequence_compatibility_function",  # older versions just compose
                     lambda f, positions, samples: and_masks(f, packed_sequence_mask_function(samples)))
    only = attention._only_borders
    assert only(causal_mask_function) and only(sliding_window_causal_mask_function(4))
    x = torch.zeros(1, 4, dtype=torch.long)
    for f in (causal_mask_function, sliding_window_causal_mask_function(4)):
        assert only(packed(f, x, x))
    assert not only(chunked_causal_mask_function(4, x)) and not only(lambda *a: True)
    assert not only(or_masks(causal_mask_function, lambda *a: True))
    assert not only(and_masks(causal_mask_function, lambda *a: True)) and not only(None)
    mask = attention._mask_for_transformers
    with packed_rows(Rows(1, 4)):
        how = dict(batch_size=1, q_length=4, kv_length=4, mask_function=causal_mask_function)
        assert mask(**how) is None
        assert mask(**how, attention_mask=torch.tensor([[False, True, True, True]])) is not None
        assert mask(**{**how, "mask_function": chunked_causal_mask_function(2, x[:, 0])},
                    allow_is_causal_skip=False) is not None


def test_what_packed_rows_do_not_go_with():
    module = torch.nn.Module()
    x = torch.randn(1, 2, 4, 16, device=DEV)
    with packed_rows(Rows(1, 4)):
        with pytest.raises(FtkitError, match="dropout"):
            attention.attention_for_transformers(module, x, x, x, dropout=.1)
        with pytest.raises(FtkitError, match="s_aux"):
            attention.attention_for_transformers(module, x, x, x, s_aux=x)


# ------------------------------------------------------------ borders with a batch

ORDINARY = {"GPTNeoX": {}, "Olmo": {}, "Olmo2": {}, "Cohere": {}, "Starcoder2": dict(sliding_window=40), "Phi": {}}


def packed_batch(lengths, rows=1):
    g = torch.Generator().manual_seed(3)
    total = sum(lengths)
    ids = torch.randint(1, 50, (rows, total//rows), generator=g)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, -1)
    labels = ids.masked_fill(positions == 0, -100)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return dict(input_ids=ids.to(DEV), labels=labels.to(DEV), position_ids=positions.to(DEV),
                cu_seqlens=cu.to(DEV), max_seqlen=max(lengths))


@pytest.mark.parametrize("how", ["plain", "checkpointed", "half"])
@pytest.mark.parametrize("kind", ORDINARY)
def test_models_of_other_families_are_told_borders(kind, how, monkeypatch):
    from ftkit import sft
    model = tiny(kind, **ORDINARY[kind]).train()
    model.set_attn_implementation("sdpa")
    if how == "checkpointed": model.gradient_checkpointing_enable(dict(use_reentrant=False))
    batch, tuning, masks = packed_batch((5, 9, 2, 7, 4, 5), 2), sft.SupervisedTuning(), []
    def run(devices):
        monkeypatch.setattr(sft, "BY_BORDERS", devices)
        model.zero_grad()
        with torch.autocast(DEV, torch.bfloat16, enabled=how == "half"): loss, metrics = tuning(model, batch)
        loss.backward()
        return loss, metrics["accuracy"], *(p.grad.clone() for p in model.parameters() if p.grad is not None)
    want = run(())
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(sft, "packed_mask", lambda *a: masks.append(1))
    got = run((DEV,))
    assert model.config._attn_implementation == "ftkit" and not masks
    close = dict(rtol=2e-2, atol=5e-2) if how == "half" else dict(rtol=1e-4, atol=2e-4)
    for a, b in zip(got, want): torch.testing.assert_close(a, b, **close)
    monkeypatch.undo()
    again = run(())  # with a mask, through the same attention
    for a, b in zip(again, want): torch.testing.assert_close(a, b, **close)


def test_models_that_keep_their_masks(monkeypatch):
    from ftkit import sft
    from ftkit.attention import take_borders, why_not_borders
    monkeypatch.setattr(sft, "BY_BORDERS", (DEV,))
    batch, tuning = packed_batch((5, 9, 2)), sft.SupervisedTuning()
    for kind, more, how in (("GPTNeoX", {}, "eager"), ("Phi", dict(attention_dropout=.1), "sdpa"),
                            ("Starcoder2", dict(sliding_window=8), "sdpa")):
        model = tiny(kind, **more).train()
        model.set_attn_implementation(how)
        assert "max_length_q" not in tuning.inputs(model, batch)
        assert model.config._attn_implementation == how
    assert take_borders(model.eval()) and why_not_borders(torch.nn.Linear(2, 2))
    inputs = tuning.inputs(tiny("GPTNeoX"), {k: v for k, v in batch.items() if k != "cu_seqlens"})
    assert inputs["attention_mask"].shape == (1, 1, 16, 16)


def test_borders_that_get_lost():
    from ftkit.attention import with_borders
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 16, device=DEV)
    told = with_borders(torch.zeros(1, 4, dtype=torch.long, device=DEV),
                        torch.tensor([0, 1, 4], dtype=torch.int32, device=DEV), 3)
    f = attention.attention_for_transformers
    out = f(module, x, x, x, **told)[0]
    whole = f(module, x[:, :, 1:], x[:, :, 1:], x[:, :, 1:])[0]
    torch.testing.assert_close(out[:, 1:], whole, atol=1e-5, rtol=1e-4)
    told["cu_seq_lens_q"][1] = 2  # the same memory, another batch
    torch.testing.assert_close(f(module, x, x, x, **told)[0][:, 2:],
                               f(module, x[:, :, 2:], x[:, :, 2:], x[:, :, 2:])[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(FtkitError, match="where samples end"): f(module, x, x, x, told["attention_mask"])
    module.is_causal = False  # as an encoder of images beside it
    with pytest.raises(FtkitError, match="dropout"):
        f(torch.nn.Module(), x, x, x, dropout=.1, **told)
