"""How much memory does training on a file need, and how does that grow with the file?

    python tools/bench_stream.py                             50, 100, 200 and 400 MB
    python tools/bench_stream.py --sizes 100 800 --row 2000  other sizes, longer rows
    python tools/bench_stream.py --option eval_fraction=0.01 --option packing=false

For each size a process of its own writes a synthetic JSONL file, loads it through `load_data`,
takes a few steps with a tiny model and loads it again. Memory is what cannot be given back without
a swap file (RssAnon), sampled all along: mapped files are left out, since the system may drop them.
"""
import argparse, json, os, random, shutil, subprocess, sys, tempfile, threading, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Peak(threading.Thread):
    "The largest anonymous memory of this process, for each phase, in MB."
    def __init__(self):
        super().__init__(daemon=True)
        self.phase, self.peaks = "import", {}
        self.start()

    def run(self):
        while True:
            now = self.read("RssAnon:")
            self.peaks[self.phase] = max(now, self.peaks.get(self.phase, 0))
            time.sleep(0.02)

    @staticmethod
    def read(name):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(name))/1024


def write(path, megabytes, row, seed=0):
    "A file of questions and answers about Python; `row` characters each, half to twice as many."
    from pydoc_data.topics import topics
    rng = random.Random(seed)
    words = " ".join(topics.values()).split()
    pieces = [" ".join(words[i:i + 12]) for i in range(0, len(words) - 12, 5)]
    each = sum(map(len, pieces))/len(pieces)
    with open(path, "w", encoding="utf-8") as f:
        while f.tell() < megabytes*1e6:
            k = max(2, round(row*rng.uniform(.5, 1.5)/each))
            q, *a = rng.choices(pieces, k=k)
            f.write(json.dumps(dict(instruction=q, input="", output=". ".join(a))) + "\n")


def measure(args):
    "One size, in this process; prints its numbers as JSON."
    peak = Peak()
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    import ftkit
    from functools import partial
    from ftkit.nano.base import nano_path
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(nano_path())
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=args.max_length))
    config = dict(path=args.file, cache=args.cache, max_length=args.max_length,
                  workers=args.workers, **dict(map(parsed, args.option)))
    cfg = ftkit.DataConfig(**config)
    seconds = {}
    def timed(phase, function):
        peak.phase, start = phase, time.perf_counter()
        out = function()
        seconds[phase] = time.perf_counter() - start
        time.sleep(0.05)
        return out
    data = timed("load", lambda: ftkit.load_data(cfg, tokenizer, progress=False))
    counts = data.statistics
    train = ftkit.TrainConfig(max_steps=args.steps, batch_size=1, precision="fp32")
    collate = partial(ftkit.collate, pad_id=tokenizer.pad_token_id or 0, mask=None)
    def fit():
        trainer = ftkit.Trainer(model, ftkit.SupervisedTuning(), data.rows, train, collate=collate,
                                work_dir=Path(args.cache).parent/"run", save=lambda folder: None,
                                eval_rows=data.eval and data.eval.rows[:8])
        trainer.fingerprint()
        return trainer.fit()
    timed("train", fit)
    del data
    again = timed("again", lambda: ftkit.load_data(cfg, tokenizer, progress=False))
    print(json.dumps(dict(
        counts, cached=again.cached, seconds=seconds, peaks=peak.peaks, hwm=peak.read("VmHWM:"),
        disk=sum(f.stat().st_size for f in Path(args.cache).rglob("*") if f.is_file())/1e6)))


def parsed(option):
    name, value = option.split("=", 1)
    try: return name, json.loads(value)
    except json.JSONDecodeError: return name, value


def one(size, args):
    "The numbers of one size, from a process of its own."
    home = Path(tempfile.mkdtemp(prefix="ftkit-bench-", dir=args.folder))
    try:
        write(home/"data.jsonl", size, args.row)
        command = [sys.executable, __file__, "--file", str(home/"data.jsonl"), "--cache",
                   str(home/"cache"), "--steps", str(args.steps), "--workers", str(args.workers),
                   "--max-length", str(args.max_length)]
        for o in args.option: command += ["--option", o]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode: sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        return dict(found, size=(home/"data.jsonl").stat().st_size/1e6)
    finally: shutil.rmtree(home)


def slope(xs, ys):
    "Of the line through points with the least squared error."
    mx, my = sum(xs)/len(xs), sum(ys)/len(ys)
    return sum((x - mx)*(y - my) for x, y in zip(xs, ys))/sum((x - mx)**2 for x in xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[50, 100, 200, 400], help="MB")
    parser.add_argument("--row", type=int, default=1000, help="characters in a row, about (1000)")
    parser.add_argument("--steps", type=int, default=5, help="training steps (5)")
    parser.add_argument("--workers", type=int, default=0, help="processes that encode (0)")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens in a row (2048)")
    parser.add_argument("--option", action="append", default=[], help="of DataConfig: name=value")
    parser.add_argument("--folder", help="where files are written (the system's temporary folder)")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.file: return measure(args)
    print("    MB     rows    Mtok |  load s   MB/s  rows/s | again s |  anonymous MB: load  train"
          "  again |    HWM  disk MB", flush=True)
    found = []
    for size in args.sizes:
        r = one(size, args)
        s, p = r["seconds"], r["peaks"]
        print(f"{r['size']:6.0f} {r['samples']:8,} {r['tokens']/1e6:7.1f} | {s['load']:7.1f} "
              f"{r['size']/s['load']:6.1f} {r['samples']/s['load']:7.0f} | {s['again']:7.2f} | "
              f"{p['load']:18.0f} {p['train']:6.0f} {p['again']:6.0f} | {r['hwm']:6.0f} "
              f"{r['disk']:8.0f}", flush=True)
        if not r["cached"]: print("the second start encoded again")
        found.append(r)
    if len(found) < 2: return
    print("\nanonymous memory as the file grows:")
    for phase in "load", "train", "again":
        k = slope([r["size"]/1000 for r in found], [r["peaks"][phase] for r in found])
        last = found[-1]
        each = k*1e6/(last["samples"]/last["size"]*1000)
        at = last["peaks"][phase] + max(k, 0)*(20 - last["size"]/1000)
        print(f"{phase:6} {k:7.1f} MB for each GB ({each:.0f} bytes a sample); "
              f"with 20 GB: {at:,.0f} MB")


if __name__ == "__main__": main()
