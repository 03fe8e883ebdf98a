"Stopped, killed, out of disk: what was saved last loads, and the run goes on exactly."
import json, multiprocessing, os, random, signal, time
from multiprocessing import forkserver
from pathlib import Path

import pytest, torch

from ftkit.core import FtkitError
from ftkit.training.checkpoint import checkpoints, damage, latest_checkpoint
from ftkit.training.loop import Callback
from ftkit.training import run as run_module
from ftkit.training.run import StopOnSignal, read_log
from small_runs import Announce, tiny_model, tiny_rows, tiny_trainer, train_in_child, untimed

fork = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server():
    "Children are forked from a process that has paid for the imports and has computed nothing."
    with pytest.MonkeyPatch.context() as m:
        here = Path(__file__).parent
        m.setenv("PYTHONPATH", os.pathsep.join([str(here), str(here.parent)]))
        m.setenv("OMP_NUM_THREADS", "1")
        fork.set_forkserver_preload(["small_runs"])
        forkserver.ensure_running()


@pytest.mark.parametrize("inside", [False, True])
def test_the_same_trainer_goes_on_after_an_error(tmp_path, inside):
    how = dict(save_every=3, log_every=2, step_in_backward=inside)
    wanted = tiny_trainer(tmp_path/"a", **how).fit()
    trainer = tiny_trainer(tmp_path/"b", **how)
    whose, name = (trainer.inside, "finish") if inside else (trainer.optimizer, "step")
    real = getattr(whose, name)
    def breaks(*args, **kw):
        if trainer.step == 7: raise RuntimeError("the end")
        return real(*args, **kw)
    setattr(whose, name, breaks)
    with pytest.raises(RuntimeError, match="the end"):
        trainer.fit()
    setattr(whose, name, real)
    assert untimed(trainer.fit(resume="auto").history) == untimed(wanted.history)


def child(work, **cfg):
    "Start training in a process of its own; returns it and the file that names its steps."
    announce = work.parent/f"{work.name}.steps"
    announce.unlink(missing_ok=True)
    process = fork.Process(target=train_in_child, args=(str(work), str(announce), cfg))
    process.start()
    return process, announce


def wait_for_step(announce, n, limit=120):
    end = time.monotonic() + limit
    while not announce.exists() or len(announce.read_text().split()) < n:
        assert time.monotonic() < end, "the child makes no progress"
        time.sleep(0.01)


class Stop(Callback):
    order = 100
    def __init__(self, step): self.at = step
    def after_step(self, trainer):
        if trainer.step == self.at: raise KeyboardInterrupt


def stop_and_resume(work, at, **cfg):
    whole = tiny_trainer(**cfg).fit()
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(work, callbacks=[Stop(at)], save_every=2, **cfg).fit()
    return whole, tiny_trainer(work, **cfg).fit(resume="auto")


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_resume_is_exact(tmp_path, at):
    "Dropout, accumulation, in the middle of an epoch, between saves: losses equal bit for bit."
    cfg = dict(dropout=0.3, accumulate=3, epochs=3, eval_rows=tiny_rows(5), eval_every=3)
    whole, rest = stop_and_resume(tmp_path, at, **cfg)
    assert untimed(rest.history) == untimed(whole.history)
    assert untimed(read_log(tmp_path/"log.jsonl")) == untimed(whole.history)
    for a, b in zip(whole.model.parameters(), rest.model.parameters()): assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_is_exact_in_half_precision(tmp_path, precision):
    cfg = dict(dropout=0.1, precision=precision, accumulate=2, epochs=2)
    whole, rest = stop_and_resume(tmp_path, 5, **cfg)
    assert untimed(rest.history) == untimed(whole.history)


def test_resume_keeps_the_scaler(tmp_path):
    def trainer(*callbacks):
        t = tiny_trainer(tmp_path, callbacks=callbacks, precision="fp16", max_steps=14,
                         save_every=12)
        t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return t
    with pytest.raises(KeyboardInterrupt): (first := trainer(Stop(12))).fit()
    assert first.scaler.get_scale() < 2.0**20 and first.skipped
    second = trainer()
    second.fit("auto")
    assert second.scaler.get_scale() == first.scaler.get_scale()
    assert second.skipped == first.skipped


def test_resume_refuses_other_data_and_settings(tmp_path):
    tiny_trainer(tmp_path, max_steps=2).fit()
    def again(**change):
        return tiny_trainer(tmp_path, **{"max_steps": 2, **change}).fit(resume="auto")
    again()
    changed = tiny_rows()
    changed[3].ids[1] += 1
    for name, change in {"rows": dict(rows=tiny_rows(20)), "content": dict(rows=changed),
                         "seed": dict(seed=1), "batch_size": dict(batch_size=3),
                         "accumulate": dict(accumulate=2), "steps": dict(max_steps=3),
                         "precision": dict(precision="bf16"), "optim.lr": dict(lr=0.5)}.items():
        with pytest.raises(FtkitError, match=f"cannot be resumed exactly: .*{name} was .* and is"):
            again(**change)
    with pytest.raises(FtkitError, match="trainable parameters differ"):
        again(model=tiny_model(tie_word_embeddings=True))
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_says_how_to_go_on(tmp_path, signum):
    work = tmp_path/"run"
    process, announce = child(work, epochs=400, dropout=0.1)
    wait_for_step(announce, 3)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum
    done = int(announce.read_text().split()[-1])
    message = (work/"message.txt").read_text()
    assert f"{signal.Signals(signum).name} after step {done} of 4400" in message
    assert "--resume" in message and str(latest_checkpoint(work)) in message
    assert latest_checkpoint(work).name == f"checkpoint-{done:06d}"


