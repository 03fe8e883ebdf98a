"""Export notebooks, run them, and keep their outputs, cleaned: one command after an edit.

    python tools/save_outputs.py nbs/00_core.ipynb …
    python tools/save_outputs.py --check core      run, write nothing, name the cells that changed
    python tools/save_outputs.py --flags cuda nf4  also the cells marked `#| cuda`, on a GPU

Cells that are left out keep the outputs they have.
"""
import argparse, os, sys
from functools import partial

from common import forked, label, notebooks, offline, preload, run_notebook


def cleaned(nb):
    "The notebook as text, without what differs from run to run."
    from execnb.nbio import nb2str
    from fastcore.xtras import loads
    from nbdev.clean import clean_nb
    nb = loads(nb2str(nb))
    clean_nb(nb)
    return nb2str(nb)


def fill(path, check=False, flags=()):
    "Run a notebook and write it back with its outputs; or, to `check`, list cells that changed."
    from execnb.nbio import dict2nb, read_nb
    from fastcore.xtras import loads
    from nbdev.config import get_config
    from nbdev.export import nb_export
    lib = get_config().lib_path
    if check:
        old = read_nb(path).cells
        new = dict2nb(loads(cleaned(run_notebook(path, flags)))).cells
        pairs = enumerate(zip(old, new), 1)
        return [i for i, (a, b) in pairs if a.get("outputs") != b.get("outputs")]
    nb_export(path, lib_path=lib)
    text = cleaned(run_notebook(path, flags, skip=False))
    os.chdir(lib.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    nb_export(path, lib_path=lib)
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", help="notebooks: paths or parts of names")
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a change")
    parser.add_argument("--flags", default="", help="test flags whose cells run too: 'cuda slow'")
    parser.add_argument("--limit", type=int, default=900, help="seconds a notebook may take (900)")
    args = parser.parse_args()
    paths, bad = notebooks(args.names), 0
    offline()
    if len(paths) > 1: preload()
    save = partial(fill, check=args.check, flags=args.flags.split())
    for r in forked(save, paths, jobs=1, limit=args.limit):
        if r.output.strip(): print(r.output.rstrip(), file=sys.stderr)
        name = label(r.item)
        if r.error: print(f"{name}, {r.error}\n{name}: NOT saved", file=sys.stderr)
        elif r.value: print(f"{name}: outputs differ from the saved ones in cells {r.value}")
        else: print("same" if args.check else "saved", name, f"({r.seconds:.1f} s)")
        bad += bool(r.error or r.value)
    return int(bool(bad))


if __name__ == "__main__": sys.exit(main())
