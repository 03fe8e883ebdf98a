"""ftkit beside other programs: the same weights, tokens and settings, turn by turn.

    python tools/bench_speed.py --home DIR --rows lora,qlora_gc --peers hf,unsloth,ftkit
    python tools/bench_speed.py --home DIR --parity --rows lora       20 steps, every loss and norm
    python tools/bench_speed.py --home DIR --report --log all.jsonl   the table, nothing is run
    python tools/bench_speed.py --home DIR --tiny                     a smoke test on a CPU

Each result is that of a process of its own; the next ones import meanwhile what they need, and wait
for their turn. Checkpoints of random weights are made in the home folder first. Other programs may
lie in a folder of their own (--site), which ftkit does not see. A ratio counts only between results
of one run on one card, and against the best that any other program reached; parity is held against
hf on the same weights: the loss within 0.5 %
and the gradient norm within 2 % at each of 20 steps (8 bits: the loss at the end of 200 steps of
one row).
"""
import argparse, json, math, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
HERE = Path(__file__).resolve().parent
LLAMA3, LLAMA2, QWEN = "llama3-8b", "llama2-7b", "qwen2.5-7b"
PEERS = "hf", "liger", "unsloth", "ftkit"


def row(mode, gc, shape=LLAMA3, peers=("unsloth", "ftkit"), ours=None, like=None, **more):
    """What a row is: settings for all; others for ftkit in `ours`. With `like` the other programs'
    results are those of another row."""
    how = dict(mode=mode, gc=gc, **more)
    return dict(shape=shape, peers=peers, ours=ours or {}, like=like, how=how)


OURS, ONE = ("ftkit",), dict(batch=1, opt="paged8")
ROWS = {
    "lora": row("lora", "0", peers=PEERS, ours=dict(cap=46.5)),
    "lora_gc": row("lora", "1", peers=PEERS),
    "qlora": row("qlora", "0", ours=dict(gc="auto", cap=36.25)),
    "qlora_gc": row("qlora", "1", peers=PEERS),
    "planner": row("qlora", "1", peers=OURS, like="qlora_gc", ours=dict(gc="auto")),
    "fp8": row("lora", "0", peers=OURS, like="lora", ours=dict(mode="fp8")),
    "long": row("qlora", "1", batch=2, seq=8192),
    "lora_r64": row("lora", "0", r=64, ours=dict(cap=47.9)),
    "full": row("full", "1", peers=("liger", "ftkit"), ours=dict(gc="auto", opt="adamw16")),
    "full_48": row("full", "1", peers=OURS, like="full",
                   ours=dict(gc="auto", cap=48, opt="adamw8", early=True)),
    "paged_7b": row("qlora", "1", LLAMA2, PEERS, **ONE),
    "paged_8b": row("qlora", "1", **ONE),
    "low_7b": row("qlora", "1", LLAMA2, OURS, dict(gc="auto", cap=4.65), "paged_7b", **ONE),
    "low_8b": row("qlora", "1", LLAMA3, OURS, dict(gc="auto", cap=5.65), "paged_8b", **ONE),
    "cap_8gb": row("qlora", "1", peers=OURS, ours=dict(gc="auto", cap=7.45), batch=1, seq=20480,
                   opt="paged8"),
    "packed": row("qlora", "1", peers=("hf", "unsloth", "ftkit"), batch=1, seq=8192, packed=600,
                  mask=0.5),
    "qwen7b": row("lora", "0", QWEN, PEERS, dict(cap=46.5)),
    "qwen7b_gc": row("qlora", "1", QWEN),
    "small": row("lora", "0", "qwen2.5-0.5b", PEERS, dict(cap=3.65), batch=1),
    "big": row("qlora", "1", "llama3-70b-nf4", batch=1)}
TINY = {"lora": row("lora", "0", "tiny", ("hf", "ftkit"), batch=2, seq=32),
        "packed": row("lora", "0", "tiny", ("hf", "ftkit"), batch=2, seq=64, packed=16)}


def command(name, peer, args):
    "The line that runs a peer in a row."
    r = args.table[name]
    how = {**r["how"], **(dict(r["ours"], profile=args.profile) if peer == "ftkit" else {})}
    if args.parity: how |= dict(parity=args.parity)
    if args.parity and _eight(r): how |= dict(parity=max(200, args.parity), batch=1)
    words = [sys.executable, str(HERE/"peers.py"), "--peer", peer]
    words += ["--ckpt", str(args.home/r["shape"])]
    turn = args.home/f"turn-{os.environ.get('CUDA_VISIBLE_DEVICES', args.device)}"
    how |= dict(steps=args.steps, device=args.device, turn=turn)
    for k, v in how.items():
        if v is not False: words += [f"--{k}", *([] if v is True else [str(v)])]
    return words


def environment(peer, site):
    "Other programs see their own folder first."
    if not site or peer == "ftkit": return dict(os.environ)
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    return dict(os.environ, PYTHONPATH=path)


def _eight(r): return r["ours"].get("mode") == "fp8"


