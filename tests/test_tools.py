"The tools that run, check and render notebooks, on a small project of their own; and the Makefile."
import json, os, re, shutil, stat, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = """[DEFAULT]
repo = ftkit
lib_name = ftkit
lib_path = ftkit
nbs_path = nbs
doc_path = _docs
doc_host = https://example.org
doc_baseurl = /ftkit
git_url = https://example.org/git
user = ftkit
author = authors
author_email = a@example.org
branch = main
version = 0.1.0
description = a test
readme_nb = index.ipynb
recursive = True
custom_sidebar = True
put_version_in_init = False
update_pyproject = False
tst_flags = cuda slow net
"""
QUARTO = """website:
  title: test
  site-url: https://example.org/ftkit
  repo-url: https://example.org/git
  navbar:
    left:
      - href: index.ipynb
        text: Start
  sidebar:
    contents:
      - index.ipynb
      - section: Part
        contents: [00_one.ipynb, 01_two.ipynb]
"""
ONE = ["# One\n> The first room.", "#| default_exp one", "#| export\nimport json",
       "## Doubling",
       '#| exports\ndef double(x:int # A number\n  )->int:\n    "Twice `x`."\n    return 2*x',
       "It doubles:", "double(21)", "assert double(0) == 0",
       "## Exercises\n\n1. Halve."]
TWO = ["# Two\n> The second room.", "#| default_exp two", "#| export\nfrom ftkit.one import double",
       "Four times is `double` twice, see [one](00_one.ipynb#doubling).",
       '#| exports\ndef fourfold(x):\n    "Four times `x`."\n    return double(double(x))',
       "So:", "fourfold(2)", "assert fourfold(0) == 0",
       "## Exercises\n\n1. None."]
INDEX = ["# Index\n> Where it starts.", "See [one](00_one.ipynb) and $x^2$."]


def notebook(cells):
    "Cells of text as a clean notebook: Markdown where they read like it, else code."
    made = []
    for i, source in enumerate(cells):
        code = re.match(r"#\||[\w.]+\(|import |from |assert |raise |print|open", source)
        cell = dict(cell_type="code" if code else "markdown", id=f"cell{i}", metadata={},
                    source=source.splitlines(True))
        made.append(dict(cell, execution_count=None, outputs=[]) if code else cell)
    return dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)


def write(project, name, cells):
    from execnb.nbio import dict2nb, write_nb
    write_nb(dict2nb(notebook(cells)), project/"nbs"/f"{name}.ipynb")


def tool(project, name, *args):
    "Exit code and everything that a tool said."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["FTKIT_PRELOAD"] = "nbdev.test"
    done = subprocess.run([sys.executable, project/"tools"/f"{name}.py", *args], cwd=project,
                          env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=120)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A small project whose notebooks have been exported and run."
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT/"tools", project/"tools", ignore=shutil.ignore_patterns("__pycache__"))
    (project/"settings.ini").write_text(SETTINGS)
    (project/"_quarto.yml").write_text(QUARTO)
    for folder in "ftkit", "nbs": (project/folder).mkdir()
    (project/"ftkit"/"__init__.py").write_text('__version__ = "0.1.0"\n')
    (project/"nbs"/"styles.css").touch()
    every = {"00_one": ONE, "01_two": TWO, "index": INDEX}
    for name, cells in every.items(): write(project, name, cells)
    code, said = tool(project, "save_outputs", *(f"nbs/{name}.ipynb" for name in every))
    assert code == 0, said
    build = "from nbdev.doclinks import _build_modidx; _build_modidx()"
    subprocess.run([sys.executable, "-c", build], cwd=project, check=True)
    assert tool(project, "docs", "--readme")[0] == 0
    return project


@pytest.fixture
def project(saved, tmp_path):
    "A fresh copy of the small project."
    return Path(shutil.copytree(saved, tmp_path/"project"))


# ------------------------------------------------------------ saving outputs

def test_outputs_are_saved_and_the_module_is_written(saved):
    cells = json.loads((saved/"nbs"/"00_one.ipynb").read_text())["cells"]
    assert cells[6]["outputs"][0]["data"]["text/plain"] == ["42"]
    assert "def double" in (saved/"ftkit"/"one.py").read_text()


def test_an_error_names_the_cell_and_leaves_the_notebook(project):
    write(project, "00_one", [*ONE, "raise KeyError('lost')"])
    before = (project/"nbs"/"00_one.ipynb").read_bytes()
    code, said = tool(project, "save_outputs", "nbs/00_one.ipynb")
    assert code == 1 and "00_one, cell 10 (id cell9)" in said and "KeyError: 'lost'" in said
    assert (project/"nbs"/"00_one.ipynb").read_bytes() == before


