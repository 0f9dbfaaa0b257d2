# `make run` and `make test` need only Python >= 3.11 and make; everything else is set up here, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test check bench clean setup

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@echo "== setting up $(VENV) (several GB of packages the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --require-hashes -r requirements.lock
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --no-deps --editable .
	@touch $(READY)

run: $(READY)  ## install, fetch the default model's text tower and the language model, serve on 127.0.0.1:8000
	@$(BIN)/headstart models pull default smollm2
	@$(BIN)/headstart serve

test: $(READY)  ## the whole test suite, on the CPU
	@$(BIN)/headstart models pull
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q

check: $(READY)  ## formatting, lint, types, import directions
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY)  ## every benchmark that runs on this machine; prints the tables of docs/benchmarks.md
	@$(BIN)/headstart models pull
	@for script in $(filter-out bench/drawing.py bench/timing.py bench/traces.py bench/llm_load.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## remove what make made, not the weights in ~/.cache/headstart
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
