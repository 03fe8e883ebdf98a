"Steps that are recorded and replayed: what has to stay in place, and when nothing is recorded."
import time
from functools import cache

import numpy as np
import pytest
import torch
from small_runs import tiny_model, untimed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import ftkit.graph as graph
from ftkit.core import FtkitError
from ftkit.data.packing import Row, collate
from ftkit.fast import find_decoder, set_saving, speed_up
from ftkit.graph import Again, Graph, StepGraphs, shape_key
from ftkit.kept import Saving, put_on_host
from ftkit.kernels.edges import SCRATCH, SEEDS, dropped
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.planner import FitMemory
from ftkit.quant.linear import quantize_model
from ftkit.sft import SupervisedTuning, borders_with_room, room_for
from ftkit.training.loop import Trainer, TrainConfig
from ftkit.training.optim import OptimConfig
from ftkit.training.run import Callback

CUDA = torch.cuda.is_available()
DEV = "cuda" if CUDA else "cpu"


class Never(StepGraphs):
    "The same shapes, never recorded."
    WARM = 10**9


def sample(n, start, masked):
    ids = (np.arange(n) + start) % 23 + 1
    return ids, np.where(np.arange(n) < masked, -100, ids), np.arange(n)


def rows_of(lengths, weights=False, seed=0, masked=3):
    "One row for each list of lengths."
    rng, rows = np.random.default_rng(seed), []
    for ns in lengths:
        parts = [sample(n, int(rng.integers(23)), int(rng.integers(1, masked))) for n in ns]
        ids, labels, positions = (np.concatenate(x) for x in zip(*parts))
        labels[np.cumsum([0, *ns[:-1]])] = -100
        w = rng.random(len(ids)).astype(np.float32) if weights else None
        rows.append(Row(ids, labels, positions, np.cumsum([0, *ns]), weights=w))
    return rows


PACKED = rows_of([[9, 15], [14, 10], [4, 7, 13], [11, 13], [16, 8], [10, 14], [13, 11], [12, 12]])
DENSE = rows_of([[24]]*8)
EVEN = rows_of([[24]]*8, masked=2)  # as many learned tokens in each


def model_of(dropout=0., bits=None, lora=True, fast=True, hold=None, saving=None,
             rows_at_a_time=None):
    model = tiny_model(hidden_act="silu")
    if bits: quantize_model(model, 4)
    if lora:
        add_lora(model, LoraConfig(r=4, dropout=dropout))
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad: nn.init.normal_(p, std=0.1)
    model.to(DEV)
    if fast: speed_up(model, saving, hold=hold)
    if rows_at_a_time:
        for part in find_decoder(model).__dict__["_fast"].parts:
            for p in part.projections: p.piece = rows_at_a_time
    return model


def trainer_of(model, rows=PACKED, callbacks=(), work_dir=None, pad=None, objective=None, **cfg):
    cfg = dict(batch_size=1, epochs=3, precision="fp32") | cfg
    return Trainer(model, objective or SupervisedTuning(), rows, TrainConfig(**cfg),
                   OptimConfig(lr=1e-2), lambda rows: collate(rows, 0, mask=None, pad_to=pad),
                   callbacks=callbacks, work_dir=work_dir)


def train(graphs, rows=PACKED, callbacks=(), **cfg):
    "The history, and the weights in the end."
    keys = "dropout", "bits", "lora", "fast", "hold", "saving", "rows_at_a_time"
    model = model_of(**{k: cfg.pop(k) for k in keys if k in cfg})
    run = trainer_of(model, rows, [graphs, *callbacks], **cfg).fit()
    weights = [p.detach().cpu() for p in model.parameters() if p.requires_grad]
    return untimed(run.history), torch.cat([w.flatten() for w in weights])


def same(a, b):
    assert a[0] == b[0]
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=0)


@cache
def computed():
    "With dropout, and without any recording."
    return train(Never(recorder=Again), dropout=0.2)


