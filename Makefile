# make setup | run | test | lint | clean. Another Python: make setup PYTHON=python3.12. More: docs/SETUP.md.
PYTHON ?= python3
SETUP ?=
BIN := .venv/bin

.PHONY: setup run test lint clean

setup: ## .venv with fairway and its tools; a second call is instant
	@$(PYTHON) scripts/setup.py $(SETUP)

run: setup ## the whole way, from text to a score
	$(BIN)/fairway run recipes/pocket.toml

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## what can be made again; the runs stay
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
