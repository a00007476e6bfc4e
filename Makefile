# make demo   set up .venv, train a small GPT on the Python standard library, show what it writes
# make test   set up .venv, run the tests
# make help   the rest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*) CMakeLists.txt setup.py

.DEFAULT_GOAL := help
.PHONY: help demo test lint format fuzz bench gpu gpu-rehearsal clean

help:
	@echo "make demo    train a small GPT on the Python standard library's text and show what it writes"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  format the code"
	@echo "make fuzz    many random cases of every op against float64 (SEED=0 CASES=2000 ISA=best),"
	@echo "             200 of every CUDA kernel in the three builds of the emulator, and 5000 damaged checkpoints of every"
	@echo "             format; FUZZ=ops, FUZZ=emulation or FUZZ=formats for one of them;"
	@echo "             FUZZ=ranks: many processes, their curves, 30 kills, two hosts (half an hour);"
	@echo "             FUZZ=kernels: 300 launches of every Triton kernel on guarded pages, attention of every length"
	@echo "make bench   whole training steps beside eager PyTorch and, with LLMFAST_PEERS, the peers"
	@echo "make gpu     with an NVIDIA GPU: build, test, sanitize, tune and measure its kernels (GPU_FLAGS='--minutes 25 --full')"
	@echo "make gpu-rehearsal   the same stages without a GPU, on the CPU"
	@echo "make clean   remove everything that was built"

# One environment for everything; pinned by constraints.txt, rebuilt when the sources of the extension change.
$(VENV)/torch: constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	@touch $@

$(VENV)/ready: $(VENV)/torch pyproject.toml $(NATIVE)
	@echo "Building and installing llmfast into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/ready
	@rm -rf runs/demo
	@$(BIN)/llmfast pretrain --config examples/demo.toml
	@echo
	@$(BIN)/llmfast evaluate --checkpoint runs/demo --data runs/demo/data --baseline
	@echo
	@$(BIN)/llmfast generate --checkpoint runs/demo --max-new-tokens 120 --temperature 0.7 --seed 1 "def __init__(self"

test: $(VENV)/ready
	$(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

FUZZ ?= ops formats emulation
SEED ?= 0
ISA ?= best
fuzz: $(VENV)/ready
	$(if $(filter ops,$(FUZZ)),$(BIN)/python -m tests.ops.fuzz --cases $(or $(CASES),2000) --seed $(SEED) --isa $(ISA))
	$(if $(filter emulation,$(FUZZ)),$(BIN)/python tests/emulation/fuzz.py --cases $(or $(CASES),200) --seed $(SEED))
	$(if $(filter formats,$(FUZZ)),$(BIN)/python tests/interop/format_fuzz.py --cases $(or $(CASES),5000) --seed $(SEED))
	$(if $(filter ranks,$(FUZZ)),$(BIN)/python tests/ranks/curves.py)
	$(if $(filter ranks,$(FUZZ)),$(BIN)/python -m tests.ranks.kills --seed $(SEED))
	$(if $(filter ranks,$(FUZZ)),$(BIN)/python -m tests.ranks.hosts)
	$(if $(filter kernels,$(FUZZ)),.ci/triton_lane fuzz --launches $(or $(CASES),300) --seed $(SEED))

bench: $(VENV)/ready
	$(BIN)/python benchmarks/train_step.py

# With this machine's own Python and torch: no environment is made, nothing is fetched.
gpu:
	$(PYTHON) tools/gpu.py $(GPU_FLAGS)

# .ci/triton_lane leaves a Python that has Triton: there, its kernels run in Triton's interpreter.
gpu-rehearsal: $(VENV)/ready
	PATH=$(abspath $(BIN)):$$PATH $(firstword $(wildcard .ci/work/triton/bin/python) $(BIN)/python) \
	  tools/gpu.py --rehearse --again --minutes 30 --patience 5 $(GPU_FLAGS)

clean:
	rm -rf $(VENV) build dist .ci/work *.egg-info llmfast/*.so
