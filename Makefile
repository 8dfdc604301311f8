# The environment: the active virtual or conda environment (conda's base left alone), else .venv here.
ifneq ($(VIRTUAL_ENV),)
ENV := $(VIRTUAL_ENV)
else ifneq ($(filter-out base,$(CONDA_DEFAULT_ENV)),)
ENV := $(CONDA_PREFIX)
else
ENV := .venv
endif
PYTHON ?= python3
PY := "$(ENV)/bin/python"
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -rs --durations=10 -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all coverage test-browser test-pacs test-open test-colab notebooks render docs docs-links bench bench-open style clean

help:  ## list these targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  ##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## install everything into the active environment, or into .venv (once; 2 GB)
	@"$(PYTHON)" -m tools.setup_env "$(ENV)"

demo: setup  ## the whole story: run notebooks 01 to 04, print the results, leave HTML in runs/demo
	@$(PY) -m tools.demo

test: setup  ## run the tests that are not slow
	$(PYTEST) -m "not slow"

test-all: setup  ## run all tests, those that kill processes or wait as well
	$(PYTEST)

coverage: setup  ## which lines the tests reach, in per cent of each file
	$(PYTEST) -m "not slow" --cov=medctkit --cov-report=term

test-browser: setup  ## test the viewers in JupyterLab and voila; installs Chromium if there is none
	@rm -rf runs/browser
	@$(PY) tests/browser/chromium.py
	$(PY) -m pytest -rs tests/browser

test-pacs: setup  ## send phantoms through a PACS and back; installs Orthanc if there is none
	@$(PY) tests/deploy/orthanc.py
	$(PY) -m pytest -rs -m pacs tests/deploy/test_pacs.py

test-open: setup  ## test COLIPRI and Imaging Data Commons by their own packages, in a layer of 400 MB, .venv-open
	@$(PY) -m tools.open_env .venv-open
	OMP_NUM_THREADS=1 .venv-open/bin/python -m pytest -rs -m open tests/model tests/cohort

test-colab: setup  ## run notebooks 00 and 02 with the packages that Colab has (2 GB, minutes)
	MEDCTKIT_TEST_COLAB=runs/colab $(PY) -m pytest -rs tests/course/test_colab.py

notebooks: setup  ## run every notebook, exercises solved, on a third of the patients; fail where outputs differ in kind
	@$(PY) -m tools.notebooks check --every 3

render: setup  ## run every notebook from nothing and write it back with its outputs
	@$(PY) -m tools.notebooks render
	@$(PY) docs/course_map.py

docs: setup  ## build the documentation site into build/docs
	@$(PY) -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(PY) -m sphinx -c docs -b html -E -W --keep-going -q . build/docs

docs-links: setup  ## check the links that lead out of the site; needs a network
	@$(PY) -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(PY) -m sphinx -c docs -b linkcheck -E -q . build/links

bench: setup  ## measure speed and memory, check the bars, write bench/*.json: about 10 minutes
	@missed=; for part in data model memory gpu viewers phantoms base adapters; do \
		echo "bench/$$part.py"; $(PY) bench/$$part.py || missed="$$missed $$part"; \
	done; test -z "$$missed" || { echo "missed a bar, or failed:$$missed"; exit 1; }

bench-open: setup  ## measure three base models side by side, write bench/base_models.json: about 15 minutes
	@$(PY) -m tools.open_env .venv-open
	.venv-open/bin/python bench/base_models.py

style: setup  ## check lint, formatting, which wing imports which, and types, of notebooks too
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	"$(ENV)/bin/lint-imports"
	$(PY) -m mypy medctkit
	@$(PY) -m tools.notebooks types

clean:  ## remove caches and what demo and notebooks wrote; your own runs and .venv stay
	rm -rf runs/demo runs/notebooks runs/render runs/browser build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache \
		.hypothesis .coverage
	find medctkit tools tests notebooks bench -name __pycache__ -prune -exec rm -rf {} +
