# Every target sets up what it needs in $(VENV). The machine needs only python3 (3.11 or newer) with venv, and make.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
# Test processes for two cores: those with Slurm tests wait for their jobs.
TEST_PROCESSES ?= 3
BUSI ?= $(or $(MGCC_DATA),../shared/data)/Dataset_BUSI_with_GT

BIN := $(VENV)/bin
RUN := $(BIN)/python -m
MGCC := $(BIN)/mgcc
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready

DEMO := $(OUT)/demo
BUSI_OUT := $(OUT)/demo-busi

.PHONY: help setup demo demo-busi test test-cluster lint docs clean

help:
	@echo "make setup      virtual environment in $(VENV), with everything installed"
	@echo "make demo       the complete pipeline on built-in phantom data, 6 minutes on two CPU cores"
	@echo "make demo-busi  the same on BUSI (MGCC_DATA=folder that holds Dataset_BUSI_with_GT)"
	@echo "make test       all tests"
	@echo "make test-cluster  long tests of Slurm: time limits, dead nodes, cut networks; root on Debian or Ubuntu, half an hour"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation site in $(OUT)/site"
	@echo "make clean      remove $(VENV), what the demos made in $(OUT), and caches; your own runs stay"

setup: $(READY)

# torch first and by its exact version: then nothing that depends on it brings another build.
$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON) is not Python 3.11 or newer. Name one: make setup PYTHON=python3.11"; exit 1; }
	@echo "installing into $(VENV): about 3 GB, minutes without output"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,kernels,slurm,deepspeed]'
	touch $(READY)

demo: $(READY)
	$(MGCC) shards phantom --count 400 --size 64 --out $(DEMO)/shards
	$(MGCC) shards split --root $(DEMO)/shards --out $(DEMO)/split.json --validation 0.3 --labeled 0.5 --seed 0
	$(MGCC) ldm --preset demo --data.shards $(DEMO)/shards --data.split $(DEMO)/split.json --out $(DEMO)/ldm
	$(MGCC) segment --preset mgcc_demo --data.shards $(DEMO)/shards --data.split $(DEMO)/split.json \
	    --data.synthetic $(DEMO)/ldm/samples --out $(DEMO)/mgcc
	$(MGCC) segment --preset unet_demo --data.shards $(DEMO)/shards --data.split $(DEMO)/split.json \
	    --out $(DEMO)/unet
	$(MGCC) report $(DEMO) --out $(DEMO)/report.html

demo-busi: $(READY)
	$(MGCC) shards busi --root $(BUSI) --out $(BUSI_OUT)/shards --size 128
	$(MGCC) ldm --preset busi_small --data.shards $(BUSI_OUT)/shards --out $(BUSI_OUT)/ldm
	$(MGCC) segment --preset mgcc_busi_small --data.shards $(BUSI_OUT)/shards \
	    --data.synthetic $(BUSI_OUT)/ldm/samples --out $(BUSI_OUT)/mgcc
	$(MGCC) segment --preset unet_busi_small --data.shards $(BUSI_OUT)/shards --out $(BUSI_OUT)/unet
	$(MGCC) report $(BUSI_OUT) --out $(BUSI_OUT)/report.html

# Tests start ranks of their own, one thread each; more threads than cores would only slow them down. Without cached
# bytecode every process would compile the package again, and in a new clone the first ones at the same time; loading
# pytest's plugins compiles all of hypothesis.
test: $(READY)
	env -u PYTHONDONTWRITEBYTECODE $(RUN) compileall -q benchmarks kernels mgcc_dist slurm
	env -u PYTHONDONTWRITEBYTECODE PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 $(RUN) pytest -p xdist \
	    -n $(TEST_PROCESSES) --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

test-cluster: $(READY)
	OMP_NUM_THREADS=1 $(RUN) pytest -m cluster tests/slurm $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Offline: no fonts, scripts or other files from elsewhere. A broken link or reference is an error.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir $(abspath $(OUT))/site
	@echo "open $(OUT)/site/index.html"

$(DOCS_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_READY)

clean:
	rm -rf $(VENV) $(OUT)/site $(DEMO) $(BUSI_OUT) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