CASES = {"packed": {}, "dense": dict(rows=DENSE), "dropout": dict(dropout=0.2),
         "accumulate": dict(accumulate=3, dropout=0.1), "two rows": dict(batch_size=2, epochs=6),
         "held": dict(hold=True, dropout=0.2, accumulate=2), "nf4": dict(bits=4),
         "most": dict(saving="most", dropout=0.2), "whole weights": dict(lora=False),
         "by modules": dict(fast=False, cuda_graph=True),
         "host": dict(saving=Saving("some", host=True), hold=True, dropout=0.2, accumulate=2),
         "nf4 most": dict(saving="most", bits=4, dropout=0.2),
         "nf4 host": dict(saving=Saving("much", host=True, piece=8), bits=4, dropout=0.1),
         "nf4 rows": dict(saving=Saving("most", host=True), bits=4, rows_at_a_time=10),
         "weights": dict(rows=rows_of([[9, 15], [14, 10], [4, 20], [6, 18]]*2, weights=True))}


class Tape(TorchDispatchMode):
    """Records what a function does to memory, and does that again, blind for all that Python would
    decide anew: as a CUDA graph would. (Tensors of Python numbers are made when it is recorded.)"""
    pool, bytes, timed = None, 0, False

    def __init__(self, run, device, pool=None):
        super().__init__()
        self.ops = []
        with self: self.out = run()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():
            for op in self.ops: self.once(*op)
        return self.out

    def once(self, func, args, kwargs, out):
        views = [r.alias_info for r in func._schema.returns if r.alias_info]
        if any(not v.is_write for v in views): return
        for a, b in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
            if isinstance(a, torch.Tensor) and not views: a.copy_(b)


BY_TAPE = ("dense", "dropout", "accumulate", "held", "nf4", "host", "nf4 most", "nf4 host", "nf4 rows")


@pytest.mark.parametrize("case", CASES)
def test_replayed_equals_computed(case):
    graphs, how = StepGraphs(recorder=Again), CASES[case]
    if case in BY_TAPE and not CUDA:  # where the formulas of a CPU have the same shapes each time
        graphs.recorder, how = Tape, how | dict(rows=EVEN, epochs=how.get("accumulate", 1))
    ours, right = train(graphs, **how), train(Never(recorder=Again), **how)
    assert graphs.used > 3 and not graphs.off
    same(ours, right)


