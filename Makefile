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

.DEFAULT_GOAL := help
.PHONY: help setup demo test notebooks bench style clean

help:  ## list these targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  ##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## install everything into the active environment, or into .venv (once; 2 GB)
	@"$(PYTHON)" -m medctkit.setup_env "$(ENV)"

demo: setup  ## the whole story: run notebooks 01 to 04, print the results, leave HTML in runs/demo
	@$(PY) -m medctkit.demo

test: setup  ## run the tests
	$(PY) -m pytest -rs --durations=10

notebooks: setup  ## run every notebook, leave HTML in runs/notebooks
	@$(PY) -m medctkit.demo --all --output-dir runs/notebooks

bench: setup  ## measure speed and memory, check the bars, write bench/*.json: about 6 minutes
	$(PY) bench/data.py
	$(PY) bench/model.py
	$(PY) bench/memory.py
	$(PY) bench/gpu.py

style: setup  ## check lint and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

clean:  ## remove caches and what demo and notebooks wrote; your own runs and .venv stay
	rm -rf runs/demo runs/notebooks build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find medctkit tests notebooks -name __pycache__ -prune -exec rm -rf {} +
