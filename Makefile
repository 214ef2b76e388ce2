# make demo, make test and make lint set up everything they need in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test gpu lint lock clean

# Python 3.11 where there is one (the lock was made with it), any python3 >= 3.11 otherwise.
$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null && py=$(PYTHON) || py=python3; \
	 $$py -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }; \
	 test -x $(BIN)/python || $$py -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/python jobs/demo.py --root_dir demo_run

test: $(STAMP)
	$(BIN)/python -m pytest

# On a machine with a GPU and torch, with the python3 at hand (or PYTHON=…), not .venv. No Ray is needed; the script says what
# is missing, and exits 3 where there is no GPU (make makes a 2 of that).
gpu:
	$(if $(filter file,$(origin PYTHON)),python3,$(PYTHON)) tests/gpu/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The lock is what a fresh environment resolved to: edit pyproject.toml, `make lock`, then run the tests.
# The present lock keeps what need not change; delete a line of it to let that package move.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet -c requirements.lock -e '.[dev]' hatchling editables
	.venv-lock/bin/pip freeze --exclude-editable | sed -E '/^(nvidia|cuda|triton)/s/$$/; sys_platform == "linux"/' > requirements.new
	mv requirements.new requirements.lock && rm -rf .venv-lock

clean:
	rm -rf $(VENV) demo_run
