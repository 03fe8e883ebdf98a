"The wheel: what is in it, what it asks for, and that it works away from the project."
import ast, configparser, os, re, shutil, subprocess, sys, sysconfig, venv, zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = configparser.ConfigParser(delimiters=["="])
CONFIG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CONFIG["DEFAULT"]
QUIET = ["-q", "--disable-pip-version-check", "--no-index", "--no-deps"]


def run(*command, **kw):
    "The output of a command that must succeed."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **kw)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel, built from the source distribution, built from a copy of the project."
    home = tmp_path_factory.mktemp("wheel")
    built = "__pycache__ .* build dist *.egg-info runs _docs _proc".split()
    skip = shutil.ignore_patterns(*built)
    shutil.copytree(ROOT, home/"project", ignore=skip, symlinks=True)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", home, cwd=home/"project")
    source, = home.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", *QUIET, "--no-build-isolation", "-w", home/"dist",
        source, cwd=home)
    wheel, = (home/"dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def inside(wheel):
    with zipfile.ZipFile(wheel) as z: return {i.filename: i.file_size for i in z.infolist()}


def test_every_module_and_asset_is_in_the_wheel(inside):
    package = {p.relative_to(ROOT).as_posix(): p.stat().st_size for p in (ROOT/"ftkit").rglob("*")
               if p.is_file() and "__pycache__" not in p.parts}
    assert {k: v for k, v in inside.items() if k.startswith("ftkit/")} == package
    for name in "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json":
        assert inside[f"ftkit/assets/nano/{name}"] > 0


def test_nothing_else_is_in_the_wheel(inside):
    tops = {name.split("/")[0] for name in inside}
    assert tops == {"ftkit", f"ftkit-{CFG['version']}.dist-info"}


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < 9e6


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as z:
        info = f"ftkit-{CFG['version']}.dist-info"
        meta = z.read(f"{info}/METADATA").decode()
        entries = z.read(f"{info}/entry_points.txt").decode()
        assert "Apache License" in z.read(f"{info}/licenses/LICENSE").decode()
    assert "ftkit=ftkit.cli:main" in entries.replace(" ", "")
    extras = set(re.findall(r"(?m)^Provides-Extra: (.+)$", meta))
    assert {"dev", "gpu", "deepspeed", "flash-attn"} <= extras
    assert "Requires-Python: >=3.10" in meta and "make demo" in meta  # the README describes it
    text = (ROOT/"ftkit"/"__init__.py").read_text(encoding="utf-8")
    assert f'\n__version__ = "{CFG["version"]}"\n' in text


def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    "Installed by itself, away from the project; this environment lends what it runs on."
    venv.create(tmp_path/"env", with_pip=False)
    bin_ = tmp_path/"env"/("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", bin_/"python", "install", *QUIET, wheel)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(bin_/"python", "-c", where).strip())
    (site/"lent.pth").write_text(sysconfig.get_path("purelib"))
    away = tmp_path/"away"
    away.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    home = run(bin_/"python", "-c", "import ftkit; print(ftkit.__file__)", cwd=away, env=env)
    assert Path(home.strip()).is_relative_to(site)
    assert "train" in run(bin_/"ftkit", "--help", cwd=away, env=env)
    assert "nano_lora_colors" in run(bin_/"ftkit", "list-cfg", cwd=away, env=env)
    code = ("import ftkit; m = ftkit.load_model('nano'); t = ftkit.load_tokenizer('nano')\n"
            "print(m.num_parameters(), t.decode(t('sky blue').input_ids))")
    count, _, text = run(bin_/"python", "-c", code, cwd=away, env=env).strip().partition(" ")
    assert int(count) > 1e6 and "sky blue" in text


# ------------------------------------------------------------ what it asks for

INDIRECT = {  # required, though no module of ours imports it
    "jinja2": "transformers renders chat templates with it",
}


GIVEN = {"ipython"}  # imported only inside a notebook, which runs on it


def normal(name): return re.sub(r"[-_.]+", "-", name).lower()


def requirements(key): return {normal(re.match(r"[\w.-]+", r)[0]) for r in CFG[key].split()}


def imports():
    "Top-level names of the packages that ftkit imports, with a file that does so."
    found = {}
    for path in sorted((ROOT/"ftkit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "need":
                names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
            else: continue
            for name in names: found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return {k: v for k, v in found.items() if k not in sys.stdlib_module_names and k != "ftkit"}


def test_what_is_imported_is_required():
    where = packages_distributions()
    extras = [k for k in CFG if k.endswith("_requirements")]
    known = requirements("requirements") | set().union(*(requirements(k) for k in extras))
    for name, path in imports().items():
        dists = {normal(d) for d in where.get(name, [name])}
        assert dists & (known | GIVEN), f"{path} imports {name}, not required in settings.ini"


def test_what_runs_always_is_a_plain_requirement():
    "Imports at the top of a module may only name plain requirements; Triton is tried for in one place."
    where = packages_distributions()
    for path in sorted((ROOT/"ftkit").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            for name in (n.split(".")[0] for n in names):
                if name in sys.stdlib_module_names or name == "ftkit": continue
                dists = {normal(d) for d in where.get(name, [name])}
                assert dists & requirements("requirements"), \
                    f"{path.name} imports {name}, which is no plain requirement"


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, ftkit as ft, ftkit.graph, ftkit.planner, ftkit.kernels.eight
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=128))
ft.add_lora(ft.quantize_model(model), ft.LoraConfig(r=4)).train()
task, found = ft.SupervisedTuning(), []
for fast in False, True:
    if fast: assert ft.speed_up(model)
    ids = torch.arange(30).view(2, 15)
    loss, _ = task(model, task.prepare(dict(input_ids=ids, labels=ids)))
    loss.backward()
    found.append([loss] + [p.grad for p in model.parameters() if p.requires_grad])
    model.zero_grad()
torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
ft.build_optimizer(model, ft.OptimConfig())
print("trained")
"""

def test_it_trains_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "trained", done.stderr[-2000:]


def test_what_is_required_is_imported():
    used = {normal(d) for name in imports() for d in packages_distributions().get(name, [name])}
    idle = requirements("requirements") - used - set(INDIRECT)
    assert not idle, f"settings.ini requires {', '.join(sorted(idle))}, which ftkit does not import"


def test_constraints_pin_what_is_required():
    lines = (ROOT/"constraints.txt").read_text().splitlines()
    pins = {normal(line.split("==")[0]) for line in lines if "==" in line}
    assert requirements("requirements") | requirements("dev_requirements") <= pins
