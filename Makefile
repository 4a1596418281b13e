# make demo | test | lint | format | reference | clean | help.  PYTHON=python3.12 make test chooses the interpreter of a
# new .venv; a .venv that is there is used, and installed into again only when what it was installed from has changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DEMO_RUNS := runs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format reference clean

help:
	@echo 'make demo       a timed run of digits_2c2d with Adam and the standard panel, in about a minute'
	@echo 'make test       ruff, mypy and the test suite'
	@echo 'make lint       ruff and mypy only'
	@echo 'make format     let ruff rewrite what it can'
	@echo 'make reference  write docs/instruments.md anew from what the instruments declare'
	@echo 'make clean      remove caches and builds; .venv and runs stay'
	@echo 'A missing .venv is made with PYTHON ($(PYTHON)); 192 MB are downloaded on a CPU, about 3 GB with CUDA.'

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'expected Python 3.11 or newer as $(PYTHON); choose one with PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A .venv made by uv has no pip of its own.
PIP = { $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip; } && $(PY) -m pip

$(BASE): pyproject.toml constraints.txt requirements.txt | $(PY)
	$(PIP) install -r requirements.txt
	@touch $@

$(DEV): pyproject.toml constraints.txt requirements-dev.txt | $(PY)
	$(PIP) install -r requirements-dev.txt
	@touch $@ $(BASE)

demo: $(BASE)
	$(VENV)/bin/cockpit-bench run digits_2c2d --algorithm adam --panel standard --threads 1 --again --runs $(DEMO_RUNS)
	@echo
	@printf 'picture   ' && $(VENV)/bin/cockpit-bench plot $(DEMO_RUNS)
	@echo 'The run folder is named above. Next:'
	@echo '  .venv/bin/cockpit-bench show $(DEMO_RUNS)'
	@echo '  .venv/bin/cockpit-bench dash $(DEMO_RUNS)'

test: lint
	$(PY) -m pytest

lint: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

reference: $(DEV)
	$(PY) docs/generate_reference.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find cockpit_bench instruments workloads tests docs examples -name __pycache__ -type d -prune -exec rm -rf {} +
