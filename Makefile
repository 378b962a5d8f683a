# make help lists the targets. Every one that needs an environment sets it up first (make setup).
SHELL := /bin/bash
.DEFAULT_GOAL := help

# The Python to set up with; where it has torch and Detectron2 already, also the one that is used.
PYTHON ?= python3
# The environment's own Python: known only after `make setup`, so asked for when a recipe uses it.
ENV_PYTHON = $(shell $(PYTHON) tools/setup_env.py --which)

# Test processes. Each has one thread: on small machines that is faster than sharing.
JOBS ?= $(shell n=$$(nproc); echo $$(( n > 8 ? 8 : n )))
PYTEST_ARGS ?=
BENCHMARK_ARGS ?=
SHARED_DATASETS := $(abspath ../shared/data/datasets)
ifneq ($(wildcard $(SHARED_DATASETS)),)
export DETECTRON2_DATASETS ?= $(SHARED_DATASETS)
endif

SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help setup quickstart test benchmark sanitize cuda docs docs-check wheel compat lock lint format clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Options: PYTHON=python3.12  JOBS=4  PYTEST_ARGS='-k roi_pool'  BENCHMARK_ARGS=--quick  V=1 (let pip speak)"

setup:  ## an environment (yours, or .venv) with torch, Detectron2 and this plugin; quick when it is there
	@command -v $(PYTHON) > /dev/null || { echo "setup: $(PYTHON) not found: install Python 3.10 or newer (Debian and Ubuntu: apt-get install python3 python3-venv), or name one by PYTHON=..."; exit 1; }
	@$(PYTHON) tools/setup_env.py

quickstart: setup  ## train, evaluate and show a deformable R-FCN on the embedded data set (9 to 13 minutes on 2 cores)
	@$(ENV_PYTHON) tools/quickstart.py

test: setup  ## all tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(ENV_PYTHON) -m pytest -q -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

benchmark: setup  ## operators and networks beside torchvision, ONNX Runtime and dense convolutions (10 minutes, alone)
	@$(ENV_PYTHON) -W ignore -m benchmarks.run $(BENCHMARK_ARGS)

sanitize: setup  ## the operators' tests, many more examples, on kernels that AddressSanitizer and UBSan watch (an hour or more)
	@$(ENV_PYTHON) -W ignore tools/sanitize.py --jobs $(JOBS) $(SANITIZE_ARGS)

cuda: setup  ## on a GPU machine: builds, tests, sanitizes and benchmarks the CUDA operators; JSON in output/cuda
	@$(ENV_PYTHON) tools/check_cuda.py $(CUDA_ARGS)

docs: .venv-docs/ready  ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "docs: open $(CURDIR)/build/site/index.html"

docs-check: setup  ## runs every command and Python example of the documentation (37 minutes beside other work)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(ENV_PYTHON) -W ignore tools/check_docs.py

.venv-docs/ready: docs/requirements.txt
	@echo "docs: making .venv-docs with MkDocs"
	@$(PYTHON) -m venv .venv-docs && .venv-docs/bin/pip install -q --disable-pip-version-check --require-hashes -r $<
	@touch $@

wheel: setup  ## one wheel for every Python and every torch from 2.10 on, in dist/, tried in two clean environments
	@$(ENV_PYTHON) tools/build_wheel.py
	@$(ENV_PYTHON) tools/compat.py pinned oldest --wheel dist -- tests/ops tests/layers tests/test_import.py

compat: setup  ## all tests in other stacks: newest and oldest torch, Python 3.10 to 3.13 (hours; COMPAT_ARGS=oldest)
	@$(ENV_PYTHON) tools/compat.py $(COMPAT_ARGS)

lock:  ## requirements.lock and docs/requirements.txt anew, after a change of constraints.txt or setup.py
	@$(ENV_PYTHON) tools/lock_requirements.py

lint: setup  ## formatting, ruff, mypy, clang-format: reports, changes nothing
	@python=$(ENV_PYTHON); failed=; \
	check() { echo "lint: $$*"; "$$@" || failed="$$failed $$1"; }; \
	ruff() { "$$python" -m ruff "$$@"; }; mypy() { "$$python" -m mypy "$$@"; }; \
	clang-format() { "$${python%/*}/clang-format" "$$@" $(SOURCES); }; \
	check ruff format --check --quiet .; check ruff check --quiet .; check mypy; \
	check clang-format --dry-run -Werror; \
	[ -z "$$failed" ] || { echo "lint: failed:$$failed"; exit 1; }

format: setup  ## rewrites the sources as lint wants them
	@$(ENV_PYTHON) -m ruff check --fix-only --quiet . && $(ENV_PYTHON) -m ruff format .
	@$(dir $(ENV_PYTHON))clang-format -i $(SOURCES)

clean:  ## removes what was built and cached; .venv and output/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis d2_deform/_C*.so d2_deform/_C_build.json
	find d2_deform tools tests -name __pycache__ -type d -exec rm -rf {} +
