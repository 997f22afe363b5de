# One-word commands. `make demo` and `make test` each do everything by themselves on a fresh machine that has
# Python 3.11 or newer: they share the environment .venv, which is made again when the pins or pyproject.toml change.

PYTHON ?= python3
BIN := .venv/bin
DEMO := src/layerlake/demo

.DEFAULT_GOAL := help
.PHONY: help .venv demo test lint docs demo-models clean

help:  ## list the targets
	@sed -n 's/^\([a-z.-]*\):.*## /\1\t/p' Makefile | expand -t 14

# A stamp, because the time of the folder itself changes with every `pip install` into it.
.venv: .venv/.stamp  ## make the environment: the pins, and all extras that the demo and the tests need
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("layerlake needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[capture,s3,dev]"
	@touch $@

demo: .venv/.stamp  ## capture two small models, analyse them, write demo-lake/ and demo-report.html
	$(BIN)/layerlake demo

test: .venv/.stamp  ## run the tests, all but those marked slow
	$(BIN)/pytest -q -n auto --dist loadfile

lint: .venv/.stamp  ## ruff, import contracts, mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: .venv/.stamp  ## write the command line's reference again
	$(BIN)/python docs/cli_reference.py > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

demo-models: .venv/.stamp  ## train the two models of the demo again
	mkdir -p docs/training
	$(BIN)/python -m layerlake.demo.train gpt2 --out $(DEMO)/stdlib-gpt2 --log docs/training/stdlib-gpt2.json
	$(BIN)/python -m layerlake.demo.train neox --out $(DEMO)/stdlib-neox --log docs/training/stdlib-neox.json

clean:  ## remove what the other targets made, and keep .venv and the demo's models
	rm -rf build dist *.egg-info demo-lake demo-report.html .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find analyze benchmarks capture catalog sql src tests -name __pycache__ -type d -prune -exec rm -rf {} +
