# `make help` lists the targets. PYTHON chooses the interpreter (3.11 or 3.12), TORCH the build of torch.
PYTHON ?= python3
TORCH ?= auto
VENV := .venv
BIN := $(VENV)/bin
CLIPS ?= 200
BENCH_CLIPS ?= 10000
READY := $(VENV)/ready

export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-cluster test test-slow test-faults check lint types imports bench bench-adapter bench-cache bench-dtypes bench-plan bench-train bench-tune replay lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## virtual environment with the locked packages; installs a compiler where Debian has none

$(READY): requirements/lock.txt requirements/dev.txt requirements/cuda.txt requirements/install.sh pyproject.toml
	@requirements/system.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	TORCH=$(TORCH) requirements/install.sh $(VENV)
	@touch $@

demo: setup  ## the main job on the laptop: clips, features, adapter, scores (CLIPS=200)
	@PATH="$(CURDIR)/$(BIN):$$PATH" jobs/demo.sh $(CLIPS)

demo-cluster: setup  ## the same by crab submit, on a cluster of real processes on this machine (10 clips)
	@PYTHONPATH=$(CURDIR)/tests $(BIN)/python tests/cluster/demo.py

test: setup  ## all tests but the slow ones and the full fault suite
	$(BIN)/pytest -q -m "not slow and not faults"

test-slow: setup  ## tests that take minutes each
	$(BIN)/pytest -q -m slow

test-faults: setup  ## the full fault suite: processes killed, answers lost, disks full, 100,000 simulated histories
	$(BIN)/pytest -q -m faults

check: lint types imports test  ## what CI runs

lint: setup  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup  ## mypy: strict for crab_platform and jobs
	$(BIN)/mypy

imports: setup  ## import-linter: the arrows between the packages
	$(BIN)/lint-imports

bench: bench-cache bench-dtypes bench-plan bench-train bench-tune  ## all benchmarks

bench-train: setup  ## adapter, ZeRO-3, Ray Train, batches, waiting for data, checkpoints, each beside its peers
	@status=0; for part in adapter_layer train_zero train_batches train_reading train_checkpoint; do \
	  PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/$$part.py || status=1; done; exit $$status

bench-tune: setup  ## sweeps: what a trial costs, what ASHA and the cache save
	@status=0; for part in tune_overhead tune_asha tune_cache; do \
	  PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/$$part.py || status=1; done; exit $$status

bench-adapter: setup  ## the part of bench-train that is about the interaction LoRA's layer, PEFT's and a loop over heads
	$(BIN)/python benchmarks/adapter_layer.py

bench-dtypes: setup  ## bytes, errors and speed of every stored type and codec, on features of real clips
	PYTHONPATH=. $(BIN)/python benchmarks/feature_dtypes.py

bench-cache: setup  ## the cache beside raw sockets, s3fs, boto3, pyarrow, lance, webdataset, safetensors (BENCH_CLIPS=10000)
	@benchmarks/peers.sh $(BIN)/python work/bench/peers
	@status=0; for part in read lookup latency warm; do \
	  PYTHONPATH=$(CURDIR):$(CURDIR)/work/bench/peers $(BIN)/python benchmarks/cache_$$part.py \
	    $$(test $$part = warm && echo --clips $(BENCH_CLIPS)) || status=1; done; exit $$status

bench-plan: setup  ## plan of 1,000,000 clips against a real store: seconds, memory, requests
	$(BIN)/python benchmarks/plan_scale.py

replay: setup  ## one history of the cache simulation, by its seed: make replay SEED=123
	PYTHONPATH=tests $(BIN)/python -m simulation.run --seed $(SEED) --trace

lock: setup  ## resolve requirements/*.txt anew from pyproject.toml
	$(BIN)/python requirements/make_lock.py

clean:  ## remove the environment, caches and everything under work/
	rm -rf $(VENV) work .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