def test_check_finds_outputs_that_changed(project):
    assert tool(project, "save_outputs", "--check", "one")[0] == 0
    path = project/"nbs"/"00_one.ipynb"
    path.write_text(path.read_text().replace('"42"', '"43"'))
    code, said = tool(project, "save_outputs", "--check", "one")
    assert code == 1 and "[7]" in said and '"43"' in path.read_text()


# ------------------------------------------------------------ running

def test_notebooks_run_isolated_with_a_limit(project):
    for name, source in {
        "10_sets": "import os, json\njson.MARK = 1\nos.environ['MARK'] = '1'",
        "11_sees": "import os, json\nassert 'MARK' not in os.environ | vars(json)",
        "12_hangs": "import time\ntime.sleep(600)",
        "13_dies": "import os\nos.kill(os.getpid(), 9)",
        "14_fails": "assert 1 == 2, 'no'",
        "15_cuda": "#| cuda\nraise ValueError",
        "16_litters": "open('left.txt', 'w').close()",
    }.items(): write(project, name, ["# A\n> b", source])
    code, said = tool(project, "run_nbs", "--limit", "6", "--jobs", "1", "1")
    assert code == 1
    assert set(re.findall(r"(?m)^FAIL .* (\d\d_\w+)$", said)) == {"12_hangs", "13_dies", "14_fails"}
    assert "12_hangs, stopped after 6 s in cell 2" in said
    assert "13_dies, ended by SIGKILL in cell 2" in said
    assert "AssertionError: no" in said and "left files behind: left.txt" in said
    assert "5 passed, 3 failed" in said
    assert "ValueError" in tool(project, "run_nbs", "--flags", "cuda", "15_cuda")[1]


# ------------------------------------------------------------ checking

def test_a_sound_house_passes(saved):
    code, said = tool(saved, "check")
    assert code == 0 and said == "house: 3 notebooks, 0 errors, 0 warnings\n"


def edit(name, old, new):
    def change(project):
        path = project/name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    return change


def cells(name, new):
    return lambda project: write(project, name, new)


def more(*new): return cells("00_one", [*ONE, *new])


def title(*new): return cells("00_one", [*new, *ONE[1:]])


NB = "nbs/00_one.ipynb"
BREAK = {
    "module edited": (edit("ftkit/one.py", "2*x", "3*x"), "one.py: differs from its notebook"),
    "module stale": (lambda p: (p/"ftkit"/"old.py").touch(), "no notebook exports it any more"),
    "module missing": (lambda p: (p/"ftkit"/"two.py").unlink(), "ftkit/two.py: is missing"),
    "index stale": (edit("ftkit/_modidx.py", "double", "triple"), "_modidx.py: differs"),
    "unclean": (edit(NB, '"execution_count": null', '"execution_count": 3'), "is not clean"),
    "ids twice": (edit(NB, '"id": "cell3"', '"id": "cell2"'), "cell ids twice"),
    "number twice": (cells("01_six", ["# Six\n> s"]), "the number 01 is used twice"),
    "name and module": (edit(NB, "default_exp one", "default_exp won"), "the file name says one"),
    "upward": (more("from ftkit.two import fourfold"), "imports ftkit.two, a higher"),
    "late directive": (more("import os\n#| export\nx = 1"), "nbdev overlooks '#| export'"),
    "docstring": (more("#| export\ndef bare(): return 1"), "bare has no docstring"),
    "patched with /": (more("#| exporti\n@patch\ndef f(self:int, /): return 1"),
                       "nbdev cannot read"),
    "long code": (more(f"assert {'1 + '*30}1"), "lines of code over 100"),
    "not Python": (more("import import"), "is not valid Python"),
    "no title": (title("One"), "must start with '# Title'"),
    "no description": (title("# One"), "has no '> description'"),
    "two descriptions": (title("# One\n> a\n> b"), "must be one line"),
    "lost text": (title("# One\n> a\n\nText"), "drops what else stands in the title's"),
    "unlisted": (cells("02_three", ["# Three\n> t"]), "does not list nbs/02_three.ipynb"),
    "listed in vain": (edit("_quarto.yml", "01_two", "01_tow"), "lists 01_tow.ipynb, which is no"),
    "out of order": (edit("_quarto.yml", "[00_one.ipynb, 01_two.ipynb]",
                          "[01_two.ipynb, 00_one.ipynb]"), "the rooms in their order"),
    "README": (edit("README.md", "Where it starts", "Where it ends"), "README.md: is not what"),
    "path in output": (edit(NB, '"42"', '"/home/me/x"'), "a path in the output: /home/me/x"),
    "address": (edit(NB, '"42"', '"0x7f0123456789"'), "an address in the output"),
    "big": (edit(NB, '"42"', f'"{"4"*320_000}"'), "KiB, at most 300"),
}


