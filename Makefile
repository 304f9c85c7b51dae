# make md    liquid water with the shipped potential: sets up .venv, compiles nothing
# make test  the same set-up plus torch-cluster (compiled once), then the tests
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: md test clean

# glibc gives large blocks back after every use and gets them again page by page, a third of a step: keep them
md: export MALLOC_MMAP_THRESHOLD_ = 1073741824
md: export MALLOC_TRIM_THRESHOLD_ = 1073741824
md: .venv/package
	$(BIN)/python md_examples/02_langevin_water.py

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST)

.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/package: .venv/torch pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/test: .venv/package
	$(PIP) ninja setuptools wheel
	$(PIP) --no-build-isolation --editable ".[cluster,test]"
	touch $@

clean:
	rm -rf .venv
