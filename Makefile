# Two commands: `make demo` and `make test`. Each does its own set-up; nothing is installed outside
# .venv but the converted model in ~/.cache/llmco2. Needs Python >= 3.11 with venv, git, make, gcc.

SHELL := /bin/sh
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# The first that runs and is new enough: a name on PATH may be a shim for a version not installed.
PYTHON ?= $(shell for name in python3.11 python3 python3.12 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
PORT ?=
MODEL ?=
DEMO = $(BIN)/llmco2 demo $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL))

.PHONY: help env model demo serve test test-fast prometheus observability panels pictures lint bench matrix lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

env: ## build .venv from requirements.lock, unless it is there already
	@test -n "$(PYTHON)" || { echo "make env: no Python 3.11 or newer found; run: apt install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) dev/environment.py

model: env ## convert the demo's model, once, into the cache
	@$(BIN)/llmco2 model

demo: env ## real model, real server, real requests: what did they cost? (PORT=, MODEL=)
	@$(DEMO)

serve: env ## the demo's server, left up until Ctrl-C (PORT=, MODEL=)
	@$(DEMO) --serve

test: lint model prometheus ## everything: lint, types, all tests with vLLM's engine and server
	@$(BIN)/python -m pytest

test-fast: env ## the tests that start neither an engine nor a server
	@$(BIN)/python -m pytest -m "not engine and not server"

prometheus: env ## Prometheus and promtool from Debian's packages into .cache; without them their tests are skipped
	-@$(BIN)/python dev/prometheus.py

observability: model prometheus ## Prometheus scrapes real servers: every panel has data, and is drawn in build/observability
	@$(BIN)/python -m pytest tests/dashboards tests/observability
	@$(MAKE) panels

panels: ## the dashboard's panels drawn by Grafana's UI library from the last make observability (Node, npm, Chromium)
	@command -v node >/dev/null && command -v npm >/dev/null || { echo "make panels: no Node; run: apt install nodejs npm" >&2; exit 1; }
	@node dev/panels/draw.mjs

pictures: env panels ## the README's two pictures of the dashboard
	@$(BIN)/python dev/panels/pictures.py

lint: env ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: env ## what the hook adds to a scheduler step, measured here
	@$(BIN)/python -m benchmarks.step_overhead

matrix: env ## the plugin under other vLLM versions, each in an environment of its own
	@$(BIN)/python -m benchmarks.matrix

lock: env ## resolve requirements.lock anew from what pyproject.toml asks for
	@$(BIN)/python dev/lock.py

clean: ## remove .venv and what tools left; the model in the cache stays
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