@pytest.mark.parametrize("name", BREAK)
def test_check_finds(name, project):
    change, message = BREAK[name]
    change(project)
    code, said = tool(project, "check", "--quiet")
    assert code == 1 and message in said


def test_check_warns(project):
    crowd = '#| export\ndef twice(x):\n    "Doubles."\n    return 2*x'
    face = "#| export\nimport ftkit\nhere = ftkit.__file__"
    write(project, "00_one", [*ONE[:5], crowd, "assert twice(2) == 4", face, "import os\nos.sep"])
    said = tool(project, "check")[1]
    parts = ("neither prose nor a run between it and the exported cell 5", "not 0.7 to 1.0",
             "last section is not 'Exercises'", "imports ftkit: import from its room",
             "imports and other code in one cell")
    assert not [part for part in parts if part not in said]


# ------------------------------------------------------------ rendering

def test_the_site_renders_and_links_are_checked(project):
    callout = "::: {.callout-tip}\n## Try it\nWith *three*.\n:::"
    figure = "See @fig-a.\n\n![A caption](images/a.png){#fig-a}"
    links = "[away](00_one.ipynb#nowhere) [lost](gone.html)"
    write(project, "index", [*INDEX, callout, figure, links])
    code, said = tool(project, "docs")
    assert code == 1
    assert "index.html: one.html#nowhere: there is no such place" in said
    assert "gone.html leads nowhere" in said and "images/a.png leads nowhere" in said
    assert "README.md is not what" in said
    index, one, two = ((project/"_docs"/f"{n}.html").read_text() for n in ("index", "one", "two"))
    assert '<div class="callout callout-tip"><div class="callout-title">Try it</div>' in index
    assert '<a href="#fig-a">Figure 1</a>' in index and "Figure 1: A caption" in index
    assert "<math" in index
    assert '<a href="one.html">one</a>' in index
    assert '<h3 id="double">double' in one and "default_exp" not in one and ">42" in one
    assert 'href="one.html#double"' in two and 'href="one.html#doubling"' in two
    assert 'rel="next" href="two.html"' in one and 'aria-current="page">Two</a>' in two
    assert '"two.html#exercises"' in (project/"_docs"/"site"/"search.js").read_text()
    write(project, "index", INDEX)
    assert tool(project, "docs")[0] == 0


def test_readme_links_from_the_top_folder(saved):
    text = (saved/"README.md").read_text()
    assert "# Index" in text and "[one](nbs/00_one.ipynb)" in text


# ------------------------------------------------------------ the project itself

def test_ci_runs_what_the_readme_says():
    script = ROOT/".ci"/"run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert re.search(r"(?m)^make test\b", script.read_text())
    assert re.search(r"(?m)^make demo\b.*\nmake test\b", (ROOT/"README.md").read_text())


def test_quarto_reads_the_same_file():
    assert (ROOT/"nbs"/"_quarto.yml").resolve() == ROOT/"_quarto.yml"


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(*args):
    return subprocess.run(["make", "-C", ROOT, *map(str, args)], capture_output=True, text=True)


@needs_make
def test_make_help_lists_every_target():
    listed = re.findall(r"(?m)^  make (\w+) +\S", make("help").stdout)
    targets = re.search(r"\.PHONY: (.*)", (ROOT/"Makefile").read_text())[1].split()
    assert listed and sorted(listed) == sorted(targets)


@needs_make
def test_an_old_python_is_refused(tmp_path):
    old = tmp_path/"python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("demo", f"PYTHON={old}", f"VENV={tmp_path}/env")
    assert done.returncode and "needs Python 3.10 or newer" in done.stderr
    assert not (tmp_path/"env").exists()


def test_the_index_lists_every_room():
    text = (ROOT/"nbs"/"index.ipynb").read_text(encoding="utf-8")
    for path in (ROOT/"nbs").glob("[0-9]*.ipynb"): assert f"({path.name})" in text, path.name
