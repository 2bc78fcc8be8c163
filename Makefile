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

# Other people's clients, for e2e alone: some 1.5 GB. A variable that names one that is there spares its installation.
E2E := build/e2e
export OPENM3_E2E_NPM ?= $(E2E)/node_modules/.bin
export OPENM3_E2E_LM_EVAL ?= $(E2E)/lm-eval/bin/lm_eval
export OPENM3_E2E_AIPERF ?= $(E2E)/aiperf/bin/aiperf

$(E2E)/node_modules/.bin:
	@command -v npm > /dev/null || echo "without npm the tests of Claude Code and Codex are skipped"
	@! command -v npm > /dev/null || npm install --prefix $(E2E) --no-audit --no-fund --loglevel=error \
	  @anthropic-ai/claude-code@2.1.197 @openai/codex@0.169.0

$(E2E)/lm-eval/bin/lm_eval: PACKAGE := lm_eval[api]==0.4.13
$(E2E)/aiperf/bin/aiperf: PACKAGE := aiperf==0.13.0
$(E2E)/lm-eval/bin/lm_eval $(E2E)/aiperf/bin/aiperf:
	@$(PYTHON) -m venv $(@D)/..
	@$(@D)/python -m pip install -q "$(PACKAGE)"

e2e: $(STAMP) $(OPENM3_E2E_NPM) $(OPENM3_E2E_LM_EVAL) $(OPENM3_E2E_AIPERF) ## run the long tests and real clients on the bundled model
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
