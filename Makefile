# Two commands: `make quickstart` shows what the package does, `make test` runs its tests.
# Both need Python >= 3.10 and make alone, and build their own virtual environment.
#
#   PYTHON  the interpreter to build it from      VENV   where it is
#   TORCH   what to install first, e.g. TORCH="torch==2.14.1 torchvision==0.29.1"; by default pip chooses
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
RUN ?= runs/quickstart

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart install dev test test-fast test-audioldm lint clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1: \2/p' $(MAKEFILE_LIST)

# A stamp file says which environment is complete, so that a second call installs nothing.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) $(TORCH))
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

# The audioldm package pins numpy 1.23 and librosa 0.9: a second, small environment that sees the first one's packages.
$(VENV)-audioldm/.installed: $(VENV)/.installed-dev
	$(BIN)/python -m venv $(VENV)-audioldm
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(VENV)-audioldm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz-first-environment.pth"
	$(VENV)-audioldm/bin/python -m pip install --quiet --disable-pip-version-check -e '.[audioldm]' 'matplotlib<3.9' 'contourpy<1.3'
	touch $@

install: $(VENV)/.installed ## build the virtual environment
dev: $(VENV)/.installed-dev ## the same with the tools for development

# The matrices of the quickstart and the tests are small: on a busy machine more threads than one only wait for each other.
quickstart test test-fast test-audioldm: export OMP_NUM_THREADS ?= 1

quickstart: $(VENV)/.installed ## train on the synthetic world, test, compare with the rivals
	$(BIN)/diffgap fit --config configs/quickstart.yaml --trainer.default_root_dir $(RUN)
	$(BIN)/diffgap test --config $(RUN)/config.yaml
	$(BIN)/diffgap compare --config $(RUN)/config.yaml --refiner $(RUN)/refiner
	@echo
	@echo "Look at:  $(RUN)/compare/compare.html   the table and the space before and after"
	@echo "          $(RUN)/refiner/               the refiner: DiffGAPRefiner.from_pretrained(\"$(RUN)/refiner\")"
	@echo "          $(BIN)/tensorboard --logdir $(RUN)"

# One process a core, at most four: a test file stays in one process, whose fixtures it shares.
PYTEST := python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.installed-dev ## the whole test suite
	$(BIN)/$(PYTEST)

test-fast: $(VENV)/.installed-dev ## without the tests marked slow
	$(BIN)/$(PYTEST) -m "not slow"

test-audioldm: $(VENV)-audioldm/.installed ## the tests that need the audioldm package, in an environment of its own
	$(VENV)-audioldm/bin/python -m pytest tests/integrations -k audioldm

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

clean: ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) $(VENV)-audioldm build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
