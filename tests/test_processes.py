"Two processes on the CPU train like one."
import json, os, subprocess, sys
from pathlib import Path

import pytest

from small_runs import tiny_rows, tiny_trainer, untimed

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(HERE/"small_runs.py"), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads((folder/f"rank{r}.json").read_text()) for r in range(2)]


def test_losses_equal_those_of_one_process(two):
    "22 rows in eights: the last step of an epoch leaves one process without a batch of its own."
    folder, (first, second) = two
    alone = untimed(tiny_trainer(None, batch_size=2, accumulate=4, epochs=2, eval_every=2,
                                 eval_rows=tiny_rows(7)).fit().history)
    assert first["run"] == second["run"] and first["run"][0]["event"] == "eval"
    assert len(first["run"]) == len(alone) and {r["event"] for r in alone} == {"train", "eval"}
    for a, b in zip(first["run"], alone):
        assert a.keys() == b.keys()
        assert a.pop("event") == b.pop("event")
        assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


def test_signal_on_one_process_stops_all_and_resumes_exactly(two):
    _, (first, second) = two
    assert first["stopped"] == second["stopped"] == 15
    assert first["rest"] == first["whole"] == second["whole"]
    assert first["sum"] == second["sum"]


def test_only_the_first_process_writes(two):
    folder, _ = two
    lines = [json.loads(line) for line in (folder/"whole/log.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in lines if r["event"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not list((folder/"whole").glob(".*tmp"))
    state = json.loads((folder/"whole/checkpoint-000006/trainer/state.json").read_text())
    assert len(state["rng"]) == 2 and state["fingerprint"]["processes"] == 2


def test_a_recipe_in_two_processes_is_that_in_one(tmp_path):
    "The same rows in each step, DoRA on four bits and a new token; one folder, written once."
    options = ["train.max_steps=3", "train.batch_size=1", "data.max_samples=60", "data.eval_path=none",
               "metric=none", "prompts=", "lora.dropout=0", "lora.dora=true", "lora.tokens=<|hey|>"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
           "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = {}
    for name, launch, accumulate in (("one", [], 2), ("two", several, 1)):
        command = [sys.executable, *launch, "-m", "ftkit", "train", "nano_qlora_colors_e1", "--work-dir",
                   name, "--set", *options, f"train.accumulate={accumulate}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = map(json.loads, (tmp_path/name/"log.jsonl").read_text().splitlines())
        said[name] = [(r["loss"], r["learned"]) for r in lines if r["event"] == "train"]
        assert done.stderr.count("Talk to it") == 1
    assert len(said["one"]) == 3
    for a, b in zip(said["one"], said["two"]): assert a == pytest.approx(b, rel=1e-4)
