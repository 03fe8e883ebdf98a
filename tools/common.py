"What the tools share: which notebooks there are, running one, work in forked children."
import faulthandler, gc, glob, os, pickle, shutil, signal, sys, tempfile, textwrap, time, traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"


def offline():
    "Settings for a process that runs notebooks: no network, no progress bars, this very ftkit."
    for name in "TQDM_DISABLE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS":
        os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # to ask must not start CUDA
    if not gpu(): os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)


def gpu():
    "Whether this machine shows a GPU of any make."
    return any(map(glob.glob, ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")))


def cores():
    "How many cores this process may use."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def notebooks(names=()):
    "The named notebooks (paths, or parts of a name), or all of them in the order of their names."
    every = [p for p in sorted(NBS.rglob("*.ipynb"))
             if not any(x[0] in "_." for x in p.relative_to(NBS).parts)]
    if not names: return every
    found = []
    for name in names:
        path = Path(name).absolute()
        hits = [path] if path.is_file() else [p for p in every if str(name) in label(p)]
        if not hits:
            raise SystemExit(f"{name}: no such notebook. There are: {' '.join(map(label, every))}")
        found += [h for h in hits if h not in found]
    return found


def label(path):
    "The name of a notebook in a report, such as `tutorials/01_first_finetune`."
    path = Path(path)
    return str((path.relative_to(NBS) if path.is_relative_to(NBS) else path).with_suffix(""))


class CellFailed(Exception):
    "A cell raised an error; the message holds the cell and the traceback from the cell on."


def _cell_traceback(error):
    frames = traceback.extract_tb(error.__traceback__)
    own = next((i for i, f in enumerate(frames) if "ipython-input" in f.filename), 0)
    last = traceback.format_exception_only(type(error), error)
    return "".join(traceback.format_list(frames[own:]) + last).rstrip()


def run_notebook(path, flags=(), skip=True):
    """Run the cells that a test of the notebook runs, and return the notebook with their outputs.

    Left out are cells marked `eval: false`, those with a test flag of settings.ini that is not in
    `flags`, and with `skip` all of them if the front matter says `skip_exec: true`.
    """
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    nb = read_nb(path)
    checked = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    directives = {c.id: getattr(c, "directives_", None) or {} for c in checked.cells}
    skipped = set(get_config().tst_flags.split()) - set(flags)
    front = getattr(checked, "frontmatter_", None) or {}
    if skip and str(front.get("skip_exec", "")).lower() == "true": return nb

    def leave_out(cell):
        if _place: _place.write_text(f"in cell {cell.idx_ + 1} (id {cell.id})")
        found = directives.get(cell.id, {})
        return (cell.cell_type != "code" or (found.get("eval:") or [""])[0].lower() == "false"
                or bool(skipped & found.keys()) or "nbdev_export(" in cell.source)

    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    shell = CaptureShell(path)
    try: shell.run_all(nb, exc_stop=True, preproc=leave_out)
    except BaseException as e:
        if shell.exc is not e: raise
        cell = nb.cells[shell._cell_idx - 1]
        source = textwrap.indent(cell.source.strip(), "    ")
        where = f"cell {shell._cell_idx} (id {cell.id})"
        raise CellFailed(f"{where}:\n{source}\n{_cell_traceback(e)}") from None
    finally: os.environ.pop("IN_TEST", None)
    return nb


SLOW_IMPORTS = "torch transformers accelerate peft matplotlib.pyplot pytest nbdev.test nbdev.serve"


def preload():
    """Pay once for the slow imports; the children that are forked later have them for nothing.

    With a GPU it is not done: some of them start CUDA, which a fork does not survive."""
    if gpu(): return
    names = os.environ.get("FTKIT_PRELOAD", SLOW_IMPORTS).split()
    for name in names:
        try: __import__(name)
        except ImportError: pass
    if "transformers" in names:  # it loads its parts when they are named
        with suppress(ImportError):
            from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast # noqa
    gc.collect()
    gc.freeze()  # or each collection in a child would go through it all, and copy its pages


_place = None  # In a child: the file that says which cell is running, if it does not live to tell


@dataclass
class Result:
    "How one call went in its child."
    item: object
    value: object = None
    error: str = ""      # Empty if the call returned
    output: str = ""     # What it wrote to stdout and stderr
    seconds: float = 0.
    peak: int = 0        # Largest resident memory, MiB


def _child(function, item, folder, limit):
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    out = os.open(folder/"output", os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    global _place
    _place, tempfile.tempdir = folder/"place", None
    for name in "TMPDIR", "IPYTHONDIR", "FTKIT_CACHE": os.environ[name] = str(folder)
    faulthandler.dump_traceback_later(limit, exit=True, file=2)
    try: answer = function(item), ""
    except CellFailed as e: answer = None, str(e)
    except BaseException: answer = None, traceback.format_exc()
    faulthandler.cancel_dump_traceback_later()
    try: (folder/"answer").write_bytes(pickle.dumps(answer))
    except BaseException: traceback.print_exc()
    for stream in sys.stdout, sys.stderr: stream.flush()
    os._exit(0)


def _collect(item, folder, status, seconds, usage, limit):
    read = lambda name: (folder/name).read_text(errors="replace") if (folder/name).exists() else ""
    kib = usage.ru_maxrss if sys.platform != "darwin" else usage.ru_maxrss//1024
    result = Result(item, output=read("output"), seconds=seconds, peak=kib//1024)
    if (folder/"answer").exists():
        result.value, result.error = pickle.loads((folder/"answer").read_bytes())
        return result
    code = os.waitstatus_to_exitcode(status)
    why = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if seconds >= limit: why = f"stopped after {limit} s"
    result.error = f"{why} {read('place')}\n{result.output[-3000:]}"
    return result


def forked(function, items, jobs=None, limit=300):
    "Call `function(item)` in a child for each item, `jobs` at a time; yield Results as they end."
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    waiting, running = list(items), {}
    jobs = jobs or max(1, min(cores(), len(waiting)))
    home = Path(tempfile.mkdtemp(prefix="ftkit-"))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                item, folder = waiting.pop(0), Path(tempfile.mkdtemp(dir=home))
                sys.stdout.flush()
                sys.stderr.flush()
                if (pid := os.fork()) == 0: _child(function, item, folder, limit)
                running[pid] = item, folder, time.monotonic()
            pid, status, usage = os.wait3(0)
            if pid not in running: continue
            item, folder, start = running.pop(pid)
            _end_group(pid)
            yield _collect(item, folder, status, time.monotonic() - start, usage, limit)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for pid in running: _end_group(pid)
        shutil.rmtree(home, ignore_errors=True)


def _end_group(pid):
    "End what a child has started and left running."
    try: os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError): pass
