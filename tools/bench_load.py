"""A folder in 16 bits becomes a model in 4 bits: ftkit beside transformers + bitsandbytes.

    python tools/bench_load.py FOLDER                      a model that is there
    python tools/bench_load.py FOLDER --make llama2-7b     make one of that shape first
    python tools/bench_load.py FOLDER --tiny --device cpu  a smoke test

Each contender runs in a process of its own, turn by turn, after one reading of all files that is
not counted, so that both find them in the page cache. Seconds are those of the call alone; peak and
final GiB are torch's; host is the largest growth of anonymous memory, and of all resident memory
(mapped files included), seen every 10 ms.
"""
import argparse, json, os, subprocess, sys, threading, time
from pathlib import Path

SHAPES = {
    "llama2-7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
    "llama3-8b": dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8),
    "tiny": dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2),
}
GIB = 2**30


def make(folder, shape, device):
    "Write a checkpoint of a shape with random weights."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, dtype="bfloat16")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device): model = LlamaForCausalLM(config)
    for p in model.parameters():
        if p.ndim > 1: p.data.normal_(0, 0.02)
    model.save_pretrained(folder, max_shard_size="4GB")


class Watch(threading.Thread):
    "The largest resident memory of this process while it runs, in GiB above the start."
    def __init__(self):
        super().__init__(daemon=True)
        self.start_at, self.peak, self.on = self.now(), {"RssAnon": 0., "VmRSS": 0.}, True

    @staticmethod
    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        return {k: int(found[k].split()[0])*1024/GIB for k in ("RssAnon", "VmRSS")}

    def run(self):
        while self.on:
            now = self.now()
            for k in self.peak: self.peak[k] = max(self.peak[k], now[k] - self.start_at[k])
            time.sleep(0.01)


def load(who, folder, device):
    "One contender, once: the numbers of its call."
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM  # noqa
    import accelerate  # noqa: importing is no part of loading
    if device == "cuda": torch.zeros(1, device=device)
    if who == "ftkit":
        from ftkit import load_model
        import ftkit.quant.linear  # noqa
        call = lambda: load_model(folder, dtype="bf16", bits=4, device=device)
    else:
        import bitsandbytes  # noqa
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                 bnb_4bit_use_double_quant=True,
                                 bnb_4bit_compute_dtype=torch.bfloat16)
        call = lambda: AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=how, device_map={"": device})
    watch = Watch()
    watch.start()
    start = time.perf_counter()
    model = call()
    if device == "cuda": torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    watch.on = False
    cuda = torch.cuda if device == "cuda" else None
    with torch.no_grad():
        logits = model(torch.arange(4, 36, device=device)[None]).logits.float()
    return dict(who=who, seconds=round(seconds, 2),
                peak=round(cuda.max_memory_allocated()/GIB, 3) if cuda else 0.,
                final=round(cuda.memory_allocated()/GIB, 3) if cuda else 0.,
                host_anon=round(watch.peak["RssAnon"], 2), host_all=round(watch.peak["VmRSS"], 2),
                logits=logits.flatten()[:1000:100].tolist())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make", choices=SHAPES, help="write a model of this shape there first")
    parser.add_argument("--tiny", action="store_true", help="the same as --make tiny")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--turns", type=int, default=2, help="how often each loads (2)")
    parser.add_argument("--one", choices=["ftkit", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    if args.one: return print("RESULT", json.dumps(load(args.one, args.folder, args.device)))
    shape = "tiny" if args.tiny else args.make
    if shape: make(args.folder, shape, args.device)
    for f in sorted(args.folder.glob("*.safetensors")):
        with open(f, "rb") as file:
            while file.read(1 << 24): pass
    size = sum(f.stat().st_size for f in args.folder.glob("*.safetensors"))/GIB
    print(f"{args.folder}: {size:.2f} GiB of weights")
    print(f"{'':14}{'seconds':>9}{'peak':>8}{'final':>8}{'host':>8}{'mapped':>8}  (GiB)")
    first = {}
    for who in ["ftkit", "transformers"]*args.turns:
        command = [sys.executable, __file__, str(args.folder), "--one", who,
                   "--device", args.device]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        if not lines:
            print(f"{who:14} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        r = json.loads(lines[0][7:])
        first.setdefault(who, r["logits"])
        print(f"{who:14}{r['seconds']:9.2f}{r['peak']:8.2f}{r['final']:8.2f}"
              f"{r['host_anon']:8.2f}{r['host_all']:8.2f}", flush=True)
    if len(first) == 2:
        gap = max(abs(a - b) for a, b in zip(*first.values()))
        print(f"largest difference between their logits, of ten looked at: {gap:.2e}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
