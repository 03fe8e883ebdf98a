"""Check the house in a few seconds, without running a notebook.

    python tools/check.py                 errors and warnings; exit code 1 if there are errors
    python tools/check.py --quiet         errors only
    python tools/check.py 30_data         only what concerns these notebooks

Errors: modules that differ from a fresh export, or that no notebook exports any more; notebooks
that are not clean; cell ids or room numbers that occur twice; imports from a higher-numbered room;
directives that nbdev overlooks; public names without a docstring; long lines, modules, notebooks;
pages that _quarto.yml does not list.
Warnings: what a reader of the page would stumble over.
"""
import argparse, ast, difflib, json, re, shutil, subprocess, sys, tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import NBS, ROOT, label, notebooks, offline

LIB = ROOT/"ftkit"
BY_HAND = {"__init__.py", "all.py", "__main__.py"}
LINE, PROSE, EXPORT_LINES, MODULE_LINES, NOTEBOOK_KIB = 100, 120, 30, 400, 300
RATIO, TOLERANCE = (0.7, 1.0), 0.15
MARKS = {"export", "exports", "exporti", "hide", "default_exp", "eval", "cuda", "slow", "net"}
HIDDEN = {"hide", "default_exp"}
DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+:?)\s*(.*)")
PLACE = re.compile(r"(?<![\w.:/])/(?:root|home|Users|tmp|private|var/folders|opt|mnt)/\S*")
LONG_PROSE = re.compile(r"https?://|^\||^\s*<|^!\[")
ADDRESS = re.compile(r"\b0x[0-9a-f]{8,}")


@dataclass
class Problem:
    where: str
    what: str
    error: bool = True


def warning(where, what): return Problem(where, what, error=False)


@dataclass
class Cell:
    number: int
    kind: str
    source: str
    outputs: list
    directives: dict = field(default_factory=dict)

    @property
    def lines(self): return self.source.splitlines()

    @property
    def exported(self): return bool(self.directives.keys() & {"export", "exports", "exporti"})

    @property
    def public(self): return bool(self.directives.keys() & {"export", "exports"})

    @property
    def tree(self):
        "The cell's syntax tree without IPython's magics; None if it is not Python."
        try: return ast.parse(re.sub(r"(?m)^\s*[%!].*$", "", self.source))
        except SyntaxError: return None

    @property
    def imports_only(self):
        tree = self.tree if self.kind == "code" else None
        return bool(tree and tree.body) and all(map(is_import, tree.body))


@dataclass
class Page:
    "A notebook, taken apart."
    path: Path
    raw: dict
    cells: list

    @property
    def name(self): return label(self.path)

    @property
    def number(self):
        found = re.match(r"(\d+)[a-z]*_", self.path.name)
        return int(found[1]) if found and self.path.parent == NBS else None

    @property
    def module(self):
        names = [c.directives["default_exp"] for c in self.cells if "default_exp" in c.directives]
        return f"ftkit.{names[0]}" if names else None

    def at(self, cell): return f"{self.name}, cell {cell.number}"


def is_public(node):
    "Whether a statement defines a name that `import *` gives (a patched method is none)."
    kinds = ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef
    return isinstance(node, kinds) and node.name[0] != "_" and not is_patched(node)


def is_patched(node):
    "Whether a function becomes a method of a class by `@patch`."
    marks = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(ast.unparse(d).startswith("patch") for d in marks)


def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


