# ftkit: `make` alone lists what there is to do.

# The Python that makes the environment. It must be 3.10 or newer:  make demo PYTHON=python3.12
PYTHON ?= python3
# More words for pip, e.g. where to find the small CPU build of torch (PyTorch's install page says it):
#   make demo PIP_FLAGS="--extra-index-url …"
PIP_FLAGS ?=
# What `make demo` trains, and where the result goes
RECIPE ?= nano_lora_colors_e4
DEMO ?= runs/demo

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),-q) -c constraints.txt $(PIP_FLAGS)
PACKAGE := settings.ini setup.py pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lab docs export build venv clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.run  ## Tune the built-in model on colour names and show what it learned (no GPU, no download)
	@rm -rf $(DEMO)
	$(BIN)/ftkit train $(RECIPE) --work-dir $(DEMO)
	$(BIN)/ftkit test $(RECIPE) --checkpoint $(DEMO) --picture $(DEMO)/swatches.png

test: $(VENV)/.dev  ## Check the house, run every notebook, render the pages, run tests/
	$(BIN)/python tools/check.py --quiet
	$(BIN)/python tools/run_nbs.py
	$(BIN)/python tools/docs.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist loadfile

lab: $(VENV)/.dev  ## Open JupyterLab on the tutorials
	$(BIN)/jupyter lab --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/tutorials $(LAB_FLAGS)

docs: $(VENV)/.dev  ## Render the site to _docs/ (open _docs/index.html)
	$(BIN)/python tools/docs.py

export: $(VENV)/.dev  ## After an edit: notebooks to modules, notebooks cleaned, README made
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/docs.py --readme

build: $(VENV)/.made  ## Build the wheel into dist/
	@rm -rf build
	$(BIN)/python -m pip wheel --disable-pip-version-check -q --no-deps -w dist .
	@rm -rf build
	@ls -l dist

venv: $(VENV)/.dev  ## Make the environment in .venv with everything that developers need

clean:  ## Remove what was built (not the environment: that is `rm -r .venv`)
	rm -rf build dist _docs _proc $(DEMO) .pytest_cache .hypothesis
	find ftkit nbs tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is younger than what it was made from, or it is made again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo >&2 \
	  "ftkit needs Python 3.10 or newer, and '$(PYTHON)' is not. Name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  "'$(PYTHON)' cannot make environments: install its venv package (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade pip
	@touch $@

$(VENV)/.run: $(PACKAGE) $(VENV)/.made
	@echo "Installing ftkit and what it runs on into $(VENV): some minutes, once."
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(PACKAGE) $(VENV)/.made
	@echo "Installing ftkit and what its developers use into $(VENV): some minutes, once."
	$(PIP) -e ".[dev]"
	@touch $(VENV)/.run $@
