"""Small training runs that the tests start, stop and kill; also a program, for torchrun.

    torchrun --nproc-per-node 2 tests/small_runs.py FOLDER
"""
import json, os, sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ftkit.data.packing import Row, collate
from ftkit.sft import SupervisedTuning
from ftkit.training.loop import Callback, Interrupted, Trainer, TrainConfig
from ftkit.training.optim import OptimConfig
from safetensors.torch import save_file

VOCABULARY = 24


def tiny_model(dropout=0.0, seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, attention_dropout=dropout,
        pad_token_id=0, **more))


def tiny_rows(n=22):
    "Rows that count upwards, with very uneven numbers of learned tokens: 1 to 19."
    rows = []
    for i in range(n):
        length = 3 + (i*7) % 18
        ids = [1 + (i + k) % (VOCABULARY - 1) for k in range(length)]
        masked = 1 if i % 3 else length - 1  # every third row has one learned token
        rows.append(Row(ids, [-100]*masked + ids[masked:], list(range(length)), [0, length]))
    return rows


def batch(rows): return collate(rows, 0)


def tiny_trainer(work_dir=None, rows=None, model=None, callbacks=(), eval_rows=None, lr=1e-2,
                 dropout=0.0, save="model", lengths=None, **cfg):
    model = model or tiny_model(dropout)
    if save == "model": save = lambda folder: save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder/"model.safetensors")
    cfg = TrainConfig(**{"batch_size": 2, "epochs": 2, "precision": "fp32", **cfg})
    rows = tiny_rows() if rows is None else rows
    return Trainer(model, SupervisedTuning(), rows, cfg, OptimConfig(lr=lr, weight_decay=0.1),
                   batch, eval_rows, callbacks, work_dir, save, lengths)


def untimed(history):
    "What is the same for every run: no speeds, no saves."
    return [{k: v for k, v in r.items() if k != "tokens_per_second"}
            for r in history if r["event"] != "save"]


class Announce(Callback):
    "Say each finished step into a file, for whoever is waiting to send a signal."
    def __init__(self, file): self.file = Path(file)
    def after_step(self, trainer):
        with open(self.file, "a") as f: f.write(f"{trainer.step}\n")


def train_in_child(work_dir, announce, cfg):
    "Run in a process of its own; exits as the command line does."
    torch.set_num_threads(1)
    try: tiny_trainer(work_dir, callbacks=[Announce(announce)], **cfg).fit(resume="auto")
    except Interrupted as e:
        Path(work_dir, "message.txt").write_text(str(e))
        os._exit(128 + e.signum)
    os._exit(0)


class StopAt(Callback):
    "Ask for a stop on one process only; all must follow."
    def __init__(self, step, rank): self.at, self.rank = step, rank
    def after_step(self, trainer):
        if trainer.step == self.at and trainer.rank == self.rank:
            import signal
            signal.raise_signal(signal.SIGTERM)


def on_all_ranks(folder):
    "What the test of several processes compares."
    torch.set_num_threads(1)
    folder, rank = Path(folder), int(os.environ["RANK"])
    common = dict(batch_size=2, accumulate=2, epochs=2, eval_rows=tiny_rows(7), eval_every=2)
    run = tiny_trainer(folder/"whole", **common).fit()
    rough = dict(common, dropout=0.2)
    whole = tiny_trainer(None, **rough).fit()
    try: tiny_trainer(folder/"stopped", callbacks=[StopAt(3, rank=1)], **rough).fit()
    except Interrupted as e: stopped = e.signum
    rest = tiny_trainer(folder/"stopped", **rough).fit(resume="auto")
    weights = torch.cat([p.detach().flatten() for p in rest.model.parameters()])
    out = dict(run=untimed(run.history), whole=untimed(whole.history), stopped=stopped,
               rest=untimed(rest.history), sum=weights.double().sum().item())
    (folder/f"rank{rank}.json").write_text(json.dumps(out))


if __name__ == "__main__": on_all_ranks(sys.argv[1])
