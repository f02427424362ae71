# make demo    the whole method in the miniature clinic, on a CPU
# make test    the test suite; make test-ranks: the distributed tests on eight processes
# Both make a virtual environment in .venv first; nothing but Python 3.11 or newer is needed.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test test-ranks

demo: .venv/ready
	$(BIN)/python medee.py demo $(ARGS)

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -ra -n 2 --dist loadfile tests $(ARGS)

test-ranks: .venv/ready-dev
	MEDEE_RANKS=8 $(BIN)/python -m pytest -q -ra tests/test_ranks.py $(ARGS)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
