# make test       lint, types, compileall and the quick tests          (creates .venv)
# make test-slow  the tests marked slow                                (same .venv)
# make demo       text from a small model with a compressed cache      (creates .venv-demo, no torch)
# make demo MODEL=M  the same with a GGUF file, a folder or a name on the Hugging Face Hub
# make test-compile  every kernel and whole steps compiled for GPUs and TPUs that are not here (creates .venv-compile, 2 GB)
# make test-version JAX=0.11.2  generate() end to end on that JAX, which from 0.11 on needs Python 3.12 (creates .venv-jax-0.11.2)
# make test-x64  some of the quick tests under jax_enable_x64               (.venv)
# make benchmark  beside transformers, kvpress and, after `make benchmark-llama`, llama.cpp; hours (creates .venv-benchmark)
# make docs       the documentation as a site, in build/site           (creates .venv-docs)
# make lint       the static checks only
# make clean      removes what these targets made, virtual environments included
# PYTHON=... picks the interpreter; PYTEST_ARGS=..., DEMO_ARGS=... and BENCHMARK_ARGS=... are passed on.

SHELL := /bin/bash
.DEFAULT_GOAL := test

# The first interpreter in the supported range that really runs and can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
VENV_DEMO := .venv-demo
VENV_COMPILE := .venv-compile
VENV_BENCHMARK := .venv-benchmark
VENV_DOCS := .venv-docs
TEST_EXTRAS := hf,test
# Two processes: small programs compile on one core each. XDIST= runs the quick tests in one process.
XDIST := -n 2 --dist worksteal
# By file: the slow files keep the runs of the real model that their tests share.
XDIST_SLOW := -n 2 --dist loadfile
SLOW := slow and not compile
JAX = $(error say which: make test-version JAX=0.11.2)
# What turns 64 bits on in a whole process; tests/test_enable_x64.py compares the two ways in one.
X64_TESTS := tests/test_end_to_end.py tests/test_generate.py tests/test_sampling.py tests/test_batch_rows.py tests/kernels/test_recent_window.py
FOLDERS := diffkv_jax models pallas_kernels scripts tests
INSTALLED_BY := pyproject.toml requirements/constraints.txt requirements/data.txt requirements/kvpress.txt

# $(call install,venv,extras,more packages without their dependencies)
define install
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found: make PYTHON=/path/to/python"; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -qq -c requirements/constraints.txt -e '.[$(2)]'
	$(1)/bin/python -m pip install -qq --no-deps -r requirements/data.txt $(3)
	touch $@
endef

.PHONY: test test-slow test-compile test-version test-x64 demo benchmark benchmark-llama docs lint native clean

# Pyright has one core, the compiler of the native kernels the other.
test: $(VENV)/.installed
	$(MAKE) -j2 lint native
	$(VENV)/bin/python -m pytest -m "not slow and not compile" $(XDIST) $(PYTEST_ARGS)

test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m "$(SLOW)" $(XDIST_SLOW) $(PYTEST_ARGS)

test-compile: $(VENV_COMPILE)/.installed
	$(VENV_COMPILE)/bin/python -m pytest tests/aot -m compile $(XDIST) $(PYTEST_ARGS)

# Slow cases too: one of each implementation.
test-version:
	test -x .venv-jax-$(JAX)/bin/python || $(PYTHON) -m venv .venv-jax-$(JAX)
	.venv-jax-$(JAX)/bin/python -m pip install -qq -c requirements/constraints.txt -e '.[test-light]' jax==$(JAX) jaxlib==$(JAX)
	.venv-jax-$(JAX)/bin/python -m pytest tests/test_end_to_end.py $(XDIST) $(PYTEST_ARGS)

test-x64: $(VENV)/.installed
	JAX_ENABLE_X64=1 $(VENV)/bin/python -m pytest $(X64_TESTS) -m "not slow and not compile" $(XDIST) $(PYTEST_ARGS)

native: $(VENV)/.installed
	$(VENV)/bin/python -c 'from diffkv_jax.pallas_kernels.native.build import build_all; build_all()'

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python -m compileall -q $(FOLDERS)

demo: $(VENV_DEMO)/.installed
	$(VENV_DEMO)/bin/python scripts/demo.py $(if $(MODEL),--model "$(MODEL)") $(DEMO_ARGS)

benchmark: $(VENV_BENCHMARK)/.installed
	PYTHONPATH=scripts $(VENV_BENCHMARK)/bin/python -m benchmarks peers $(BENCHMARK_ARGS)

# Compiles llama.cpp for this processor: a quarter of an hour on two cores.
benchmark-llama: $(VENV_BENCHMARK)/.installed
	CMAKE_ARGS=-DGGML_NATIVE=ON $(VENV_BENCHMARK)/bin/python -m pip install -qq -c requirements/constraints.txt llama-cpp-python==0.3.36

docs: $(VENV_DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict

$(VENV)/.installed: $(INSTALLED_BY)
	$(call install,$(VENV),$(TEST_EXTRAS),-r requirements/kvpress.txt)

$(VENV_DEMO)/.installed: $(INSTALLED_BY)
	$(call install,$(VENV_DEMO),demo)

# The compilers exist for Linux x86-64 only; elsewhere the tests skip and say so.
$(VENV_COMPILE)/.installed: $(INSTALLED_BY) requirements/compile.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -qq --upgrade -c requirements/constraints.txt -e '.[test-light]'
	jax=$$($(@D)/bin/python -c 'from importlib.metadata import version; print(version("jax"))'); \
	$(@D)/bin/python -m pip install -qq --no-deps -r requirements/compile.txt jax-cuda13-plugin==$$jax jax-cuda13-pjrt==$$jax \
		|| test "$$(uname -sm)" != "Linux x86_64"
	touch $@

$(VENV_BENCHMARK)/.installed: $(INSTALLED_BY) requirements/benchmark.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -qq -c requirements/constraints.txt -r requirements/benchmark.txt -e '.[hf]'
	$(@D)/bin/python -m pip install -qq --no-deps -r requirements/data.txt -r requirements/kvpress.txt
	touch $@

# Reads the sources: the library itself is not installed.
$(VENV_DOCS)/.installed: requirements/docs.txt
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found: make PYTHON=/path/to/python"; exit 1; }
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -qq -r requirements/docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV_DEMO) $(VENV_COMPILE) $(VENV_BENCHMARK) $(VENV_DOCS) .venv-wheel .venv-newest .venv-jax-* build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find $(FOLDERS) -name __pycache__ -prune -exec rm -rf {} +
