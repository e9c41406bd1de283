# make run     fine-tune a real model on real files, federated: the recipe quickstart
# make test    format, lint, types and tests, as CI runs them
# make bench   speed of the engines against HF Trainer + PEFT, side by side: minutes
# All need only Python 3.11 or later; what else is needed is installed into .venv on first use.

VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test bench install clean

run: install
	$(BIN)/fedloom run quickstart

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2

bench: install
	$(BIN)/python bench/engines.py --shape smollm2-135m
	$(BIN)/python bench/engines.py --shape opt-350m --steps 2

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt scripts/install
	scripts/install $(VENV)
	touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache
