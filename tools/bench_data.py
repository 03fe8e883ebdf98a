"""Encoding and packing beside TRL's and XTuner's ways: same file, tokenizer, text, machine and run.

    python tools/bench_data.py alpaca_en_demo.json --vocabulary qwen.tiktoken \\
        --peer-python ../peers/bin/python

Each measurement runs in a process of its own, and the ways take turns. Every way starts with the
parsed rows of an alpaca file in memory and ends with packed rows of ids and labels. TRL is the
installed package: its trainer's own preparation, in a process of --peer-python (left out, with a
word, if there is none). It is given conversations, since it has no map for alpaca files; those of
the others are counted. XTuner cannot be installed beside current packages; its way is written down
here from its source: maps one row at a time, pieces encoded turn by turn, samples strung together
and cut, the rest of each group of a map dropped. The caches of datasets are off.

one core   the process is bound to one core and no other helps it; its CPU seconds are counted
all cores  ftkit's tokenizer uses threads, or --workers processes; the peers get a process for each
           core; seconds by the clock are counted
"""
import argparse, base64, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = "You are a helpful assistant."
SPECIAL = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
          + SYSTEM + "<|im_end|>\n{% endif %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
          "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
          "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}")


# --- the tokenizer -------------------------------------------------------------------------------

def byte_letters():
    "How byte-level tokenizers spell each byte."
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(other)}


