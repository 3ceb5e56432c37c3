# demo: see it answer · test: all · check: format, lint, types · bench: measure speed · slow: long · shapes: checked
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
USED := .venv/installed
TRIED := .venv/installed-all
TORCH := torch==2.13.0
SCENES ?= 60
WORKERS ?= 2
# The tower: where a float is asked for, an int will do.
CHECKED := torchfilm,beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

.PHONY: help demo test check bench slow shapes browser

help:
	@sed -n '1s/^# //p' Makefile

# What the demo runs with; then what the tests, checks and benchmarks need besides.
$(USED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[systems,serve,robots]'
	touch $@

$(TRIED): $(USED)
	$(BIN)/python -m pip install -q -e '.[systems,serve,robots,others,dev]'
	touch $@

demo: $(USED)
	$(BIN)/torchfilm eval visual_reasoning --scenes $(SCENES)
ifndef ONCE
	$(BIN)/torchfilm serve
endif

# One thread each: the workers share the cores.
test: $(TRIED) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m 'not slow and not gpu'

slow: $(TRIED) browser
	$(BIN)/python -m pytest -m slow

shapes: $(TRIED)
	$(BIN)/python -m pytest '--jaxtyping-packages=$(CHECKED)' -m 'not slow and not gpu' tests/test_*.py

check: $(TRIED)
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/pyright

# What needs neither data nor a trained network; the tables are filled from it.
bench: $(TRIED)
	@for file in benchmarks/*_speed.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done
	$(BIN)/python benchmarks/tables.py

# The page is tested in Chromium where there is one; as root on Debian it is fetched, else those tests are skipped.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
			apt-get update -qq >/dev/null 2>&1 && \
			DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null 2>&1; } || \
		echo "no Chromium with its driver: the tests of the page in a browser are skipped"
