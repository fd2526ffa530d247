# Every target sets up what it needs: the environment lives in .venv and is reused while requirements.txt is unchanged.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/requirements.installed
DEMO_DIR ?= demo
# Files of tests side by side: most of a test is one process that waits for another, or one core of Triton's interpreter. In the order
# of their names: files of one long test would come last otherwise, when nothing is left to do beside them.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
# Kernels without a GPU: read when they are made, hence a run of its own.
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)
GPU_DIR ?= runs/gpu

.PHONY: env test test-long test-slurm lint demo bench gpu clean
env: $(STAMP)

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unfold needs Python >= 3.11, this is " + sys.version.split()[0])'
	@command -v g++ >/dev/null || { echo "unfold needs g++ (Debian/Ubuntu: apt-get install g++)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	@# Byte code on all cores; pip makes it on one. Files of packages that are meant for other Pythons fail.
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	@touch $@

lint: env
	$(BIN)/ruff check .

test: env lint
	$(PYTEST) -m "not long and not slurm" tests
	$(INTERPRETED) -m "interpreted and not long" tests/kernels

test-long: env
	$(PYTEST) tests
	$(INTERPRETED) -m interpreted tests/kernels

# On a SLURM cluster made for it on this machine (root); skipped, with the reason, where none can be had.
test-slurm: env
	$(BIN)/python -m pytest -rs -m "slurm and not long" tests/launch

demo: env
	BIN=$(BIN) DEMO_DIR=$(DEMO_DIR) bash launch/demo.sh

bench: env
	$(BIN)/python -m tests.benchmarks.compressed_cpu

# Everything that only a GPU can tell, in about ten minutes; without a GPU the course of it, in small. `make demo` makes its data. On a
# machine without a network: python -m tests.benchmarks.gpu --help.
gpu: env
	test -d $(DEMO_DIR)/shards || { echo "make demo first: training reads its tokenizer and shards" >&2; exit 1; }
	$(BIN)/python -m tests.benchmarks.gpu --data $(DEMO_DIR) --output $(GPU_DIR)

clean:
	rm -rf $(DEMO_DIR) .pytest_cache .ruff_cache
