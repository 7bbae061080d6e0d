# `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A `uv` on the PATH is used as it is; otherwise pip installs one into .cache, beside the project and
# outside every environment, so that a Python whose packages belong to the system stays untouched.
UV := $(shell command -v uv || echo .cache/uv/bin/uv)
# Each process would compile torch and Megatron anew, which takes longer than importing them.
unexport PYTHONDONTWRITEBYTECODE
# The launchers' interpreter has another use for this name.
unexport PYTHON
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)

.PHONY: help env lock quickstart study test test-slow first-gpu lint format check docs dist canary bench bench-gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ {printf "%-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

.cache/uv/bin/uv:
	$(PYTHON) -m pip install --quiet --target .cache/uv uv

env: $(VENV)/.installed ## create or update .venv (idempotent)

$(VENV)/.installed: requirements.lock setup.py pyproject.toml | $(filter .cache/%,$(UV))
	$(UV) venv --quiet --allow-existing --python '>=3.12,<3.14' $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

lock: | $(filter .cache/%,$(UV)) ## resolve setup.py into requirements.lock
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.12 --all-extras --no-header \
	  --no-emit-index-url --no-emit-find-links setup.py -o requirements.lock

lint: env ## ruff, ruff format, mypy strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: env ## corpus, tokenizer, dataset, pretraining on two processes, sample
	CORPUS="$(CORPUS)" PYTHON_BIN=$(BIN)/python examples/quickstart.sh

study: env ## the smoke study: data, plan, two workers, report (CORPUS=... for your own text)
	CORPUS="$(CORPUS)" PYTHON_BIN=$(BIN)/python examples/study_data.sh
	$(BIN)/python tools/study.py plan studies/smoke.yaml
	OMP_NUM_THREADS=1 $(BIN)/python tools/study.py run studies/smoke.yaml & \
	  OMP_NUM_THREADS=1 $(BIN)/python tools/study.py run studies/smoke.yaml; wait $$!
	$(BIN)/python tools/study.py report studies/smoke.yaml --results runs/study/smoke/report

# A file's tests stay in one worker, as they share launches; conftest.py puts the longest first.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile \
  --no-loadscope-reorder --durations 25 --durations-min 3

test: lint ## lint and every test that is not marked slow, in three workers: each waits now and then
	$(TEST) -m "not slow"

QUICK := $(addprefix tests/golden/test_,golden.py refusals.py) tests/unit/layers tests/unit/routers \
  $(addprefix tests/unit/test_,arguments.py config_file.py options.py structure.py the_suite.py)

check: lint ## lint and the quick tests: the inner loop
	$(TEST) -m "not slow" $(QUICK)

test-slow: env ## the rest of the matrices, and tests that take minutes
	$(TEST) -m slow

first-gpu: env ## on a machine with a CUDA device: try everything and write a report of it
	PYTHONPATH=tests:. $(BIN)/python -m support.first_gpu $(FIRST_GPU)

docs: env ## the site, into build/docs; a broken link or docstring fails
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs $(or $(HTML),build/docs)

dist: | $(filter .cache/%,$(UV)) ## source distribution and wheel, into build/dist
	rm -rf build/dist
	$(UV) build --quiet --out-dir build/dist
	$(UV) tool run twine check --strict build/dist/*

# Of Megatron-LM's sources; their index builder is compiled, which a wheel has done.
DATASETS = $(MEGATRON)/megatron/core/datasets
INCLUDES := import sysconfig as s; print('-I' + s.get_path('include'), \
  '-I' + s.get_path('purelib') + '/torch/include')
SUFFIX := import sysconfig as s; print(s.get_config_var('EXT_SUFFIX'))

canary: env ## contract, golden losses and layouts against Megatron's sources in MEGATRON=DIR
	$(if $(wildcard $(DATASETS)/helpers.cpp),,$(error MEGATRON=DIR must name sources of Megatron-LM))
	$(CXX) -O3 -shared -std=c++17 -fPIC $$($(BIN)/python -c "$(INCLUDES)") \
	  $(DATASETS)/helpers.cpp -o $(DATASETS)/helpers_cpp$$($(BIN)/python -c "$(SUFFIX)")
	PYTHONPATH=$(abspath $(MEGATRON)) $(BIN)/python -W ignore -c \
	  "import megatron.core as m; print('Megatron', m.__version__, 'of', m.__file__)"
	PYTHONPATH=$(abspath $(MEGATRON)) $(TEST) -m "not slow" tests/contract tests/golden \
	  tests/invariants/test_layouts.py

# OpenBLAS uses this processor's kernels, whatever the shell asks for.
bench: env ## every benchmark, into benchmarks/results/
	env -u OPENBLAS_CORETYPE $(BIN)/python benchmarks/run_all.py

bench-gpu: env ## on a machine with a CUDA device: speed of all systems in bf16, and of kernels
	$(BIN)/python benchmarks/bench_gpu.py
	$(BIN)/python benchmarks/bench_gpu_kernels.py

clean: ## remove what the targets made
	rm -rf $(VENV) .cache runs build *.egg-info