def read_page(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for i, c in enumerate(raw["cells"], 1):
        cell = Cell(i, c["cell_type"], "".join(c["source"]), c.get("outputs", []))
        for line in cell.lines if cell.kind == "code" else []:
            if not (found := DIRECTIVE.match(line)): break
            cell.directives[found[1].rstrip(":")] = found[2].strip()
        cells.append(cell)
    return Page(path, raw, cells)


# ------------------------------------------------------------ the package and its notebooks

EXPORT = """
from nbdev.config import add_init, get_config
from nbdev.doclinks import _build_modidx, nbglob
from nbdev.export import nb_export
for f in nbglob(as_path=True).sorted('name'): nb_export(f)
add_init(get_config().lib_path)
_build_modidx()
"""


def check_export(pages):
    "A fresh export into an empty copy must give the modules that stand in the package."
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        shutil.copy(ROOT/"settings.ini", tmp)
        for page in pages:
            to = tmp/page.path.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(page.path, to)
        (tmp/"ftkit").mkdir()
        for name in BY_HAND:
            if (LIB/name).exists(): shutil.copy(LIB/name, tmp/"ftkit")
        command = [sys.executable, "-c", EXPORT]
        done = subprocess.run(command, cwd=tmp, capture_output=True, text=True)
        if done.returncode: return [Problem("export", done.stderr.strip()[-2000:])]
        return compare_packages(tmp/"ftkit")


def compare_packages(fresh):
    problems = []
    new = {p.relative_to(fresh) for p in fresh.rglob("*.py")}
    old = {p.relative_to(LIB) for p in LIB.rglob("*.py")}
    for p in sorted(new - old): problems.append(Problem(f"ftkit/{p}", "is missing: make export"))
    for p in sorted(old - new):
        if p.name not in BY_HAND:
            problems.append(Problem(f"ftkit/{p}", "no notebook exports it any more: delete it"))
    for p in sorted(new & old):
        a, b = ((x/p).read_text(encoding="utf-8").splitlines() for x in (LIB, fresh))
        if a == b: continue
        diff = list(difflib.unified_diff(a, b, lineterm="", n=0))[2:8]
        what = "differs from its notebook: make export\n      " + "\n      ".join(diff)
        problems.append(Problem(f"ftkit/{p}", what))
    return problems


def check_clean(pages):
    from execnb.nbio import nb2str
    from fastcore.xtras import loads
    from nbdev.clean import clean_nb
    problems = []
    for page in pages:
        text = page.path.read_text(encoding="utf-8")
        nb = loads(text)
        clean_nb(nb)
        if nb2str(nb) != text: problems.append(Problem(page.name, "is not clean: make export"))
        ids = Counter(c.get("id") for c in page.raw["cells"])
        twice = [i for i, n in ids.items() if n > 1]
        if twice: problems.append(Problem(page.name, f"cell ids twice: {twice}"))
    return problems


def check_rooms(pages):
    "Numbers are the dependency order: a room imports only rooms with lower numbers."
    problems = []
    count = Counter(p.number for p in pages)
    rooms = {p.module: p.number for p in pages if p.module and p.number is not None}
    for page in pages:
        if page.number is None: continue
        if count[page.number] > 1:
            problems.append(Problem(page.name, f"the number {page.number:02} is used twice"))
        stem = page.path.stem.partition("_")[2]
        if page.module and page.module != f"ftkit.{stem}":
            what = f"default_exp says {page.module[6:]}, the file name says {stem}"
            problems.append(Problem(page.name, what))
        if not page.module and any(c.exported for c in page.cells):
            problems.append(Problem(page.name, "exports code but has no default_exp"))
        for cell in page.cells: problems += imports_upward(page, cell, rooms)
    return problems


def ftkit_names(tree):
    "Every `ftkit…` name that the code imports, also inside functions; `from a import b` is a.b."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return sorted(n for n in found if n.split(".")[0] == "ftkit")


def imports_upward(page, cell, rooms):
    problems = []
    tree = cell.tree if cell.kind == "code" else None
    for name in ftkit_names(tree) if tree else ():
        room = next((m for m in (name, name.rpartition(".")[0]) if m in rooms), None)
        if room and rooms[room] > page.number:
            what = f"imports {room}, a higher-numbered room ({rooms[room]:02})"
            problems.append(Problem(page.at(cell), what))
        if not cell.exported: continue
        if room == page.module: problems.append(Problem(page.at(cell), "imports its own module"))
        if not room and name != "ftkit.__version__":
            problems.append(warning(page.at(cell), f"imports {name}: import from its room instead"))
    return problems


# ------------------------------------------------------------ the page

def check_cells(page):
    "Directives where nbdev sees them, docstrings, sizes."
    problems, long = [], []
    for cell in (c for c in page.cells if c.kind == "code"):
        for line in cell.lines[len(cell.directives):]:
            found = DIRECTIVE.match(line)
            if found and found[1].rstrip(":") in MARKS:
                what = f"nbdev overlooks {line.strip()!r}: it must stand on the first lines"
                problems.append(Problem(page.at(cell), what))
        long += [(cell.number, len(x)) for x in cell.lines if len(x) > LINE]
        if (tree := cell.tree) is None:
            problems.append(Problem(page.at(cell), "is not valid Python"))
            continue
        if cell.public:
            problems += [Problem(page.at(cell), f"{n.name} has no docstring") for n in tree.body
                         if is_public(n) and not ast.get_docstring(n)]
        for node in tree.body:
            if is_patched(node) and cell.exported and node.args.posonlyargs:
                what = f"nbdev cannot read '/' in the arguments of {node.name}, which is patched in"
                problems.append(Problem(page.at(cell), what))
        problems += check_code(page, cell, tree)
    if long:
        cells = ", ".join(str(n) for n in dict.fromkeys(n for n, _ in long))
        what = f"{len(long)} lines of code over {LINE} characters (cells {cells})"
        problems.append(Problem(page.name, what))
    return problems


def check_code(page, cell, tree):
    problems = []
    code = [x for x in cell.lines if x.strip() and not DIRECTIVE.match(x)]
    if cell.exported and len(code) > EXPORT_LINES:
        what = f"an exported cell of {len(code)} lines, at most {EXPORT_LINES}"
        problems.append(warning(page.at(cell), what))
    runs = cell.directives.get("eval") != "false" and page.module
    imports = any(map(is_import, tree.body if cell.exported else ast.walk(tree)))
    if runs and imports and not all(map(is_import, tree.body)):
        what = "imports and other code in one cell, which nbdev runs alone when it makes the page"
        problems.append(Problem(page.at(cell), what, error=not cell.exported))
    return problems


def check_rhythm(page):
    "What a reader would stumble over."
    problems, last = [], None
    prose = [c for c in page.cells if c.kind == "markdown"]
    if not prose or not re.match(r"# \S", prose[0].source):
        problems.append(Problem(page.name, "the first Markdown cell must start with '# Title'"))
    elif not re.search(r"(?m)^> \S", prose[0].source):
        problems.append(Problem(page.name, "the title has no '> description' under it"))
    elif re.search(r"(?m)^>.*\n>", prose[0].source):
        problems.append(Problem(page.name, "the '> description' must be one line, for nbdev"))
    elif rest := [x for x in prose[0].lines if not re.match(r"# |> |- \S+:|\s*$", x)]:
        what = f"nbdev drops what else stands in the title's cell: {rest[0][:40]!r}"
        problems.append(Problem(page.name, what))
    shown = [c for c in page.cells if c.kind != "raw" and not c.directives.keys() & HIDDEN]
    for cell in shown:
        idea = cell.public and not cell.imports_only
        if idea and last:
            what = f"neither prose nor a run between it and the exported cell {last.number}"
            problems.append(warning(page.at(cell), what))
        if idea: last = cell
        elif not cell.exported: last = None
    if page.number is not None: problems += check_proportions(page, shown)
    for cell, after in zip(page.cells, page.cells[1:]):
        unseen = after.kind == "code" and after.directives.keys() & (HIDDEN | {"exporti"})
        if cell.kind == "markdown" and cell.source.rstrip().endswith(":") and unseen:
            what = f"ends with a colon, but cell {after.number} is hidden on the page"
            problems.append(warning(page.at(cell), what))
    for cell in prose:
        long = [x for x in cell.lines if len(x) > PROSE and not LONG_PROSE.search(x)]
        if long:
            problems.append(warning(page.at(cell), f"prose of {len(long[0])} characters on a line"))
    return problems


def check_proportions(page, shown):
    problems, kinds = [], Counter(c.kind for c in shown)
    ratio = kinds["markdown"]/max(kinds["code"], 1)
    if not RATIO[0] - TOLERANCE <= ratio <= RATIO[1] + TOLERANCE:
        cells = f"{kinds['markdown']} Markdown to {kinds['code']} code cells"
        what = f"{cells}: {ratio:.2f}, not 0.7 to 1.0"
        problems.append(warning(page.name, what))
    text = "\n".join(c.source for c in shown if c.kind == "markdown")
    heads = re.findall(r"(?m)^## (.+)$", text)
    if not heads or heads[-1].strip() != "Exercises":
        problems.append(warning(page.name, "the last section is not 'Exercises'"))
    return problems


def check_outputs(page):
    "Saved outputs: no errors, no paths of a machine, no addresses; the file within its size."
    problems = []
    for cell in page.cells:
        here = page.at(cell)
        for out in cell.outputs:
            kind, data = out["output_type"], out.get("data", {})
            if kind == "error": problems.append(Problem(here, f"a saved error: {out['ename']}"))
            if out.get("name") == "stderr": problems.append(warning(here, "output on stderr"))
            text = "".join(x for k, v in data.items() if k.startswith("text/") for x in v)
            text += "".join(out.get("text", []))
            if found := PLACE.search(text):
                problems.append(Problem(here, f"a path in the output: {found[0][:60]}"))
            if found := ADDRESS.search(text):
                problems.append(Problem(here, f"an address in the output: {found[0]}"))
            if len(text) > 6000 and "text/html" not in data:
                problems.append(warning(here, f"{len(text)} characters of output"))
    code = [c for c in page.cells if c.kind == "code"]
    if len(code) > 3 and not any(c.outputs for c in code):
        problems.append(Problem(page.name, "has no outputs: tools/save_outputs.py"))
    kib = page.path.stat().st_size/1024
    if kib > NOTEBOOK_KIB:
        problems.append(Problem(page.name, f"{kib:.0f} KiB, at most {NOTEBOOK_KIB}"))
    return problems


# ------------------------------------------------------------ files and site

def check_files():
    "Sizes of modules; long lines in what is written by hand."
    problems = []
    for path in sorted(LIB.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = [x for x in text.splitlines() if x.strip() and not x.startswith("# %% ")]
        if len(lines) > MODULE_LINES and path.name != "_modidx.py":
            name = path.relative_to(ROOT)
            problems.append(Problem(str(name), f"{len(lines)} lines, at most {MODULE_LINES}"))
    by_hand = [*ROOT.glob("tools/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("*.py"),
               *(LIB/name for name in BY_HAND)]
    for path in sorted(p for p in by_hand if p.exists()):
        text = path.read_text(encoding="utf-8").splitlines()
        long = [str(i) for i, line in enumerate(text, 1) if len(line) > LINE]
        if long:
            what = f"{len(long)} lines over {LINE} characters ({', '.join(long[:12])})"
            where = path.relative_to(ROOT).as_posix()
            problems.append(Problem(where, what, error=not where.startswith("tests/")))
    return problems


def listed_pages(contents):
    "The pages that a sidebar names, in order."
    for item in contents or []:
        href = item if isinstance(item, str) else item.get("href", "http")
        if not href.startswith("http"): yield href
        if isinstance(item, dict): yield from listed_pages(item.get("contents"))


def check_readme():
    from docs import check_readme as check
    return [Problem("README.md", text.removeprefix("README.md ")) for text in check()]


def check_site(pages):
    "Every notebook stands in the sidebar once, in the order of the rooms."
    import yaml
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    listed = list(listed_pages(site["sidebar"]["contents"]))
    there = {p.path.relative_to(NBS).as_posix(): p for p in pages}
    whats = [f"does not list nbs/{name}" for name in there if name not in listed]
    whats += [f"lists {name}, which is no notebook" for name in listed if name not in there]
    whats += [f"lists {name} {n} times" for name, n in Counter(listed).items() if n > 1]
    numbers = [there[n].number for n in listed if n in there and there[n].number is not None]
    if numbers != sorted(numbers): whats.append("does not list the rooms in their order")
    return [Problem("_quarto.yml", what) for what in whats]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="show only what concerns these notebooks")
    parser.add_argument("--quiet", action="store_true", help="show errors only")
    args = parser.parse_args()
    offline()
    pages = [read_page(p) for p in notebooks()]
    problems = check_export(pages) + check_clean(pages) + check_rooms(pages)
    problems += check_site(pages) + check_readme() + check_files()
    for page in pages: problems += check_cells(page) + check_rhythm(page) + check_outputs(page)
    if args.names:
        problems = [p for p in problems if any(n in p.where + p.what for n in args.names)]
    for p in problems:
        kind = "error" if p.error else "warn "
        if p.error or not args.quiet: print(f"{kind}  {p.where}: {p.what}")
    errors = sum(p.error for p in problems)
    print(f"house: {len(pages)} notebooks, {errors} errors, {len(problems) - errors} warnings")
    return int(errors > 0)


if __name__ == "__main__": sys.exit(main())
