# make demo    fine-tune a real model on this machine and use the result
# make test    all tests            make check   formatters, types, import direction
# make setup   the environment in .venv that the others need (they call it)
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODEL := runs/models/smollm2-135m-instruct
NATIVE := $(shell find csrc -type f) setup.py
PY := engine kernels tests benchmarks examples setup.py
CPP := $(shell find csrc tests/cuda_host examples -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo test check model format wheel clean

setup: .venv/.built

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'setting up .venv; this takes a few minutes, once (some more where nvcc is found)'
	$(PIP) install -q -c constraints.txt 'setuptools>=77' wheel 'pybind11>=2.12' torch
	@touch $@

.venv/.built: .venv/.installed $(NATIVE)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,demo,data,interop,embed]'
	@# A plain path as well: a finder alone would lose to any folder named leantune beside the script that is run.
	@printf '%s\n' "$(CURDIR)/engine" "$(CURDIR)/kernels" > \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/leantune_sources.pth"
	@touch $@

# The model of the demo; it is fetched once.
model: setup
	$(BIN)/python examples/demo/fetch_model.py --out $(MODEL)

demo: setup
	$(BIN)/python examples/demo/run.py --check

test: setup
	@$(MAKE) --no-print-directory model || echo 'without the real model, the tests that need it will skip'
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python -m pytest -q tests/test_layers.py

format:
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

wheel: setup
	$(PIP) wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info .venv/.built
	find kernels -name '*.so' -delete
