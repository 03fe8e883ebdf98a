"Export, run, clean and export again: one command after an edit, `python tools/save_outputs.py nbs/00_core.ipynb …`."
import os, sys
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fastcore.all import working_directory
from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import process_write, clean_nb
from nbdev.config import get_config
from nbdev.export import nb_export
from nbdev.process import NBProcessor


def fill(fn):
    "Run the cells of `fn` that nbdev_test would run and keep their outputs in the file."
    skip = set(get_config().tst_flags.split())
    nb = read_nb(fn)
    found = {c.id: (getattr(c, "directives_", None) or {}) for c in NBProcessor(fn, process=True).nb.cells}

    def leave_out(cell):
        d = found.get(cell.id, {})
        return (cell.cell_type != "code" or (d.get("eval:") or [""])[0].lower() == "false"
                or bool(skip & d.keys()) or "nbdev_export(" in cell.source)

    shell = CaptureShell(fn)
    with working_directory(fn.parent): shell.run_all(nb, exc_stop=True, preproc=leave_out)
    write_nb(nb, fn)


def main(names):
    lib = get_config().lib_path
    for name in names:
        fn = Path(name).absolute()
        nb_export(fn, lib_path=lib)
        fill(fn)
        process_write(warn_msg="could not be cleaned", proc_nb=clean_nb, f_in=fn)
        nb_export(fn, lib_path=lib)
        print("saved", name)


if __name__ == "__main__": main(sys.argv[1:])
