"The loop on real (tiny) language models: normalisation, precision, bad input."
import math, signal, subprocess, sys

import numpy as np
import pytest, torch
from torch.testing import assert_close

from ftkit.core import FtkitError
from ftkit.data.packing import Row, make_row, make_rows
from ftkit.data.encode import Encoded
from ftkit.lora.inject import LoraConfig, add_lora
from ftkit.sft import PreTraining, SupervisedTuning
from ftkit.training.callbacks import Progress
from ftkit.training.loop import Callback, Trainer, TrainConfig
from ftkit.training.optim import OptimConfig

from small_runs import batch, tiny_model, tiny_rows, tiny_trainer, untimed


def weights(model): return [p.detach().clone() for p in model.parameters()]


class Gradients(Callback):
    "Keeps the gradients of the first step, before the optimizer clears them."
    def before_step(self, trainer):
        clear = trainer.optimizer.zero_grad
        def keep(*args, **kwargs):
            if trainer.parameters[0].grad is not None:
                self.found = [p.grad.clone() for p in trainer.parameters]
            clear(*args, **kwargs)
        trainer.optimizer.zero_grad = keep


def first_gradients(**cfg):
    kept = Gradients()
    tiny_trainer(rows=tiny_rows(8), callbacks=[kept], max_steps=1, **cfg).fit()
    return kept.found


