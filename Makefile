# Two commands for a fresh machine: `make tour` (see it work) and `make test` (check it). The rest is for developers.
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 2

.PHONY: tour tour-full test test-slow test-fuzz test-faults test-compile settings format clean
tour: .venv/ready
	$(PY) -m train.tour --out runs/tour

tour-full: .venv/ready
	$(PY) -m train.tour --out runs/tour-full --full

test: .venv/ready
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

# wrong settings, command lines and files by the thousand: at most 6 minutes on two cores
test-fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -m fuzz

# runs that are killed, starved and poisoned: at most 10 minutes on two cores
test-faults: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -m faults

test-compile: .venv/ready
	$(PY) -m kernels.compile

# configs/README.md from the schema
settings: .venv/ready
	$(PY) -m mclr.configs.page

format: .venv/ready
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .

.venv/ready: pyproject.toml
	@test "$$(uname)" = Linux || { echo "this Makefile needs Linux"; exit 2; }
	@command -v git >/dev/null || { echo "git is missing: install it first"; exit 2; }
	@command -v c++ >/dev/null || { echo "a C++ compiler (c++) is missing: install g++ first"; exit 2; }
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "python3 >= 3.11 is missing: install it first"; exit 2; }
	@python3 -c 'import venv, ensurepip' 2>/dev/null || { echo "the venv module of python3 is missing: install python3-venv first"; exit 2; }
	@python3 -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { echo "the headers of python3 are missing: install python3-dev first"; exit 2; }
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[dev]' --config-settings editable_mode=compat
	@touch $@

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache .mypy_cache
