# The front door: every command here works as the first one after `git clone`, with Python >= 3.10 and nothing else.
# Paths are relative on purpose, so a checkout may lie in a folder with spaces.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart test check docs browser outputs prepare hooks clean

BIN := .venv/bin
export PYTHON
export PYTHONNOUSERSITE = 1

# Two workers that compute and one for files that mostly wait; a test file each, the long ones first (tests/conftest.py).
LANES := -n 3 --dist loadfile --no-loadscope-reorder

# Of two cores one would be idle while one command runs; the first failure ends both.
BESIDE := $(BIN)/python tools/beside.py

# Checks use no network, and one thread a process: workers share two cores and results do not depend on the machine.
test check docs browser: export HF_HUB_OFFLINE = 1
test check docs browser: export HF_DATASETS_OFFLINE = 1
test check docs browser: export TOKENIZERS_PARALLELISM = false
test check docs browser: export OMP_NUM_THREADS = 1
test check docs browser: export DS_ACCELERATOR = cpu
# Modules are compiled once, not by each of a hundred processes.
test check docs browser: export PYTHONDONTWRITEBYTECODE =

help: ## show this list
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1 | \2/p' Makefile | while IFS='|' read -r t d; do printf '  %-12s%s\n' $$t "$$d"; done
	@echo 'PYTHON=/path/to/python chooses the Python that .venv is made from.'

quickstart: ## train, evaluate and report a small VLM on this machine (BAKE=1: from nothing at all)
	@tools/env.sh base
	$(BIN)/tinyllava quickstart $(if $(BAKE),--bake) $(ARGS)

test: ## every check: pip, clean and exported tree, lint, notebooks, pytest
	@tools/env.sh dev
	$(BESIDE) '$(BIN)/python -m pip check' '$(BIN)/python tools/tree.py'
	$(BESIDE) '$(BIN)/python tools/nb_lint.py nbs' '$(BIN)/python tools/notebooks.py --do_print --timing --n_workers 2'
	$(BIN)/python -m pytest -q $(LANES) tests

check: ## the inner loop, under 3 minutes: tree, lint, changed notebooks, fast tests
	@tools/env.sh dev
	$(BIN)/python tools/tree.py
	$(BESIDE) '$(BIN)/python tools/nb_lint.py nbs' '$(BIN)/python tools/changed.py'
	$(BIN)/python -m pytest -q $(LANES) -m 'not slow' tests

docs: ## render the notebooks as a site into _docs/ (offline, no Quarto)
	@tools/env.sh dev docs onnx
	$(BIN)/python tools/docs.py

browser: docs ## the site and the demo in Chromium (apt-get install chromium, or .venv/bin/playwright install chromium)
	@tools/env.sh dev docs onnx browser
	$(BIN)/python -m pytest -q -rs tests/test_browser.py tests/test_demo.py

outputs: ## run notebooks again in place and clean them: make outputs NB=nbs/00_core.ipynb
	@test -n "$(NB)" || { echo 'say which: make outputs NB=nbs/00_core.ipynb (several: NB="a.ipynb b.ipynb")' >&2; exit 1; }
	@tools/env.sh dev
	$(BIN)/python tools/outputs.py $(if $(FLAGS),--flags "$(FLAGS)") $(NB)

prepare: ## before a commit: export, clean, sidebar, README, lint
	@tools/env.sh dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/sidebar.py
	$(BIN)/python tools/readme.py
	$(BIN)/python tools/nb_lint.py nbs

hooks: ## let git merge notebooks cell by cell and check them at every commit
	@tools/env.sh dev
	git config --local include.path ../.gitconfig
	git config --local core.hooksPath tools/hooks

clean: ## remove what was built, except runs/ (ALL=1: .venv too)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .hypothesis $(if $(ALL),.venv)
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
