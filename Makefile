# Sets itself up: the first target that needs it makes .venv; later calls re-use it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: run test check fix bench audit clean-env

run: $(READY)  ## the whole job on built-in synthetic faces
	$(BIN)/omnifer run jobs/recipes/demo.yaml

test: $(READY)  ## all tests that need no data, cluster or GPU
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 20 --durations-min 3

check: $(READY)  ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p pipeline
	$(BIN)/lint-imports

fix: $(READY)  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## every benchmark, one after the other
	$(BIN)/python -m tests.bench.resume
	$(BIN)/python -m tests.bench.chaos
	$(BIN)/python -m tests.bench.odd_files
	$(BIN)/python -m tests.bench.formats
	$(BIN)/python -m tests.bench.selection
	$(BIN)/python -m tests.bench.memory
	$(BIN)/python -m tests.bench.scale_model
	$(BIN)/python -m tests.bench.cluster
	$(BIN)/python -m tests.bench.scoring_speed
	$(BIN)/python -m tests.bench.training_speed
	$(BIN)/python -m tests.bench.ferplus10
	$(BIN)/python -m tests.bench.distill
	$(BIN)/python -m tests.bench.semi
	$(BIN)/python -m tests.bench.weak
	$(BIN)/python -m tests.bench.active
	$(BIN)/python -m tests.bench.acquisition_scale

audit:  ## known weaknesses of the pinned packages; asks the package index, installs nothing into .venv
	@at=$$(mktemp -d) && trap 'rm -rf "$$at"' EXIT && $(PYTHON) -m venv "$$at" \
	&& "$$at/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit \
	&& "$$at/bin/pip-audit" --strict --no-deps --disable-pip --requirement constraints.txt

clean-env:
	rm -rf .venv

# The stamp is written last, so that an interrupted installation is done again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "OmniFER needs Python 3.11 or newer, %s is %s; try make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
