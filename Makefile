# `make run` and `make test` set up what they need; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test sanitize check lint types results clean

run: $(VENV)/.ready  ## answer from the bundled document with a 2-bit cache, beside the 16-bit cache
	$(BIN)/bitkv generate --demo --compare

test: $(VENV)/.ready  ## all tests
	$(BIN)/python -m pytest

sanitize: $(VENV)/.ready  ## the native kernels under AddressSanitizer and UBSan
	$(BIN)/python -m pytest -m sanitize

check: lint types

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

results: $(VENV)/.ready  ## measure again what README and docs/results.md show
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf $(VENV)

# the constraints pin torch to a build that needs no GPU; the package itself accepts newer ones
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard bitkv/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plot,dev]"
	touch $@