def test_accumulation_does_not_change_the_gradient():
    "Rows with 1 to 19 learned tokens: a mean of means would be far off."
    counts = [sum(x != -100 for x in r.labels[1:]) for r in tiny_rows(8)]
    assert min(counts) == 1 and max(counts) > 10
    together, apart = first_gradients(batch_size=8), first_gradients(batch_size=2, accumulate=4)
    assert_close(together, apart, rtol=1e-4, atol=1e-6)
    single = first_gradients(batch_size=1, accumulate=8)
    assert_close(together, single, rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_the_token_mean():
    rows, model = tiny_rows(8), tiny_model()
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
        loss = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        learned = labels[0, 1:] != -100
        (-loss[learned].gather(1, ids[0, 1:][learned, None]).sum()).backward()
    count = sum(x != -100 for r in rows for x in r.labels[1:])
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()/count
    expected = [p.grad/count*min(1, 1/(norm + 1e-6)) for p in model.parameters()]
    assert_close(first_gradients(batch_size=2, accumulate=4), expected, rtol=1e-4, atol=1e-6)


def weighted_rows(n=8):
    "Rows of one and two samples, some of which count more."
    samples = [Encoded(r.ids, r.labels, weight=(1., 3., .5)[i % 3])
               for i, r in enumerate(tiny_rows(n + n//2))]
    return [make_row(samples[i:i + 1 + i % 2]) for i in range(n)]


def test_weights_of_samples_are_exact():
    "Σ w·ce / Σ w over the whole step, however it is divided into batches."
    rows, model, total, count = weighted_rows(), tiny_model(), 0., 0.
    for row in rows:
        weights = np.ones(len(row)) if row.weights is None else row.weights
        for a, b in zip(row.starts, row.starts[1:]):
            ids = torch.tensor(row.ids[a:b]).long()
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            for i in range(1, b - a):
                if row.labels[a + i] == -100: continue
                total -= weights[a + i]*logp[i - 1, ids[i]]
                count += weights[a + i]
    (total/count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    expected = [p.grad*min(1, 1/(norm + 1e-6)) for p in model.parameters()]
    for size, times in (8, 1), (2, 4), (1, 8):
        kept, cfg = Gradients(), dict(batch_size=size, accumulate=times, max_steps=1)
        run = tiny_trainer(rows=rows, callbacks=[kept], **cfg).fit()
        assert_close(kept.found, expected, rtol=1e-4, atol=1e-6)
        assert run.curve("train")[1][0] == pytest.approx((total/count).item(), rel=1e-5)


def test_rows_of_like_length_come_once_and_resume_exactly(tmp_path):
    rows = tiny_rows(23)
    lengths = [len(r.ids) for r in rows]
    def trainer(folder, steps):
        return tiny_trainer(rows=rows, lengths=lengths, batch_size=3, max_steps=steps,
                            work_dir=folder, save_every=5)
    whole = trainer(tmp_path/"a", 12)
    plan = whole.plan
    first = [i for step in range(plan.per_epoch) for batch, _ in plan.step(step) for i in batch]
    assert sorted(first) == list(range(23)) and lengths[first[0]] == max(lengths)
    whole.fit()
    class Stop(Callback):
        def after_step(self, trainer): trainer.should_stop = trainer.step == 7
    tiny_trainer(rows=rows, lengths=lengths, batch_size=3, max_steps=12, save_every=5,
                 work_dir=tmp_path/"b", callbacks=[Stop()]).fit()
    again = trainer(tmp_path/"b", 12)
    again.fit(resume="auto")
    assert_close(weights(again.model), weights(whole.model), rtol=0, atol=0)


def test_losses_of_the_history_do_not_depend_on_the_batches():
    a = tiny_trainer(rows=tiny_rows(8), batch_size=8, epochs=3).fit().curve()
    b = tiny_trainer(rows=tiny_rows(8), batch_size=1, accumulate=8, epochs=3).fit().curve()
    assert a[0] == b[0] and a[1] == pytest.approx(b[1], rel=1e-4)


def test_same_seed_same_run_other_seed_other_run():
    runs = [untimed(tiny_trainer(dropout=0.2, seed=s).fit().history) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_evaluating_does_not_change_training():
    often = tiny_trainer(dropout=0.2, eval_rows=tiny_rows(5), eval_every=1).fit()
    never = tiny_trainer(dropout=0.2).fit()
    assert often.curve() == never.curve() and len(often.curve("eval")[0]) == 23


def test_log_every_gives_the_same_training():
    each, some = tiny_trainer().fit(), tiny_trainer(log_every=4).fit()
    assert_close(weights(each.model), weights(some.model), rtol=0, atol=0)
    assert some.curve()[0] == [4, 8, 12, 16, 20, 22]
    learned = [r["learned"] for r in some.history]
    assert learned[-1] == each.history[-1]["learned"] == 2*sum(
        x != -100 for r in tiny_rows() for x in r.labels[1:])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_full(precision):
    full, half = (tiny_trainer(precision=p, epochs=4).fit().curve()[1] for p in ("fp32", precision))
    assert half != full
    assert half[-1] == pytest.approx(full[-1], rel=0.1) and half[-1] < half[0] - 0.3


def test_fp16_overflow_is_skipped_and_counted():
    trainer = tiny_trainer(precision="fp16", max_steps=30)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = weights(trainer.model)
    class Look(Callback):
        def after_step(self, t):
            if t.step == 1: self.same = all(map(torch.equal, before, weights(t.model)))
    trainer.callbacks.append(look := Look())
    with pytest.raises(FtkitError, match="step 20: 20 steps in a row overflowed"): trainer.fit()
    assert look.same and trainer.skipped == 20
    trainer = tiny_trainer(precision="fp16", max_steps=20)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    run = trainer.fit()
    assert 0 < run.history[-1]["skipped"] < 15 and math.isfinite(run.curve()[1][-1])


def test_nan_stops_the_run_and_is_never_saved(tmp_path):
    class Poison(Callback):
        def before_step(self, trainer):
            if trainer.step == 6: next(trainer.model.parameters()).data[:] = math.nan
    trainer = tiny_trainer(tmp_path, callbacks=[Poison()], save_every=3, log_every=5, keep=9)
    with pytest.raises(FtkitError, match="step 7: the loss is not a number.*lower learning rate"):
        trainer.fit()
    saved = [p.name for p in sorted(tmp_path.glob("checkpoint-*"))]
    assert saved == ["checkpoint-000003", "checkpoint-000006"]


def test_gradient_checkpointing_changes_nothing():
    plain, twice = (tiny_trainer(dropout=0.1, gradient_checkpointing=on).fit()
                    for on in (False, True))
    assert_close(weights(plain.model), weights(twice.model))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in twice.model.modules())


def test_gradient_checkpointing_with_a_frozen_base():
    def fit(on):
        model = tiny_model(initializer_range=0.5)
        model = add_lora(model, LoraConfig(r=2))
        return tiny_trainer(model=model, lr=1e-2, gradient_checkpointing=on).fit()
    plain, twice = fit(False), fit(True)
    assert plain.curve()[1][-1] < plain.curve()[1][0] - 0.2
    assert twice.curve()[1] == pytest.approx(plain.curve()[1], rel=1e-4)


def test_bad_rows():
    masked = Row([1, 2, 3], [-100]*3, [0, 1, 2], [0, 3])
    with pytest.raises(FtkitError, match=r"step 1, rows \[0\]: nothing is learned"):
        tiny_trainer(rows=[masked]).fit()
    with pytest.raises(FtkitError, match="nothing to train on"): tiny_trainer(rows=[])
    with pytest.raises(FtkitError, match="eval_rows: nothing is learned"):
        tiny_trainer(eval_rows=[masked]).fit()
    with pytest.raises(FtkitError, match="no parameter of the model is trainable"):
        tiny_trainer(model=tiny_model().requires_grad_(False))
    with pytest.raises(FtkitError, match="trainable weights are float16"):
        tiny_trainer(model=tiny_model().half(), precision="fp16")


def test_error_in_a_callback_closes_the_others():
    closed = []
    class Fails(Callback):
        def after_step(self, trainer): raise ZeroDivisionError
    class Watches(Callback):
        def on_stop(self, trainer): closed.append(trainer.step)
    trainer = tiny_trainer(callbacks=[Fails(), Watches()])
    with pytest.raises(ZeroDivisionError): trainer.fit()
    assert closed == [1] and not trainer.model.training


def test_error_at_the_end_of_a_callback_leaves_none_open():
    before, closed = signal.getsignal(signal.SIGINT), []
    class Fails(Callback):
        def on_stop(self, trainer): raise ZeroDivisionError
    class Watches(Callback):
        def on_stop(self, trainer): closed.append(trainer.step)
    trainer = tiny_trainer(callbacks=[Watches(), Fails(), Watches()])
    with pytest.raises(ZeroDivisionError): trainer.fit()
    assert closed == [trainer.step]*2 and signal.getsignal(signal.SIGINT) == before


def test_packed_rows_learn_what_single_rows_learn():
    "Packing changes neither the loss nor the gradient, only the number of rows."
    encoded = [Encoded(r.ids, r.labels) for r in tiny_rows(8)]
    packed, single = make_rows(encoded, 40), make_rows(encoded, 40, packing=False)
    assert len(packed) < len(single) == 8
    kept = []
    for rows in packed, single:
        kept.append(Gradients())
        trainer = tiny_trainer(rows=rows, batch_size=8, max_steps=1, callbacks=[kept[-1]])
        trainer.fit()
    assert_close(kept[0].found, kept[1].found, rtol=1e-4, atol=1e-6)


def test_missing_mask_is_built_from_the_positions():
    "A batch without a mask isolates samples all the same."
    encoded = [Encoded(r.ids, r.labels) for r in tiny_rows(8)]
    full = batch(make_rows(encoded, 40))
    bare = {k: v for k, v in full.items() if k != "attention_mask"}
    model = tiny_model()
    for objective in SupervisedTuning(), PreTraining():
        (a, x), (b, y) = (objective(model, objective.prepare(b)) for b in (full, bare))
        assert_close(a, b)
        assert x == y
    single = batch(make_rows(encoded, 40, packing=False))
    bare = {k: v for k, v in single.items() if k != "attention_mask"}
    assert "position_ids" not in objective.prepare(bare)
    assert_close(objective(model, objective.prepare(bare))[0], a)
    leaking = model(input_ids=full["input_ids"]).logits
    assert not torch.allclose(leaking, model(**{k: full[k] for k in (
        "input_ids", "position_ids", "attention_mask")}).logits, atol=1e-4)


def test_progress_in_a_pipe_is_plain_lines():
    code = ("from small_runs import tiny_trainer\nfrom ftkit.training.callbacks import Progress\n"
            "tiny_trainer(callbacks=[Progress()], max_steps=3).fit()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="tests")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == ""
    assert lines[0].startswith("step 1/3  loss") and lines[-1].startswith("step 3/3")
    assert "tokens/s" in lines[0] and "left" in lines[0] and "\x1b" not in done.stderr
