# make demo    the whole method in the miniature clinic, on a CPU
# make test    the test suite; make test-ranks: the distributed tests on eight processes
# make lint    ruff: format and rules, 100 columns
# All make a virtual environment in .venv first; nothing but Python 3.11 or newer is needed.
# LOCK= takes the newest versions that requirements.txt allows instead of those of requirements.lock.

PYTHON ?= python3
BIN = .venv/bin
LOCK ?= requirements.lock
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK:%=-c %)

.PHONY: demo test test-ranks lint lock

demo: .venv/ready
	$(BIN)/python medee.py demo $(ARGS)

test: .venv/ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra -n 2 --dist loadfile tests $(ARGS)

test-ranks: .venv/ready-dev
	MEDEE_RANKS=8 $(BIN)/python -m pytest -q -ra tests/test_ranks.py $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# after a green 'make LOCK= test': what it ran with, less a build's mark such as +cpu
lock: .venv/ready-dev
	head -2 requirements.lock > .venv/lock
	$(BIN)/python -m pip freeze --disable-pip-version-check | sed 's/+[a-z0-9]*$$//' >> .venv/lock
	mv .venv/lock requirements.lock

.venv/ready: requirements.txt $(LOCK)
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