def from_tiktoken(path):
    "A tokenizer of ranked byte strings, such as Qwen's, in the form of the tokenizers package."
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers)
    lines = (line.split() for line in Path(path).read_bytes().splitlines() if line)
    ranks, letter = {base64.b64decode(t): int(r) for t, r in lines}, byte_letters()
    def spell(token): return "".join(letter[b] for b in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda kv: kv[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:   # merge as the tokenizer would, up to the step that makes the token
            pairs = enumerate(zip(parts, parts[1:]))
            best, i = min((ranks.get(a + b, 1 << 60), i) for i, (a, b) in pairs)
            if best >= rank: break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2: merges.append(tuple(map(spell, parts)))
    tok = Tokenizer(models.BPE({spell(t): r for t, r in ranks.items()}, merges))
    words = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(words), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tok


def save_tokenizer(vocabulary, folder):
    "The tokenizer that all ways load: of a tiktoken file, or the built-in nano's."
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    if vocabulary == "nano":
        sys.path.insert(0, str(ROOT))
        from ftkit.nano.base import nano_path
        tok = AutoTokenizer.from_pretrained(nano_path())
    else:
        tok = PreTrainedTokenizerFast(tokenizer_object=from_tiktoken(vocabulary),
                                      eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    tok.chat_template = CHATML
    tok.save_pretrained(folder)


# --- three ways ----------------------------------------------------------------------------------

def user_of(row): return row["instruction"] + ("\n" + row["input"] if row.get("input") else "")


def with_ftkit(rows, tokenizer, args):
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from ftkit.data.encode import EncodeReport, encode_batches
    from ftkit.data.families import template
    from ftkit.data.formats import to_messages
    from ftkit.data.packing import make_row, pack_arrays
    t = template("qwen_chat", tokenizer)
    def run(rows):
        start, report = args.clock(), EncodeReport()
        samples = to_messages(rows, "alpaca")
        pairs = ((s, None) for s in samples)
        batches = encode_batches(pairs, t, tokenizer, args.length, "drop", workers=args.workers,
                                 report=report)
        encoded = [e for b in batches for e in b]
        middle = args.clock()
        numbers, starts = pack_arrays([len(e) for e in encoded], args.length, seed=0)
        packed = [make_row([encoded[i] for i in numbers[a:b]]) for a, b in zip(starts, starts[1:])]
        end = args.clock()
        tokens = report.tokens + report.cut_tokens
        return dict(encode=middle - start, pack=end - middle, tokens=tokens, rows=len(packed),
                    lost=tokens - sum(map(len, packed)), torn=0)
    return run


def with_trl(rows, tokenizer, args):
    from types import SimpleNamespace
    import datasets
    from trl import SFTConfig, SFTTrainer
    import transformers
    transformers.logging.set_verbosity_error()
    def conversations(rows): # given to TRL for nothing: it has no map for alpaca files
        return datasets.Dataset.from_list([{"messages": [
            dict(role="user", content=user_of(r)), dict(role="assistant", content=r["output"])]}
            for r in rows])
    def prepare(data, **options):
        config = SFTConfig(output_dir=tempfile.gettempdir(), report_to=[], bf16=False, use_cpu=True,
                           assistant_only_loss=args.way != "trl-all",
                           dataset_num_proc=args.processes or None, **options)
        me = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
        packing = options.get("packing", False)
        return SFTTrainer._prepare_dataset(me, data, tokenizer, config, packing, None, "train")
    strategy = "wrapped" if args.way == "trl-wrapped" else "bfd"
    def run(rows):
        data = conversations(rows)
        start = args.clock()
        encoded = prepare(data, max_length=None)
        middle = args.clock()
        config = dict(packing=True, packing_strategy=strategy, max_length=args.length)
        packed = prepare(encoded, **config)
        end = args.clock()
        lengths = [len(x) for x in encoded["input_ids"]]
        torn = cuts(lengths, args.length) if strategy == "wrapped" else 0
        out = sum(len(x) for x in packed["input_ids"])
        return dict(encode=middle - start, pack=end - middle, tokens=sum(lengths),
                    rows=len(packed), lost=sum(lengths) - out, torn=torn)
    return run


def cuts(lengths, room, group=1000):
    "How many samples a packing tears that strings the samples of each group together and cuts."
    torn = 0
    for i in range(0, len(lengths), group):
        ends, pos = set(), 0
        for n in lengths[i:i + group]: ends.add(pos := pos + n)
        torn += sum(k not in ends for k in range(room, pos, room))
    return torn


def with_xtuner(rows, tokenizer, args):
    import datasets
    from itertools import chain
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    def alpaca(row):
        if row["output"] == "<nooutput>": return {"conversation": []}
        return {"conversation": [{"input": user_of(row), "output": row["output"]}]}
    def fill_template(row):
        for i, turn in enumerate(row["conversation"]):
            text = f"<|im_start|>user\n{turn['input']}<|im_end|>\n<|im_start|>assistant\n"
            if not i: text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n" + text
            turn.update(input=text, need_eos_token=True, sep="\n")
        return {"conversation": row["conversation"]}
    def encode(row): # each piece by itself; what is too long is cut at the right
        ids, labels = [], []
        for turn in row["conversation"]:
            prompt = tokenizer.encode(turn["input"], add_special_tokens=False)
            reply = tokenizer.encode(turn["output"], add_special_tokens=False)
            ids += prompt + reply + [end_id]
            labels += [-100]*len(prompt) + reply + [end_id]
            sep = tokenizer.encode(turn["sep"], add_special_tokens=False)
            ids += sep
            labels += [-100]*len(sep)
        return {"input_ids": ids[:args.length], "labels": labels[:args.length]}
    def pack(batch):
        out, n = {}, args.length
        for k in ("input_ids", "labels"):
            joined = list(chain(*batch[k]))
            out[k] = [joined[i:i + n] for i in range(0, len(joined)//n*n, n)]
        total = len(list(chain(*batch["input_ids"])))
        bounds, pos = [0], 0
        for x in batch["input_ids"]: bounds.append(pos := pos + len(x))
        out["cumulative_len"] = [[0, *(b - i for b in bounds if i < b < i + n), n]
                                 for i in range(0, total//n*n, n)]
        return out
    def run(rows):
        data, map_args = datasets.Dataset.from_list(rows), dict(num_proc=args.processes or None)
        start = args.clock()
        data = data.map(alpaca, remove_columns=data.column_names, **map_args)
        data = data.map(fill_template, **map_args)
        data = data.filter(lambda row: len(row["conversation"]) > 0, **map_args)
        data = data.map(encode, remove_columns=["conversation"], **map_args)
        data = data.filter(lambda row: any(l >= 0 for l in row["labels"]), **map_args)
        middle = args.clock()
        shuffled = data.shuffle(seed=0).flatten_indices(**map_args)
        packed = shuffled.map(pack, batched=True, remove_columns=data.column_names, **map_args)
        packed = packed.map(lambda row: {"length": len(row["input_ids"])}, **map_args)
        end = args.clock()
        lengths = [len(x) for x in shuffled["input_ids"]]
        out = sum(len(x) for x in packed["input_ids"])
        return dict(encode=middle - start, pack=end - middle, tokens=sum(lengths),
                    rows=len(packed), lost=sum(lengths) - out, torn=cuts(lengths, args.length))
    return run


WAYS = {"ftkit": with_ftkit, "trl": with_trl, "trl-all": with_trl, "trl-wrapped": with_trl,
        "xtuner": with_xtuner}


# --- measuring -----------------------------------------------------------------------------------

def copies(rows, times):
    "Rows of several copies, no two of them alike, so that nothing can be looked up."
    def other(row, k): return row if not k else {**row, **{
        name: f"{row[name]} ({k})" for name in ("instruction", "output")}}
    return [other(row, k) for k in range(times) for row in rows]


def measure(args):
    "One way, in this process: figures as JSON."
    args.clock = time.process_time if args.one_core else time.perf_counter
    if args.one_core: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.way != "ftkit":
        import datasets
        datasets.disable_caching()
        datasets.disable_progress_bars()
    rows = json.loads(Path(args.file).read_text(encoding="utf-8"))
    run = WAYS[args.way](rows, tokenizer, args)
    run(rows[:64])      # imports, regular expressions, first maps
    print(json.dumps(run(copies(rows, args.times))))


def child(args, way, folder, python, length, one_core):
    "The figures of one way, from a fresh process."
    command = [python, __file__, args.file, "--way", way, "--tokenizer", folder,
               "--length", str(length), "--times", str(args.times)]
    if one_core: command.append("--one-core")
    elif way == "ftkit": command += ["--workers", str(args.workers)]
    else: command += ["--processes", str(len(os.sched_getaffinity(0)))]
    quiet = dict(TOKENIZERS_PARALLELISM="false" if one_core or way != "ftkit" else "true",
                 HF_DATASETS_CACHE=str(Path(folder)/"datasets"), HF_HUB_OFFLINE="1",
                 TMPDIR=folder, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode: sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(args, folder, length, one_core, ways):
    found = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            python = sys.executable if way == "ftkit" else args.peer_python
            found[way].append(child(args, way, folder, python, length, one_core))
    n = len(json.loads(Path(args.file).read_text(encoding="utf-8")))*args.times
    cores = "one core" if one_core else f"all {len(os.sched_getaffinity(0))} cores"
    print(f"\n{n:,} rows, {Path(args.file).name} × {args.times}, rows of {length:,}, {cores}, "
          f"{args.repeats} runs each: median (best)")
    print(f"{'way':12} {'encode rows/s':>18} {'to packed rows/s':>18} {'tokens':>10} {'rows':>6} "
          f"{'fewest':>6} {'fill':>7} {'best':>7} {'lost':>7} {'torn':>6}")
    for way, runs in found.items():
        def rate(*keys):
            rates = [n/sum(r[k] for k in keys) for r in runs]
            return f"{statistics.median(rates):,.0f} ({max(rates):,.0f})"
        r = runs[0]
        kept, fewest = r["tokens"] - r["lost"], -(-r["tokens"]//length)
        print(f"{way:12} {rate('encode'):>18} {rate('encode', 'pack'):>18} {r['tokens']:>10,} "
              f"{r['rows']:>6,} {fewest:>6,} {kept/(r['rows']*length):>7.2%} "
              f"{r['tokens']/(fewest*length):>7.2%} {r['lost']:>7,} {r['torn']:>6,}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="alpaca rows, a JSON list")
    parser.add_argument("--vocabulary", default="nano", help="a tiktoken file, or nano (default)")
    parser.add_argument("--peer-python", help="interpreter with trl and datasets")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--times", type=int, default=10, help="repeat the file so often (10)")
    parser.add_argument("--repeats", type=int, default=5, help="processes for each way (5)")
    parser.add_argument("--workers", type=int, default=0,
                        help="ftkit's processes where all cores are used (0)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--cores", nargs="+", default=["one", "all"], choices=["one", "all"])
    for name in ("--way", "--tokenizer"): parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--length", "--processes"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-core", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way: return measure(args)
    ways = args.ways
    if not args.peer_python:
        print("No --peer-python: TRL's and XTuner's ways are left out.")
        ways = [w for w in ways if w == "ftkit"]
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(args.vocabulary, folder)
        for one_core in (c == "one" for c in args.cores):
            for length in args.lengths: table(args, folder, length, one_core, ways)


if __name__ == "__main__": main()