def test_second_signal_ends_at_once(tmp_path):
    work = tmp_path/"run"
    class Slow(Announce):
        order = 99  # before the callback that stops
        def after_step(self, trainer):
            super().after_step(trainer)
            for _ in range(2): signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(work, callbacks=[Slow(tmp_path/"steps")]).fit()
    assert not checkpoints(work)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_killed_at_any_moment(tmp_path):
    "kill -9 in a loop while every step is saved: the newest complete checkpoint always loads."
    work, rng, seen, torn = tmp_path/"run", random.Random(0), [], 0
    cfg = dict(epochs=12, dropout=0.2, save_every=1, keep=2)
    whole = tiny_trainer(**{k: v for k, v in cfg.items() if k != "save_every"}).fit()
    while len(seen) < 6 or (torn < 2 and len(seen) < 20):  # until two were killed in mid-save
        process, announce = child(work, **cfg)
        wait_for_step(announce, 3)
        time.sleep(rng.uniform(0, 0.06))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        newest = latest_checkpoint(work)
        assert newest and damage(newest) is None
        seen.append(int(newest.name[-6:]))
        torn += len(list(work.glob(".checkpoint-*.tmp")))
    assert seen == sorted(seen) and seen[-1] > seen[0] > 0 and torn >= 2
    process, _ = child(work, **cfg)
    process.join(120)
    assert process.exitcode == 0
    assert untimed(read_log(work/"log.jsonl")) == untimed(whole.history)
    assert sorted(p.name for p in work.iterdir() if p.name != ".lock") == [
        "checkpoint-000131", "checkpoint-000132", "log.jsonl"]  # nothing half-written stayed


def full_disk(folder):
    (folder/"model.safetensors").write_bytes(b"some")
    with open("/dev/full", "w") as f: f.write("weights")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_saving(tmp_path):
    cfg = dict(max_steps=6, dropout=0.1)
    trainer = tiny_trainer(tmp_path, save_every=2, keep=9, **cfg)
    save = trainer.write_model
    trainer.write_model = lambda folder: (full_disk if trainer.step == 4 else save)(folder)
    with pytest.raises(FtkitError, match="checkpoint-000004: the disk is full.*Free some space"):
        trainer.fit()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoint-000002", "log.jsonl"]
    whole, rest = tiny_trainer(**cfg).fit(), tiny_trainer(tmp_path, **cfg).fit(resume="auto")
    assert untimed(rest.history) == untimed(whole.history)


def test_full_disk_as_safetensors_tells_it(tmp_path):
    from safetensors import SafetensorError
    def save(folder): raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(FtkitError, match="the disk is full"):
        tiny_trainer(tmp_path, max_steps=1, save=save).fit()
    def save(folder): raise SafetensorError("something else")
    with pytest.raises(SafetensorError): tiny_trainer(tmp_path, max_steps=1, save=save).fit()
    assert not checkpoints(tmp_path)


def test_damaged_newest_is_passed_over(tmp_path, capsys):
    cfg = dict(max_steps=6, dropout=0.1)
    whole = tiny_trainer(tmp_path, save_every=2, keep=9, **cfg).fit()
    cut = ("checkpoint-000006/model.safetensors", 100), ("checkpoint-000004/trainer/state.json", 9)
    for name, size in cut:
        with open(tmp_path/name, "r+b") as f: f.truncate(size)
    (tmp_path/"checkpoint-000005").mkdir()
    with pytest.raises(FtkitError, match="damaged: model.safetensors has 100 bytes"):
        tiny_trainer(tmp_path, **cfg).fit(resume=tmp_path/"checkpoint-000006")
    rest = tiny_trainer(tmp_path, **cfg).fit(resume="auto")
    assert "passing over" in capsys.readouterr().err
    assert untimed(rest.history) == untimed(whole.history)
    assert damage(tmp_path/"checkpoint-000006") is None


def test_a_checkpoint_holds_no_pickle(tmp_path):
    tiny_trainer(tmp_path, max_steps=1).fit()
    files = {f.name for f in (tmp_path/"checkpoint-000001").rglob("*") if f.is_file()}
    assert files == {"model.safetensors", "state.safetensors", "state.json"}
    json.loads((tmp_path/"checkpoint-000001/trainer/state.json").read_text())


def test_two_runs_cannot_share_a_folder(tmp_path):
    work = tmp_path/"run"
    process, announce = child(work, epochs=400)
    try:
        wait_for_step(announce, 1)
        with pytest.raises(FtkitError, match="another run is training in this folder"):
            tiny_trainer(work).fit(resume="auto")
    finally:
        process.kill()
        process.join()


def test_a_signal_amid_a_message_is_heard(monkeypatch, capfd):
    "Python refuses to write to a stream from a handler that has interrupted a write to it."
    def busy(_): raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")
    monkeypatch.setattr(run_module, "say", busy)
    stop = StopOnSignal()
    stop.hear(signal.SIGINT, None)
    assert stop.signum == signal.SIGINT and "stopping after this step" in capfd.readouterr().err