def run_one(name, peer, args):
    "The result of a peer in a row, or why there is none."
    begin = time.time()
    try:
        done = subprocess.run(command(name, peer, args), capture_output=True, text=True,
                              timeout=args.timeout, env=environment(peer, args.site))
        if args.profile: sys.stderr.write(done.stderr)
        lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
        found = json.loads(lines[-1][7:]) if lines else dict(error=reason(done))
        found["ckpt"] = args.table[name]["shape"] # not where it lies
    except subprocess.TimeoutExpired: found = dict(error=f"more than {args.timeout} s")
    return dict(found, row=name, peer=peer, parity=args.parity, card=args.card, run=round(args.run),
                at=round(begin), took=round(time.time() - begin, 1))


def reason(done):
    "The last line that says what went wrong."
    lines = [x.strip() for x in (done.stderr or done.stdout).splitlines() if x.strip()]
    named = [x for x in lines if "Error" in x or "out of memory" in x]
    return f"exit code {done.returncode}: {(named or lines or ['nothing was printed'])[-1][:300]}"


def turns(args):
    """(row, peer), round by round, beginning with another peer in each; parity is held against hf.
    What others do in a row like this one counts, and is done if nobody asked for it."""
    for i in range(args.rounds):
        done = set()
        for name in args.rows:
            r, other = args.table[name], source(args.table, name, args.parity)
            if args.parity: rivals = [(name if _eight(r) else other, "hf")]
            else: rivals = [(other, p) for p in args.table[other]["peers"] if p != "ftkit"]
            some = [t for t in (*rivals, (name, "ftkit")) if t[1] in args.peers and t not in done]
            done |= {*some}
            first = i % max(1, len(some))
            yield from some[first:] + some[:first]


# ------------------------------------------------------------ what came out

def source(table, name, parity=False):
    "The row in which other programs did the same; what is recomputed is of no matter to parity."
    r = table[name]
    if not parity: return r["like"] or name
    same = lambda x: (x["shape"], {**x["how"], "gc": 0})
    return next((n for n, x in table.items() if same(x) == same(r)), name)


def timed(results, name):
    "What was timed in a row."
    return [x for x in results if x["row"] == name and "tok_s" in x and not x.get("parity")]


def latest(results, table, name):
    "The last run that has a row with somebody beside ftkit; else the last that has it at all."
    ours = {x.get("run", 0) for x in timed(results, name) if x["peer"] == "ftkit"}
    theirs = {x.get("run", 0) for x in timed(results, source(table, name)) if x["peer"] != "ftkit"}
    return max(ours & theirs or ours or theirs, default=None)


def best(results, name, peer, run):
    "The result of a peer in a row of a run; of several the median."
    found = [x for x in timed(results, name) if x["peer"] == peer and x.get("run", 0) == run]
    return dict(found[-1], tok_s=median(x["tok_s"] for x in found)) if found else None


def apart(ours, theirs):
    "The largest relative difference of two lists of numbers."
    if len(ours) != len(theirs) or not ours: return math.inf
    return max(abs(a - b)/abs(b) for a, b in zip(ours, theirs))


def parity(results, name, table=ROWS):
    "How far losses and gradient norms are from those of hf; None where that was not run."
    runs = [x for x in results if x.get("parity") and "losses" in x]
    runs = {(x["row"], x["peer"]): x for x in runs}
    ours = runs.get((name, "ftkit"))
    theirs = runs.get((name, "hf")) or runs.get((source(table, name, True), "hf"))
    if not ours or not theirs: return None
    if ours.get("mode") == "fp8":
        loss = apart([sum(ours["losses"][-20:])], [sum(theirs["losses"][-20:])])
        return dict(loss=loss, norm=None, good=loss <= 0.005)
    loss, norm = apart(ours["losses"], theirs["losses"]), apart(ours["norms"], theirs["norms"])
    return dict(loss=loss, norm=norm, good=loss <= 0.005 and norm <= 0.02)


def summary(results, table):
    "One entry a row: tokens/s and GiB of each, ftkit's ratio to the best other, parity."
    out, keys = {}, ("tok_s", "peak_gib", "reserved_gib", "card")
    for name in table:
        run = latest(results, table, name)
        found = {p: best(results, name if p == "ftkit" else source(table, name), p, run)
                 for p in PEERS}
        found = {p: {k: x[k] for k in keys if k in x} for p, x in found.items() if x}
        failed = {x["peer"]: x["error"] for x in results if x["row"] == name and "error" in x}
        rivals = [x for p, x in found.items() if p != "ftkit"]
        held = parity(results, name, table)
        if not found and not failed and not held: continue
        failed = {p: e for p, e in failed.items() if p not in found}
        out[name] = dict(results=found, failed=failed, parity=held)
        if "ftkit" in found and rivals:
            out[name] |= ratios(found["ftkit"], rivals)
    return out


def ratios(ours, rivals):
    "Against the fastest of the others, and against the one that takes least memory."
    fast, small = max(x["tok_s"] for x in rivals), min(x["peak_gib"] for x in rivals)
    memory = round(ours["peak_gib"]/small, 3) if small else None
    return dict(ratio=round(ours["tok_s"]/fast, 3), memory_ratio=memory)


