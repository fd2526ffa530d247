# Every target sets up what it needs: the environment lives in .venv and is reused while requirements.txt is unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/requirements.installed
DEMO_DIR ?= demo

.PHONY: env test test-long test-slurm lint demo bench clean
env: $(STAMP)

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unfold needs Python >= 3.11, this is " + sys.version.split()[0])'
	@command -v g++ >/dev/null || { echo "unfold needs g++ (Debian/Ubuntu: apt-get install g++)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

lint: env
	$(BIN)/ruff check .

test: env lint
	$(BIN)/python -m pytest -m "not long and not slurm" tests

test-long: env
	$(BIN)/python -m pytest tests

# On a SLURM cluster made for it on this machine (root); skipped, with the reason, where none can be had.
test-slurm: env
	$(BIN)/python -m pytest -rs -m "slurm and not long" tests/launch

demo: env
	BIN=$(BIN) DEMO_DIR=$(DEMO_DIR) bash launch/demo.sh

bench: env
	$(BIN)/python -m tests.benchmarks.compressed_cpu

clean:
	rm -rf $(DEMO_DIR) .pytest_cache .ruff_cache
