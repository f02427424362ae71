# make demo    the whole method in the miniature clinic, on a CPU
# make test    the test suite
# Both make a virtual environment in .venv first; nothing but Python 3.11 or newer is needed.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test

demo: .venv/ready
	$(BIN)/python medee.py demo $(ARGS)

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -ra tests $(ARGS)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
