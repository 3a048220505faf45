# Everything runs in an environment of its own: `make test VENV=/somewhere PYTHON=python3.12` chooses another one.
# On a machine without a GPU `PIP_EXTRA_INDEX_URL` may point pip at an index of CPU builds of torch.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/quickstart.yaml
STUDY ?= configs/studies/reduced.yaml
JOBS ?= 2

run := $(VENV)/bin
pip := $(run)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# Two test processes with one thread each: many small tensors gain nothing from more. A file stays in one process.
pytest := OMP_NUM_THREADS=1 $(run)/python -m pytest --numprocesses $(JOBS) --dist loadfile

.PHONY: help train profile study test test-all parity dev lint clean

help:
	@echo "make train     train the quick start recipe (CONFIG=..., ARGS='--trainer.max_steps 100')"
	@echo "make profile   print what each update of a recipe costs, and write a record (CONFIG=..., ARGS='--against adamw,muon')"
	@echo "make study     compare optimizers on several recipes, with a search of rates (STUDY=..., ARGS='--jobs 8')"
	@echo "make test      run the tests (JOBS=2, ARGS='tests/rules')"
	@echo "make test-all  run the slow tests too, and those for a GPU where there is one"
	@echo "make parity    compare every strategy with one process, and write the record (ten minutes)"
	@echo "make dev       install for development"
	@echo "make lint      check style and types"
	@echo "make clean     remove caches and built files; the environment $(VENV) stays"

train: $(VENV)/.train-installed
	$(run)/lit-symopt fit --config $(CONFIG) $(ARGS)

profile: $(VENV)/.train-installed
	$(run)/lit-symopt profile --config $(CONFIG) $(ARGS)

study: $(VENV)/.study-installed
	$(run)/lit-symopt study --config $(STUDY) $(ARGS)

test: $(VENV)/.dev-installed
	$(pytest) $(ARGS)

test-all: $(VENV)/.dev-installed
	$(pytest) -m "" $(ARGS)

# The slow half of the tests of strategies, kept: the README's table is made from it.
parity: record := profiles/records/parity
parity: $(VENV)/.dev-installed
	mkdir -p $(record)
	rm -f $(record)/errors.jsonl
	LIT_SYMOPT_PARITY=$(CURDIR)/$(record)/errors.jsonl OMP_NUM_THREADS=1 $(run)/python -m pytest -m slow tests/sharding/test_parity_all.py $(ARGS)
	$(run)/python profiles/parity.py > $(record)/README.md

dev: $(VENV)/.dev-installed

lint: $(VENV)/.dev-installed
	$(run)/ruff check
	$(run)/ruff format --check
	$(run)/mypy

clean:
	rm -rf build dist lit_symopt.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: packages that compile against it (deepspeed) import it while they are built.
$(VENV)/.torch-installed: constraints.txt
	test -x $(run)/python || $(PYTHON) -m venv $(VENV)
	$(pip) torch
	touch $@

$(VENV)/.train-installed: pyproject.toml $(VENV)/.torch-installed
	$(pip) --editable .
	touch $@

$(VENV)/.study-installed: pyproject.toml $(VENV)/.torch-installed
	$(pip) --editable ".[study]"
	touch $@

$(VENV)/.dev-installed: pyproject.toml $(VENV)/.torch-installed
	$(pip) --editable ".[dev]"
	touch $@
