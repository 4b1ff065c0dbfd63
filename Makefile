# Two commands for newcomers: `make demo` and `make test`. Both make .venv and install into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint bench gpu clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[cpu,hf,eval,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/saap demo --out demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cpu

# On a GPU machine the environment is the user's own: torch with CUDA, triton, transformers, pytest.
gpu:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) demo build *.egg-info
