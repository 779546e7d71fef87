# Two commands matter: `make train` and `make test`. Both do all the set-up on a fresh machine, in .venv.
# Pass options on:  make train ARGS="--set rounds=4"      make test ARGS="tests/wan -x"

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: train test machine lint format proto campaign fuzz bench clean

train: .venv/.ready
	$(BIN)/nebula run trainers/code_moe.py --clusters clusters/laptop.yaml $(ARGS)

test: .venv/.ready-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# What the tests marked `machine` need of Debian. Tries the package lists that are there before it fetches new ones.
INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --no-install-recommends \
    datefudge iproute2 nftables postgresql >/dev/null
machine:
	@$(INSTALL) || { apt-get update --quiet=2 && $(INSTALL); }

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/.ready-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --mypy_out=quiet:. \
	    --grpc_python_out=. --mypy_grpc_out=quiet:. protos/nebula/proto/v1/*.proto

# The long one: ten thousand seeded runs, then a power cut at every step of every disk.
campaign: .venv/.ready-dev
	$(BIN)/nebula sim --seeds 10000 --clusters 4
	$(BIN)/nebula sim --crashes

# Seconds. Compiled loops check their bounds here, and are cached apart from those that do not.
TIME ?= 60
FUZZ := build/fuzz
fuzz: .venv/.ready-fuzz
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=$(FUZZ)/compiled PYTHONPATH=. \
	    $(BIN)/python tests/attacks/fuzz.py $(FUZZ)/corpus $(TIME)

bench: .venv/.ready-dev
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/bytes.py
	$(BIN)/python benchmarks/codec.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/rejoin.py
	$(BIN)/python benchmarks/quorum.py

clean:
	rm -rf .venv *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# A torch that the machine already has (a GPU build, usually) is used as it is: .venv sees the machine's packages, and the
# torch line is taken out of the constraints. Otherwise pip installs the pinned one.
HAS_TORCH := -c 'import sys, importlib.metadata as m; v = m.version("torch").split("."); \
    sys.exit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null

.venv/constraints.txt: constraints.txt
	if $(PYTHON) $(HAS_TORCH); then $(PYTHON) -m venv --system-site-packages .venv; else $(PYTHON) -m venv .venv; fi
	if $(BIN)/python $(HAS_TORCH); then grep -v '^torch==' constraints.txt > $@; else cp constraints.txt $@; fi

.venv/.ready: .venv/constraints.txt pyproject.toml
	$(BIN)/pip install --quiet --constraint .venv/constraints.txt --editable '.[ray]'
	touch $@

.venv/.ready-dev: .venv/.ready
	$(BIN)/pip install --quiet --constraint .venv/constraints.txt --editable '.[ray,dev]'
	touch $@

.venv/.ready-fuzz: .venv/.ready-dev
	$(BIN)/pip install --quiet --constraint .venv/constraints.txt --editable '.[ray,dev,fuzz]'
	touch $@
