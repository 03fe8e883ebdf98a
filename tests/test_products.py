"Products by the fastest kernel: what is raced, when, and that nothing else changes."
import subprocess, sys
from functools import partial
from pathlib import Path
import pytest, torch
from torch.testing import assert_close
from ftkit.kernels import products
from ftkit.core import FtkitError
from ftkit.kernels.products import _best as best, _fits as fits, _side, choices, multiply, race

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TURNS = [(a, b) for a in (False, True) for b in (False, True)]


def laid(rows, cols, turned, dtype=torch.float32, device="cpu", apart=0):
    "Random numbers; columns are contiguous if turned; `apart` more numbers in each row."
    shape = (cols, rows + apart) if turned else (rows, cols + apart)
    m = torch.randn(shape, device=device).to(dtype)
    return m[:,:rows].T if turned else m[:,:cols]


@pytest.fixture
def raced(monkeypatch):
    "Three kernels as if there was a library: slow, with other bits, fast; which ones have run."
    ran = []
    class Plan:
        def __init__(self, a, b, out, aligned): self.aligned = aligned
        def algorithms(self): return ["slow", "other", "fast"]
        def run(self, found, a, b, out):
            ran.append(found)
            torch.mm(a, b, out=out)
            if found == "other": out.view(torch.int16)[:,::2] += 1
    cost = dict(slow=2., other=.1, fast=.5)
    def clock(run, ms):
        run()
        return cost[run.args[0]] if isinstance(run.args[0], str) else 1.
    for name,value in dict(_Plan=Plan, _library=lambda: True, _known={}, PATIENCE=3,
                           race=partial(race, clock=clock)).items():
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(products.torch.cuda, "is_current_stream_capturing", lambda: False)
    return ran


@pytest.mark.parametrize("turned", [False, True])
def test_a_matrix_is_what_the_library_reads_from_its_memory(turned):
    m = laid(5, 3, turned, apart=4)
    turn,rows,cols,stride = _side(m)
    read = torch.as_strided(m, (rows, cols), (1, stride), m.storage_offset()) # down the columns
    assert torch.equal(read.T if turn else read, m.T)


def test_only_what_is_contiguous_one_way_fits(monkeypatch):
    monkeypatch.setattr(products, "_library", lambda: True)
    a,b = torch.zeros(16, 16, dtype=torch.bfloat16),torch.zeros(16, 16, dtype=torch.bfloat16)
    assert fits(a, b, torch.empty_like(a)) and fits(a.T, b.T, torch.empty_like(a))
    wide = torch.zeros(16, 32, dtype=torch.bfloat16)
    assert not fits(wide[:,::2], b, torch.empty_like(a))
    assert not fits(a, b, torch.empty_like(a).T) and not fits(a, b.float(), torch.empty_like(a))
    assert not fits(a, b[:8], torch.empty_like(a)) and not fits(a, b, wide)
    assert not fits(wide[:,1:17], b, torch.empty_like(a)), "two bytes behind an address of 16"
    monkeypatch.setattr(products, "_library", lambda: None)
    assert not fits(a, b, torch.empty_like(a))


@pytest.mark.parametrize("shape", [(3, 5, 4), (1, 1, 1), (0, 4, 3), (4, 0, 3)])
@pytest.mark.parametrize("turned", TURNS)
def test_on_the_host_it_is_pytorchs_product(shape, turned):
    m,k,n = shape
    a,b = laid(m, k, turned[0]),laid(k, n, turned[1])
    out = torch.full((m, n), 7.)
    assert multiply(a, b, out) is out and torch.equal(out, a @ b)
    assert torch.equal(multiply(a, b), out)


def test_gradients_pass_and_what_does_not_fit_is_refused():
    a,b = torch.randn(3, 4, requires_grad=True),torch.randn(4, 2)
    multiply(a, b).sum().backward()
    assert_close(a.grad, b.sum(1).expand(3, 4))
    with pytest.raises(RuntimeError): multiply(torch.zeros(2, 3), torch.zeros(2, 3))


def test_the_race_is_held_once_and_only_equal_bits_win(raced):
    a,b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(2): assert best(a, b, out) is None and not raced
    run = best(a, b, out)
    n = len(raced)
    assert {"slow", "fast", "other"} == set(raced) and raced.count("other") == 1
    out.zero_()
    run(a, b, out)
    assert raced[-1] == "fast" and torch.equal(out, a @ b)
    assert best(a, b, out) is run and len(raced) == n + 1, "no second race"
    [(left, right, name, ms, first)] = choices()
    assert (left, right, name, ms, first) == ((32, 32), (32, 32), 2, .5, 1.)


