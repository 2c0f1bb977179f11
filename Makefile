# One set of commands for people and for CI. Needs Python 3.11 or newer, make and
# a package index; everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# MLX's backend: Metal on a Mac, elsewhere cpu, cuda12 or cuda13.
BACKEND ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
comma := ,
EXTRAS := dev$(if $(BACKEND),$(comma)$(BACKEND))
# The reference BLAS of MLX's CPU wheel is 30 times slower than OpenBLAS, so use
# that where it is installed (Debian: libopenblas0-pthread).
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))
RUN := PATH="$(BIN):$$PATH" $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS))

# The oldest mlx-lm that pyproject.toml allows.
OLDEST_MLX_LM := $(shell sed -n 's/.*"mlx-lm>=\(.*\)",/\1/p' pyproject.toml)
# Two processes, each with a group of tests at a time. They share the cores, so that
# BLAS has one thread in each.
PARALLEL := OPENBLAS_NUM_THREADS=1 $(RUN) python -m pytest -n 2 --dist loadfile \
	--no-loadscope-reorder
# Of these `make test-long` tries three times as many examples.
FUZZED := $(addprefix tests/,reliability/test_bad_bytes.py reliability/test_mending.py \
	store/test_eviction.py store/test_lookup.py)
SOAK_SECONDS ?= 1800

# Where the benchmarks write what they measured, and the plots of it.
MEASURED ?= docs/benchmarks

.PHONY: help demo test test-long coverage oldest soak lint format bench bench-plots models clean

help:
	@echo "make demo    run the main job with the embedded default model"
	@echo "make test    run the tests, one representative of what is tried many times"
	@echo "make test-long  run the rest of them"
	@echo "make coverage run the tests, and tell which lines they do not reach"
	@echo "make oldest  try the server with the oldest mlx-lm that is supported"
	@echo "make soak    run the long forms of the tests, three quarters of an hour"
	@echo "make lint    check style, types and generated docs"
	@echo "make format  mend style and generated docs"
	@echo "make bench   measure, side by side with mlx-lm"
	@echo "make bench-plots  draw what it measured"
	@echo "make models  try every architecture of mlx-lm, and write docs/models.md"
	@echo "make clean   remove the virtual environment"

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/.installed
	$(RUN) docs/examples/demo.sh

test: $(VENV)/.installed
	$(PARALLEL) -m 'not long and not alone'
	$(RUN) python -m pytest -m 'not long and alone'

test-long: $(VENV)/.installed
	$(PARALLEL) -m 'long and not alone'
	FUZZ=3 $(PARALLEL) $(FUZZED)
	$(RUN) python -m pytest -m 'long and alone'

# Apart from the tests, because counting lines slows them down.
coverage: $(VENV)/.installed
	$(RUN) python -m pytest --cov -m 'long or not long'

# Everything else stays as it is: only mlx-lm's own code decides.
oldest: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade \
		--target $(VENV)/oldest 'mlx-lm==$(OLDEST_MLX_LM)'
	PYTHONPATH="$(CURDIR)/$(VENV)/oldest" $(RUN) python -m pytest -q \
		tests/engine/test_mlx_lm.py tests/server/test_serve.py \
		-m 'long or not long' -k 'mlx_lm or restart or read_once or options or draft'

soak: $(VENV)/.installed
	$(RUN) python -m tests.reliability.soak --seconds $(SOAK_SECONDS)
	$(RUN) python -m tests.reliability.soak_processes

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) cog --check docs/cli-reference.md

format: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .
	$(RUN) cog -r docs/cli-reference.md

bench: $(VENV)/.installed
	$(RUN) python -m benchmarks.restore --json $(MEASURED)/restore.json
	$(RUN) python -m benchmarks.lookup --json $(MEASURED)/lookup.json
	$(RUN) python -m benchmarks.chat --json $(MEASURED)/chat.json
	$(RUN) python -m benchmarks.overhead --json $(MEASURED)/overhead.json
	$(RUN) python -m benchmarks.ttft --json $(MEASURED)/ttft.json
	$(RUN) python -m benchmarks.serve --json $(MEASURED)/serve.json

bench-plots: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[plots]'
	$(RUN) python -m benchmarks.plots $(MEASURED) $(MEASURED)

models: $(VENV)/.installed
	$(RUN) python -m tests.architectures.conformance --write docs/models.md

clean:
	rm -rf $(VENV)
