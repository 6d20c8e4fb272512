# `make help` lists the targets. Each one that needs the environment makes it first; a stamp file says it is there.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/peers
CONFIG ?= configs/local.yaml
# Whole files go to each of two processes, in the suite's own order (tests/conftest.py: FilesAndFolders).
TEST_WORKERS ?= -n 2 --dist loadscope --no-loadscope-reorder
# Extra arguments for pip, such as an index of CPU-only torch wheels: see the README's "A CPU-only torch".
PIP_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo serve serve-s3 test test-ceph test-modal deploy modal-smoke modal-coldstart lint typecheck check format bench bench-peers clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(STAMP) ## Make the environment in .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "wan-serve needs Python 3.11 or newer: make PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Start the service, make eight clips (out/demo-1.mp4 …, out/demo.png), stop the service
	@$(BIN)/wan-serve demo --config $(CONFIG)

serve: $(STAMP) ## Run the service on 127.0.0.1:8000 until Ctrl-C
	@exec $(BIN)/wan-serve serve --config $(CONFIG)

serve-s3: $(STAMP) ## As serve, with clips in an S3 bucket (ministack on loopback; for development)
	@PYTHONPATH=tests exec $(BIN)/python -m s3_servers.serve

test: $(STAMP) ## Run all tests, with real Ray and real diffusers
	$(BIN)/python -m pytest $(TEST_WORKERS) $(PYTEST_ARGS)

test-ceph: $(STAMP) ## Run the store's contract, and the service, on Ceph RGW; says what to install where it is missing
	$(BIN)/python -m pytest -m ceph $(PYTEST_ARGS)

test-modal: $(STAMP) ## Deploy to a Modal on loopback and run its containers; part of `make test`
	$(BIN)/python -m pytest tests/integration/test_modal_*.py $(PYTEST_ARGS)

deploy: $(STAMP) ## Deploy to Modal: see the README's "On Modal"
	@$(BIN)/python -m serve_graph.on_modal.preflight
	$(BIN)/modal deploy -m serve_graph.modal_app

modal-smoke: $(STAMP) ## Check the deployed service: health, a clip, its bytes, its expiry
	$(BIN)/modal run -m serve_graph.modal_app::smoke

modal-coldstart: $(STAMP) ## Measure cold starts of the deployed generator (out/coldstart.md)
	$(BIN)/modal run -m serve_graph.modal_app::coldstart

lint: $(STAMP) ## Lint, and check the format and the import layers; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(STAMP) ## Check the types (mypy, strict)
	$(BIN)/mypy

check: lint typecheck ## Everything that CI checks before the tests

format: $(STAMP) ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure; writes benchmarks/results/
	PYTHONPATH=tests $(BIN)/python -m benchmarks.run
	PYTHONPATH=tests $(BIN)/python -m benchmarks.jobs

# The peers' packages lie above the project's, in an environment that sees both, so that neither changes the other.
$(PEERS)/.installed: $(STAMP) benchmarks/peers/requirements.txt
	$(BIN)/python -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt \
	  -r benchmarks/peers/requirements.txt
	@touch $@

bench-peers: $(PEERS)/.installed ## Measure beside FastAPI, LitServe and cog; BENCH_ARGS=--quick tries it
	PYTHONPATH=tests $(BIN)/python -m benchmarks.peers.run --python $(PEERS)/bin/python $(BENCH_ARGS)

clean: ## Remove the environment and everything built; clips and records under data/ stay
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