def test_shapes_settle():
    most = {}
    cu = torch.tensor([0, 3, 24], dtype=torch.int32)
    first = borders_with_room(cu, 21, (1, 24), most)
    assert first[0].dtype == torch.int32 and len(first[0]) == 16 and first[1] == 24
    many = torch.arange(25, dtype=torch.int32)
    assert len(borders_with_room(many, 1, (1, 24), most)[0]) == 32
    assert len(borders_with_room(cu, 2, (1, 24), most)[0]) == 32  # their number only grows
    assert most[1, 24] == 32 and borders_with_room(cu, 2, (1, 24), most)[1] == 3
    assert borders_with_room(cu, 9, (1, 24), most)[1] == 16
    for n in (1, 2, 7, 8, 9, 100):
        for k in range(1, n + 1): assert k <= room_for(k, n) <= n + 7
    keys = [shape_key(dict(a=torch.zeros(2), n=n)) for n in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_seeds_of_a_table_are_those_that_would_be_drawn():
    torch.manual_seed(5)
    pairs = [SEEDS.draw(2) for _ in range(9)]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    table = torch.tensor(SEEDS.keys(18), dtype=torch.int32).view(18, 4)
    assert torch.equal(after, torch.get_rng_state())
    x = torch.randn(7, 33)
    for seed, row in zip((s for p in pairs for s in p), table):
        for which in range(4):
            assert torch.equal(dropped(x, seed, .3, which), dropped(x, row, .3, which))


def test_resume_is_exact(tmp_path):
    def stop_at(n):
        c = Callback()
        c.after_step = lambda t: setattr(t, "should_stop", t.step == n)
        return c
    model = model_of(dropout=0.2)
    trainer_of(model, PACKED, [StepGraphs(recorder=Again), stop_at(11)], tmp_path).fit()
    model, graphs = model_of(dropout=0.2), StepGraphs(recorder=Again)
    trainer_of(model, PACKED, [graphs], tmp_path).fit(resume="auto")
    weights = torch.cat([p.detach().cpu().flatten() for p in model.parameters() if p.requires_grad])
    assert graphs.used
    torch.testing.assert_close(weights, computed()[1], rtol=0, atol=0)


class Failing(Again):
    "Cannot record, after having done half of it."
    def __init__(self, run, device, pool=None):
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_a_recording_that_fails_changes_nothing(capsys):
    class Half(Again):  # the error comes before anything is computed
        def __init__(self, *args): raise torch.OutOfMemoryError("no more")
    graphs = StepGraphs(recorder=Half)
    same(train(graphs, dropout=0.2), computed())
    assert graphs.off and not graphs.used
    assert capsys.readouterr().err.count("without CUDA graphs: one could not be recorded") == 1
    with pytest.raises(FtkitError, match="cannot be recorded.*not permitted when stream"):
        train(StepGraphs(recorder=Failing), cuda_graph=True)


def test_a_recording_that_is_wrong_is_found_out(capsys):
    class Baked(Again):
        "Forgets that the batch changes."
        def replay(self):
            batch = self.run.args[0].batch
            if not hasattr(self, "ids"): self.ids = batch["input_ids"]*0 + 3
            batch["input_ids"].copy_(self.ids)
            return self.run()
    graphs = StepGraphs(recorder=Baked)
    same(train(graphs, dropout=0.2), computed())
    assert graphs.off and "are right" in capsys.readouterr().err


def test_a_recording_that_is_no_faster_goes(monkeypatch):
    monkeypatch.setattr(graph, "PAYS", 0.)
    class Slow(Again):
        timed = True
        def replay(self):
            time.sleep(0.2)
            return self.run()
    graphs, rows = StepGraphs(recorder=Slow), PACKED[:1]*6
    same(train(graphs, rows, epochs=1), train(Never(recorder=Again), rows, epochs=1))
    assert graphs.used == 2 and not graphs.off  # to compare, and for the clock


def test_recordings_go_first_when_memory_runs_out(capsys, monkeypatch):
    monkeypatch.setattr(graph, "PAYS", 0.)  # however busy a GPU is
    class Large(Again):
        bytes = 100
    class Short(Callback):
        "Memory runs out once, in a batch that is computed."
        def before_fit(self, t):
            take = t.forward_backward
            def run(batch, factor):
                if t.step == 6 and graphs.held: raise torch.OutOfMemoryError("no more")
                return take(batch, factor)
            t.forward_backward = run
    graphs, fit, short = StepGraphs(recorder=Large), FitMemory(), Short()
    short.order = 9
    ours = train(graphs, DENSE, callbacks=[fit, short], epochs=1)
    assert graphs.off and graphs.used in (4, 5) and not graphs.held  # one fewer where weights move first
    assert {s.level for s in fit.plan.rung.saving} in ({"none"}, {"norms"}, {"all"})  # it did not go down
    assert "memory ran out" in capsys.readouterr().err
    same(ours, train(Never(recorder=Again), DENSE, epochs=1))


@pytest.mark.parametrize("how", [{}, dict(fast=False, cuda_graph=True)])
def test_layers_that_are_switched_off_and_on_again(how, monkeypatch):
    monkeypatch.setattr(graph, "PAYS", 0.)
    class Switch(Callback):
        def after_step(self, t):
            if t.step not in (6, 14): return
            for m in t.model.modules():
                if hasattr(m, "start_A"): m.enabled = t.step == 14 or "down" in names[m]
            graphs.switched = graphs.used
    class Graphs(StepGraphs):
        def forget(self):
            forgot.append(self.held)
            super().forget()
    forgot, names = [], {}
    class Names(Callback):
        def before_fit(self, t): names.update({m: n for n, m in t.model.named_modules()})
    graphs = Graphs(recorder=Again)
    ours = train(graphs, DENSE, callbacks=[Switch(), Names()], **how)
    assert graphs.used > graphs.switched > 0
    assert len(forgot) in (5, 6), forgot  # begin, first, where weights have moved, twice, end
    same(ours, train(Never(recorder=Again), DENSE, callbacks=[Switch(), Names()], **how))


def test_hooks_that_come_later(capsys, monkeypatch):
    monkeypatch.setattr(graph, "PAYS", 0.)
    class Hook(Callback):
        def after_step(self, t):
            if t.step == 8: t.model.model.layers[0].register_forward_hook(lambda *_: called.append(t.step))
    called, graphs = [], StepGraphs(recorder=Again)
    same(train(graphs, DENSE, callbacks=[Hook()]), train(Never(recorder=Again), DENSE, callbacks=[Hook()]))
    assert graphs.off and graphs.used and "has hooks" in capsys.readouterr().err
    assert called[:16] == list(range(8, 24))


def test_too_many_shapes(capsys):
    lengths = [[n] for n in range(6, 14)]*4
    graphs = StepGraphs(most=2, recorder=Again)
    graphs.WARM = 0
    ours = train(graphs, rows_of(lengths), epochs=1)
    assert graphs.off and "too many shapes" in capsys.readouterr().err
    same(ours, train(Never(recorder=Again), rows_of(lengths), epochs=1))


def test_what_changes_between_steps_is_noticed():
    class Change(Callback):
        "Other layers keep less from a step on; a generation unpacks other weights in between."
        def after_step(self, t):
            if t.step == 12: set_saving(t.model, [Saving("most"), Saving("none")])
            if t.step == 16: SCRATCH.forget()
            fast = find_decoder(t.model).__dict__["_fast"]
            if t.step == 18: fast.cache(2)  # weights in four bits stay unpacked
            if t.step == 20: fast.build()
            if t.step == 22: fast.cache(1)
    for how in (dict(hold=True), dict(bits=4), dict(bits=4, hold=True)):
        graphs = StepGraphs(recorder=Again)
        ours = train(graphs, callbacks=[Change()], dropout=0.1, **how)
        assert graphs.used and not graphs.off
        same(ours, train(Never(recorder=Again), callbacks=[Change()], dropout=0.1, **how))


def test_evaluation_in_between():
    class Evaluate(Callback):
        def after_step(self, t):
            if t.step % 5 == 0: t.evaluate()
    graphs = StepGraphs(recorder=Again)
    same(train(graphs, callbacks=[Evaluate()], bits=4), train(Never(recorder=Again),
                                                              callbacks=[Evaluate()], bits=4))
    assert graphs.used


@pytest.mark.parametrize("bits", [None, 4])
def test_a_head_that_comes_for_each_loss(bits, monkeypatch):
    class Head(Callback):
        order = 5.5  # when the memory has been planned, before anything is recorded
        def before_fit(self, t): put_on_host(t.model, head=True)
    how = dict(dropout=0.1, bits=bits, accumulate=2)
    monkeypatch.setattr(graph, "PAYS", 0.)
    graphs = StepGraphs(recorder=Graph if CUDA else Again)
    ours = train(graphs, DENSE, callbacks=[Head(), FitMemory()], **how)
    assert graphs.used and not graphs.off
    right = train(Never(recorder=Again), DENSE, callbacks=[FitMemory()], **how)
    if not CUDA: return same(ours, right)
    torch.testing.assert_close(ours[1], right[1], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(CUDA, reason="for the tape")
def test_weights_that_only_some_batches_reach():
    class Sometimes(SupervisedTuning):
        def __call__(self, model, batch):
            loss, metrics = super().__call__(model, batch)
            if batch["input_ids"].shape[1] == 16: loss = loss + (model.extra - 1).square().sum()
            return loss, metrics
    def run(graphs):
        model = model_of()
        model.extra = nn.Parameter(torch.zeros(3))
        trainer_of(model, rows_of([[24], [16]]*6, masked=2), [graphs], objective=Sometimes(), epochs=2,
                   batch_size=1).fit()
        return model.extra.detach()
    class Keeps(StepGraphs):
        "Gradients stay from the first batch on: a weight that is not reached has one of zeros."
        def compute(self, *args):
            out = super().compute(*args)
            self.keep()
            return out
    graphs, never = Keeps(recorder=Tape), Keeps(recorder=Again)
    never.WARM = 10**9
    torch.testing.assert_close(run(graphs), run(never), rtol=1e-5, atol=1e-7)
    assert sum(e.recording is not None for e in graphs.entries.values()) == 2 or graphs.used > 8


def test_reasons_not_to_record(capsys):
    def why(insist=False, change=lambda t: None, **how):
        t = trainer_of(model_of(**how), cuda_graph=insist or None)
        change(t)
        g = StepGraphs(recorder=Again)
        try: g.before_fit(t)
        finally: g.on_stop(t)
        assert "forward_backward" not in t.__dict__ and "prepare_step" not in t.__dict__
        return g.why
    assert why() is None
    assert "by hand" in why(fast=False) and why(insist=True, fast=False) is None
    assert why(saving=Saving("most", host=True)) is None
    hook = lambda t: t.model.lm_head.register_forward_hook(lambda *a: None)
    assert "hooks" in why(change=hook)
    with pytest.raises(FtkitError, match="hooks"): why(insist=True, change=hook)
    def of_weight(t): t.parameters[0].register_post_accumulate_grad_hook(lambda p: None)
    assert "hooks" in why(change=of_weight)
    assert "several processes" in why(change=lambda t: setattr(t, "world", 2))
    g = StepGraphs(recorder=Again)
    g.before_fit(t := trainer_of(model_of(), cuda_graph=False))
    assert "off" in g.why and "forward_backward" not in t.__dict__
    if not CUDA: assert "no GPU" in train_why()


def train_why():
    g = StepGraphs()
    g.before_fit(trainer_of(model_of()))
    return g.why


def test_deferred_gradients_end_with_the_run():
    model = model_of(hold=True)
    graphs = StepGraphs(recorder=Again)
    trainer_of(model, PACKED, [graphs]).fit()
    fast = find_decoder(model).__dict__["_fast"]
    assert graphs.used and not fast.defer and not fast.edges.defer


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("case", ["packed", "dense", "dropout", "accumulate", "held", "nf4", "most",
                                  "host", "nf4 most", "nf4 host", "nf4 rows"])
def test_on_a_gpu(case):
    how = dict(CASES[case]) | dict(cuda_graph=True, precision="auto")
    graphs = StepGraphs()
    ours, right = train(graphs, **how), train(Never(recorder=Again), **how)
    assert graphs.used > 3 and not graphs.off
    for a, b in zip(ours[0], right[0]):
        if a["event"] == "train": assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_memory_is_not_taken_twice_on_a_gpu():
    from ftkit.bench import Clock
    def run(graphs):
        torch.cuda.empty_cache()
        clock, rows = Clock(warmup=4, steps=2), rows_of([[8192]]*8)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=24, hidden_size=512, intermediate_size=2048, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=8192, pad_token_id=0)).to(DEV)
        add_lora(model, LoraConfig(r=4))
        speed_up(model)
        trainer_of(model, rows, [graphs, clock], epochs=1, cuda_graph=True, precision="auto").fit()
        return clock
    graphs = StepGraphs()
    ours, right = run(graphs), run(Never(recorder=Again))
    assert graphs.used and ours.peak < 1.15*right.peak and ours.reserved < 1.3*right.reserved


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_after_a_failed_recording_the_gpu_works_on():
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError): Graph(lambda: x.sum().item(), "cuda")
    assert torch.rand(3, device="cuda").sum() > 0 and torch.nn.functional.dropout(x).shape == (4,)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert float(Graph(lambda: x*2, "cuda").replay().sum()) == 8


def test_what_does_not_pay_is_asked_once(monkeypatch):
    "A GPU that is busy anyway: no gradients stay, and nobody waits again."
    from ftkit import graph
    asked, real = [], graph.host_share
    def share(run, wait, *more):
        asked.append(1)
        out, _, whole = real(run, wait, *more)
        return out, 0.1, whole
    monkeypatch.setattr(graph, "host_share", share)
    graphs = StepGraphs(recorder=Again)
    ours = train(graphs, EVEN, epochs=2, cuda_graph=None)
    assert len(asked) == 1 and not graphs.used and not graphs.grads
    same(ours, train(Never(recorder=Again), EVEN, epochs=2))
