"The public face: `import ftkit` costs nothing, and every name is there when it is used."
import inspect, subprocess, sys

import pytest

import ftkit

HEAVY = "torch transformers accelerate numpy matplotlib rich datasets peft".split()


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_loads_nothing_heavy():
    loaded = python("import ftkit, ftkit.cli, ftkit.recipes, sys; print(*sys.modules)")
    assert not [m for m in HEAVY if m in loaded]


def test_a_name_loads_what_it_needs():
    assert python("import ftkit; print(ftkit.LoraConfig(r=3).r)") == ["3"]
    assert "torch" in python("import ftkit, sys; ftkit.FtkitError; print(*sys.modules)")


@pytest.mark.parametrize("name", ftkit.__all__)
def test_every_name_is_there_and_documented(name):
    thing = getattr(ftkit, name)
    assert not inspect.ismodule(thing)
    assert name in dir(ftkit)
    if callable(thing): assert inspect.getdoc(thing), f"{name} has no docstring"


def test_names_that_the_pages_promise():
    names = """load_model load_tokenizer template recipe list_recipes copy_recipe train test chat
        Chat generate merge preview load_data Recipe LoraConfig DataConfig OptimConfig TrainConfig
        ModelConfig FtkitError add_lora log_dataset check_custom_dataset list_dataset_format"""
    assert set(names.split()) <= set(ftkit.__all__)
    assert ftkit.__version__[0].isdigit()


def test_unknown_names_are_attribute_errors():
    assert not hasattr(ftkit, "lode_model")
    with pytest.raises(AttributeError, match="lode_model"): ftkit.lode_model
    with pytest.raises(ImportError): from ftkit import lode_model  # noqa: F401


def test_a_function_wins_over_a_module_of_its_name():
    out = python("import ftkit\nfrom ftkit.generate import Chat\nimport ftkit.generate\n"
                 "print(callable(ftkit.generate), ftkit.Chat is Chat)")
    assert out == ["True", "True"]


def test_star_imports_give_the_same_names():
    space = {}
    exec("from ftkit.all import *", space)
    assert set(ftkit.__all__) <= set(space) and space["train"] is ftkit.train


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version
    assert ftkit.__version__ == version("ftkit")
