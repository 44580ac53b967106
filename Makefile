# make demo | make test | make lint | make bench: each sets up all it needs in .venv
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test slow lint bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# The main job on the embedded model: export, measure, package, verify.
demo: $(STAMP)
	$(BIN)/vitedge export --recipe deit_tiny_int8
	$(BIN)/vitedge bench build/deit_tiny_int8 --device cpu
	$(BIN)/vitedge package build/deit_tiny_int8 --device cpu --overwrite
	$(BIN)/vitedge verify deit_tiny_int8-cpu.zip

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# Trains and measures on real data; needs VITEDGE_DATA and VITEDGE_WEIGHTS.
slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 7200

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# vitedge's int8 against the libraries' plain documented calls, and its training loop against a plain one, side by side; nothing else may
# run on the machine.
bench: $(STAMP)
	$(BIN)/python benchmarks/compare_training.py
	$(BIN)/python benchmarks/compare_int8.py

clean:
	rm -rf $(VENV) build dist
