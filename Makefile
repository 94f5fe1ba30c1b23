# make setup   create .venv and install the pinned, hashed requirements and the project
# make demo    the whole main job on procedural ultrasound; prints the path of a report
# make test    every test but the long ones and those for a GPU
# make lint    format, lint, types, known vulnerabilities of the pinned packages
# make bench   benchmarks at tiny width, results in benchmarks/results/
# make soak    long tests and fault campaigns, outside CI
# make lock    resolve the requirements again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
           --no-emit-index-url --no-annotate --no-header

.PHONY: setup demo test lint bench soak lock clean

setup: $(STAMP)

$(STAMP): requirements/uv.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/factory demo

# Two halves at once, of about the same time, a thread each.
HALF := tests/jobs tests/tune
test: export OMP_NUM_THREADS = 1
test: setup
	@log=$$(mktemp); $(BIN)/python -m pytest -m "not gpu and not soak" $(HALF) > $$log 2>&1 & half=$$!; \
	$(BIN)/python -m pytest -m "not gpu and not soak" tests $(HALF:%=--ignore=%); rest=$$?; \
	wait $$half; half=$$?; cat $$log; rm -f $$log; exit $$((rest | half))

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python requirements/audit.py requirements/cpu.txt

bench: setup
	$(BIN)/python benchmarks/synthesis.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/overhead.py

soak: setup
	FACTORY_KILL_RUNS=200 $(BIN)/python -m pytest tests/storage/test_kills.py
	$(BIN)/python -m pytest -m soak
	$(BIN)/python benchmarks/fault_campaign.py --runs 20
	$(BIN)/python benchmarks/soak.py --minutes 30
	$(BIN)/python benchmarks/scaling.py

lock: setup
	$(COMPILE) pyproject.toml --extra cpu -o requirements/cpu.txt
	$(COMPILE) pyproject.toml --extra gpu -o requirements/gpu.txt
	$(COMPILE) pyproject.toml --extra cpu --extra dev -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra cpu --extra dev --extra browse -o requirements/browse.txt
	echo uv | $(COMPILE) - -o requirements/uv.txt

clean:
	rm -rf $(VENV) build *.egg-info