def flops(r):
    "What a token of a row asks for, with nothing computed twice."
    import torch
    import ftkit as ft
    from ftkit.flops import step_flops
    from peers import samples
    from make_checkpoint import config_of
    from transformers import AutoModelForCausalLM
    how, config = r["how"], config_of(r["shape"].removesuffix("-nf4"))
    a = SimpleNamespace(**dict(batch=4, seq=2048, packed=0, mask=0., warmup=0, steps=8, parity=None,
                               profile=0, r=16) | how)
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(config)
    if how["mode"] != "full": ft.add_lora(model, ft.LoraConfig(r=a.r))
    total = tokens = 0
    for step in samples(a, config.vocab_size):
        lengths = [len(ids) for ids, _ in step]
        learned = sum(len(ids) - max(masked, 1) for ids, masked in step)
        total += step_flops(model, lengths, learned).total
        tokens += sum(lengths)
    return total/tokens


def gate(x):
    "What `parity` says, in words."
    if x is None: return "–"
    norm = f", norm {x['norm']:.2%}" if x["norm"] is not None else ""
    return f"{'good' if x['good'] else 'NOT GOOD'} (loss {x['loss']:.2%}{norm})"


def show(found):
    "The summary as a table."
    cell = lambda x: f"{x['tok_s']:>9,.0f} {x['peak_gib']:6.2f}" if x else f"{'–':>16}"
    print(f"{'tokens/s, GiB':12}" + "".join(f"{p:>17}" for p in PEERS) + "   ratio  memory  parity")
    number = lambda x: f"{x:8.2f}" if x else f"{'–':>8}"
    for name, x in found.items():
        cells = "".join(f" {cell(x['results'].get(p))}" for p in PEERS)
        parts = "".join(number(x.get(k)) for k in ("ratio", "memory_ratio"))
        print(f"{name:12}{cells}{parts}  {gate(x['parity'])}")
        for peer, error in x["failed"].items(): print(f"{'':12} {peer}: {error}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--home", type=Path, required=True, help="folder of checkpoints, some GB each")
    add("--rows", help=f"of {','.join(ROWS)}; by default those of {LLAMA3} and {LLAMA2}")
    add("--peers", default=",".join(PEERS))
    add("--budget", type=float, default=math.inf, help="seconds after which nothing more is begun")
    add("--timeout", type=float, default=600, help="seconds for one process, with its waiting")
    add("--ahead", type=int, default=1, help="processes that get ready while another one measures")
    add("--rounds", type=int, default=1)
    add("--steps", type=int, default=9)
    add("--profile", type=int, default=0, help="steps of ftkit's after the timed ones, to say on "
                                              "stderr where their time goes")
    add("--parity", type=int, nargs="?", const=20, help="compare losses and gradients, not times")
    add("--log", type=Path, help="append every result here; of a row the last run counts that has "
                                 "it beside others")
    add("--results", type=Path, help="write the summary here, e.g. nbs/results/speed.json")
    add("--site", help="folder with the other programs")
    add("--report", action="store_true", help="run nothing")
    add("--tiny", action="store_true", help="tiny models on the CPU")
    args = parser.parse_args()
    args.table = TINY if args.tiny else ROWS
    usual = [n for n, r in args.table.items() if args.tiny or r["shape"] in (LLAMA3, LLAMA2)]
    args.rows, args.peers = args.rows.split(",") if args.rows else usual, args.peers.split(",")
    odd = [n for n in args.rows if n not in args.table] + [p for p in args.peers if p not in PEERS]
    if odd: parser.error(f"unknown: {', '.join(odd)}")
    lines = args.log.read_text().splitlines() if args.log and args.log.exists() else []
    results = list(map(json.loads, lines))
    args.device, args.card = "cpu", "cpu"
    if not args.report: measure(args, results)
    found = summary(results, args.table)
    show(found)
    if args.results:
        for name, x in found.items(): x["flops"] = flops(args.table[name])
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")


def measure(args, results):
    "Run what is asked for, and add it to the results."
    if not args.tiny:
        import torch
        if not torch.cuda.is_available(): sys.exit("no GPU here: try --tiny")
        args.device, args.card = "cuda", torch.cuda.get_device_properties(0).name
    args.home = args.home.absolute()
    from make_checkpoint import make
    for shape in dict.fromkeys(args.table[n]["shape"] for n,_ in turns(args)):
        make(args.home/shape, shape, device=args.device)
    begin = args.run = time.time()
    def run(turn): return None if time.time() - begin > args.budget else run_one(*turn, args)
    with ThreadPoolExecutor(1 + args.ahead) as pool:
        for x in filter(None, pool.map(run, turns(args))): note(x, args, results)


def note(x, args, results):
    "Keep a result, and say it."
    results.append(x)
    said = x.get("error") or "{tok_s:,.0f} tokens/s, {peak_gib:.2f} GiB".format(**x)
    print("{row} {peer}: ".format(**x) + said, file=sys.stderr, flush=True)
    if args.log:
        with open(args.log, "a") as f: f.write(json.dumps(x) + "\n")


if __name__ == "__main__": main()
