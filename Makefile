# Every target that runs code does the set-up first: `make demo` and `make test` work on a fresh clone.
.DEFAULT_GOAL := help
.PHONY: help setup demo test check quick matrix lint

PYTEST_WORKERS ?= 2
RUN := .venv/bin

# Tests start many processes on few cores: one thread each. Nothing is ever fetched from a hub.
test quick matrix: export OMP_NUM_THREADS := 1
test quick matrix demo: export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with Python 3.12 and the pinned dependencies (EXTRAS="cuda wandb": more of pyproject's extras)
	@launch/bootstrap.sh $(EXTRAS)

demo: setup ## train LoRA on a real model, two pipeline stages on the CPU, and ask it a question before and after
	@$(RUN)/python -m launch.demo

test: setup ## run every test but the full matrix of families and layouts
	$(RUN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist worksteal -m "not nightly"

matrix: setup ## run that matrix too: every family at every layout (hours on two cores)
	$(RUN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist worksteal -m nightly

check: setup ## run the quick tests, ruff and pyright: for working
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line lint quick

quick: setup
	$(RUN)/python -m pytest -q -n $(PYTEST_WORKERS) --dist worksteal -m "not slow and not nightly"

lint: setup ## run ruff and pyright
	$(RUN)/ruff check
	$(RUN)/pyright
