PYTHON ?= python3
VENV := .venv
# Versions are the newest that fit, unless a file says otherwise. Where those fail:
# make -B setup CONSTRAINTS=requirements/known-good.txt
CONSTRAINTS :=
BIN := $(VENV)/bin
# glibc gives freed activations back to the system and faults them in again; see docs/limits.md
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000

# two processes share the cores
test test-slow coverage: export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test test-slow test-all test-lowest coverage docs live javascript check fmt clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/ee-surgery demo --out runs/demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist load -m slow

test-all: test test-slow

# The oldest versions that pyproject.toml allows, in an environment of their own (7 GB); before each release.
test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=requirements/lowest.txt

# Hours on two cores; goes on where it stopped.
coverage: setup
	$(BIN)/python -m benchmarks.coverage
	$(BIN)/python -m benchmarks.coverage --architectures

# The site, in runs/site; a warning is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The runtime of docs/live and of tests/export/test_javascript.py, by npm; tests take other folders from EE_SURGERY_NODE_MODULES.
NODE := runs/node
javascript: $(NODE)/node_modules

$(NODE)/node_modules: requirements/javascript.json
	mkdir -p $(NODE) && cp $< $(NODE)/package.json
	npm install --prefix $(NODE) --ignore-scripts --no-package-lock --no-audit --no-fund
	touch $@

# The site with its live page, which runs an exported file in the browser.
live: javascript
	mkdir -p docs/live/ort
	cp $(addprefix $(NODE)/node_modules/onnxruntime-web/dist/ort,.wasm.min.mjs -wasm-simd-threaded.mjs -wasm-simd-threaded.wasm) docs/live/ort/
	$(MAKE) docs

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest runs