def test_another_layout_is_another_product(raced):
    a,b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3): run = best(a, b, out)
    assert run is not None and best(a, b.T, out) is None and best(a[:16], b, out[:16]) is None
    assert best(a, b[:,::2], out[:,:16].contiguous()) is None, "never one for this"


def test_nan_is_compared_by_its_bits(raced):
    a,b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    a[3] = float("nan")
    out = torch.empty_like(a)
    for _ in range(3): run = best(a, b, out)
    assert run is not None


def test_no_race_while_a_graph_is_recorded(raced, monkeypatch):
    a,b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    monkeypatch.setattr(products.torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(9): assert best(a, b, out) is None
    monkeypatch.setattr(products.torch.cuda, "is_current_stream_capturing", lambda: False)
    assert best(a, b, out) is not None


def test_what_the_library_refuses_is_left_to_pytorch(raced, monkeypatch, caplog):
    class Plan:
        def __init__(self, *_): raise FtkitError("cublasLtMatmulDescCreate answers with error 7")
    monkeypatch.setattr(products, "_Plan", Plan)
    a,b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(9): assert best(a, b, out) is None
    assert caplog.text.count("answers with error 7") == 1 and choices() == []


def test_memory_that_runs_out_in_a_race_is_for_the_planner_to_know(raced, monkeypatch):
    def full(*_): raise torch.OutOfMemoryError("no memory")
    monkeypatch.setattr(products, "race", full)
    a,b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(2): best(a, b, out)
    with pytest.raises(torch.OutOfMemoryError): best(a, b, out)
    for _ in range(9): assert best(a, b, out) is None, "the step that is done again holds no race"


def test_lengths_that_vary_hold_few_races_and_are_not_remembered_for_ever(raced, monkeypatch):
    monkeypatch.setattr(products, "RACES", 2)
    monkeypatch.setattr(products, "LAYOUTS", 5)
    b,out = torch.randn(32, 32).bfloat16(),torch.empty(64, 32).bfloat16()
    for n in range(16, 40):
        a = torch.randn(n, 32).bfloat16()
        for _ in range(5): run = best(a, b, out[:n])
        assert (run is not None) == (n < 18)
    assert len(choices()) == 2 and len(products._known) == 5


def test_a_lead_of_less_than_a_percent_is_none():
    clock = lambda run, ms: run()
    assert race(dict(torch=lambda: 1., a=lambda: .995, b=lambda: 3.), clock)[0] == "torch"
    assert race(dict(torch=lambda: 1., a=lambda: .98, b=lambda: 3.), clock)[0] == "a"
    assert race(dict(torch=lambda: 1.), clock) == ("torch", dict(torch=1.))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", TURNS)
def test_every_kernel_of_the_list_gives_the_product(turned, dtype):
    "Apart: rows lie 64 numbers apart, as beside a LoRA; the memory between them is left alone."
    m,k,n = 384,320,256
    for apart in (0, 64):
        a,b = (laid(*s, t, dtype, "cuda", apart) for s,t in zip(((m, k), (k, n)), turned))
        whole = torch.full((m, n + apart), 3., dtype=dtype, device="cuda")
        out,want = whole[:,:n],a @ b
        plan = products._Plan(a, b, out, products._aligned(a, b, out))
        found = plan.algorithms()
        assert found
        for f in found:
            out.zero_()
            plan.run(f, a, b, out)
            assert_close(out, want, rtol=1e-2, atol=1e-2)
            assert (whole[:,n:] == 3).all()


@gpu
def test_a_race_on_the_card_changes_no_bit(monkeypatch):
    for name,value in dict(LEAST=1, PATIENCE=2, _known={}).items():
        monkeypatch.setattr(products, name, value)
    a = laid(2048, 1088, False, torch.bfloat16, "cuda", 64)
    b = laid(1088, 2048, True, torch.bfloat16, "cuda")
    out,want = torch.empty(2048, 2048, device="cuda").bfloat16(),a @ b
    before = torch.cuda.memory_allocated()
    for _ in range(4): assert torch.equal(multiply(a, b, out), want)
    assert len(choices()) == 1 and torch.cuda.memory_allocated() - before < 1 << 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): multiply(a, b, out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)
    a.requires_grad_()
    multiply(a, b).sum().backward() # autograd is not cut off
    assert a.grad is not None


def test_the_tool_says_what_it_needs():
    tool = Path(__file__).parent.parent/"tools"/"bench_products.py"
    run = partial(subprocess.run, capture_output=True, text=True)
    done = run([sys.executable, tool, "--shape", "no-such"])
    assert done.returncode == 2 and "llama3-8b" in done.stderr
    if torch.cuda.is_available(): return
    done = run([sys.executable, tool])
    assert done.returncode == 1 and "GPU" in done.stderr
