# Two commands do everything: `make train` and `make test`. Both are only the commands that you would type yourself.
PYTHON ?= python3
VENV := .venv
LATEST := $(VENV)-latest
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
SHELL_FILES := .ci/run tests/slurm/slurm-sim $(wildcard slurm/*.sh)
WORKERS ?= 2
RANKS ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

export PATH := $(abspath $(VENV))/bin:$(PATH)
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
export PYTHONWARNINGS := ignore

.DEFAULT_GOAL := help
.PHONY: help setup train test test-latest test-slow lint bench golden faults support metrics clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## .venv with pinned dependencies

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: setup ## sample data, a tiny Phi-3-V trained under ZeRO-3, scores, export, report
	python launch/prepare.py sample --out data/catalogue
	python launch/prepare.py tiny --out data/tiny-phi3v
	deepspeed --num_accelerators $(RANKS) launch/train.py --config launch/configs/quickstart.yaml
	python launch/export.py runs/quickstart
	python launch/report.py runs/quickstart

test: setup lint ## lint, types and every behaviour, in minutes
	OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n $(WORKERS)

# In an environment of its own and without constraints.txt. First it lists what is not of the pinned version.
test-latest: ## every behaviour with the newest versions that setup.cfg allows
	rm -rf $(LATEST)
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(LATEST)/bin/python -m pip freeze --exclude-editable | grep --invert-match --line-regexp --ignore-case \
	  --fixed-strings --file=constraints.txt || true
	PATH=$(abspath $(LATEST))/bin:$$PATH TORCH_EXTENSIONS_DIR=$(abspath $(LATEST))/torch_extensions OMP_NUM_THREADS=1 \
	  python -m pytest -m "not slow" -n $(WORKERS)

test-slow: setup ## long trials
	OMP_NUM_THREADS=1 python -m pytest -m slow --timeout 3600

lint: setup
	ruff check .
	ruff format --check .
	mypy
	python tests/declared.py $(VENV)/declared
	deptry phi3v_dist launch
	shellcheck $(SHELL_FILES)
	shfmt --diff --indent 2 $(SHELL_FILES)

bench: setup ## side-by-side ratios, into bench.json
	OMP_NUM_THREADS=1 python tests/bench/run.py --out bench.json

golden: setup ## largest differences from the published code, beside what is tolerated
	OMP_NUM_THREADS=1 python tests/golden_table.py

faults: setup ## docs/faults.md: each fault, and the tests that show what happens then
	OMP_NUM_THREADS=1 python tests/fault_table.py

support: setup ## docs/support.md: which settings are tested, and on what
	OMP_NUM_THREADS=1 python tests/support_table.py

metrics: setup ## docs/metrics.md: every number that a run may log
	python tests/metrics_table.py

clean: ## what make train made; .venv stays
	rm -rf data/catalogue data/tiny-phi3v runs/quickstart
