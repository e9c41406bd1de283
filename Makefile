# make run           fine-tune a real model on real files, federated: the recipe quickstart
# make check         format, lint, types, pages and their links
# make test          the tests: one of everything that matters
# make test-all      those, and what repeats or waits: with make check, all that CI runs
# make check-models  every family of models tried against training by hand, and docs/models.md written: four minutes
# make pages         write what the pages say of the code (a test says when they are out of date)
# make docs          the pages as a site, into build/site; a link that leads nowhere fails it
# make soak          faults and deployments at length: a thousand kills at random instants, processes killed and resumed
# make bench         the engines against HF Trainer + PEFT and Flower's simulation, memory, start-up, what Flower costs: an hour
# make study         the published experiment, replayed: what is not done yet of it, and docs/study.md; over an hour
# make dist          the commit's wheel and sdist, what they are to be installed with, an SBOM, and the hashes of it all
# All need only Python 3.11 or later; what else is needed is installed into .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
ORACLES := .tools/oracles
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --only-binary :all:

# Whatever the environment says, bytecode is kept: the tests start hundreds of processes that would compile fedloom anew.
export PYTHONDONTWRITEBYTECODE :=

# Packages that some tests need and that no other test may see: PEFT imports bitsandbytes wherever it finds it.
WITH_ORACLES = PYTHONPATH=$(abspath $(ORACLES)) $(BIN)/pytest -q $$(grep -rlF --include="*.py" "pytest.mark.oracles(" tests)

.PHONY: run check lint types test test-all check-models pages docs soak bench study study-page dist install clean

run: install
	$(BIN)/fedloom run quickstart

check: lint types docs

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

test: install
	$(BIN)/pytest -q -n 2 --dist loadgroup

test-all: install $(ORACLES)/installed
	$(BIN)/pytest -q -n 2 --dist loadgroup -m "not slow and not oracles"
	$(WITH_ORACLES) -n 2 --dist loadgroup -m "oracles and not slow"

# FAMILIES="llama mistral" tries those, and writes nothing.
check-models: install
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python scripts/check_models.py $(FAMILIES)

pages: install
	$(BIN)/python scripts/write_pages.py

docs: install
	$(BIN)/python scripts/write_pages.py --check
	$(PIP) -r requirements/docs.txt
	$(BIN)/python scripts/build_site.py

soak: install $(ORACLES)/installed
	FEDLOOM_RANDOM_KILLS=1000 $(BIN)/pytest -q -n 2 --timeout 3600 -m "not oracles" tests/faults
	$(BIN)/pytest -q -m "slow and not oracles" --ignore tests/faults
	$(WITH_ORACLES) -m "oracles and slow"

bench: install
	$(PIP) -r requirements/bench.txt
	$(BIN)/python bench/engines.py --shape smollm2-135m --more-clients 1 8 32
	$(BIN)/python bench/engines.py --shape opt-350m --steps 2 --more-clients 1 8 32
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/processor.py
	$(BIN)/python bench/clients.py
	$(BIN)/python bench/evaluation.py
	$(BIN)/python bench/generation.py
	$(BIN)/python bench/deployment.py

# TIER=small and TIER=full are larger models: hours, and a GPU.
study: install
	$(BIN)/python studies/experiment/study.py $(TIER)

study-page: install
	$(BIN)/python studies/experiment/study.py page

dist: install
	scripts/dist $(BIN)/python dist

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(wildcard requirements/*.txt) scripts/install
	scripts/install $(VENV)
	touch $@

$(ORACLES)/installed: requirements/oracles.txt | install
	rm -rf $(ORACLES)
	@$(PIP) --target $(ORACLES) -r requirements/oracles.txt && touch $@ || { rm -rf $(ORACLES); \
		echo "no bitsandbytes and no opacus: the tests that need them are skipped"; }

clean:
	rm -rf $(VENV) dist build .cache .tools .pytest_cache .mypy_cache .ruff_cache
