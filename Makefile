# Every target works in a fresh clone: the first one run builds .venv, with the native operators where there is a C++
# compiler, and again when their sources or pyproject.toml changed.
PYTHON ?= python3
WORKERS ?= 2
TORCH := torch==2.13.0

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check bench e2e sanitize clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

NATIVE := $(wildcard src/openm3/ops/*/*.cpp src/openm3/ops/*/*.h)

$(STAMP): pyproject.toml CMakeLists.txt $(NATIVE)
	@echo "installing openm3 and $(TORCH) into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q "$(TORCH)"
	@$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@

demo: $(STAMP) ## ask the bundled model three questions about a real long document
	@$(BIN)/python examples/demo.py

test: $(STAMP) ## run every test but e2e
	$(BIN)/python -m pytest -q -n $(WORKERS)

check: $(STAMP) ## format, lint, types and guards
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/guards

bench: $(STAMP) ## measure this machine: every script in bench/
	@for script in $(wildcard bench/*.py); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

e2e: $(STAMP) ## run the long tests on the bundled model
	$(BIN)/python -m pytest -q -m e2e

# A second environment with .venv's packages but an openm3 of its own: Python reads no .pth file that another one leads to.
SANITIZED := build/sanitized
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

sanitize: $(STAMP) ## run the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PYTHON) -m venv --without-pip $(SANITIZED)
	$(BIN)/python $(PURELIB) > "$$($(SANITIZED)/bin/python $(PURELIB))/packages.pth"
	$(BIN)/python -m pip --python $(SANITIZED)/bin/python install -q --no-deps --force-reinstall \
	  -C cmake.define.OPENM3_SANITIZE=ON .
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(SANITIZED)/bin/python -m pytest -q -n $(WORKERS) tests/ops

clean: ## remove builds and caches, keep .venv
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests examples bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
