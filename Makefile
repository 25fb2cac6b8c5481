# Two commands matter: `make demo` and `make test`. Both need python3 (3.10-3.13), make and a package index, no more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.complete
# Threads that wait do not spin: beside another process that costs several times as much.
PASSIVE := OMP_WAIT_POLICY=PASSIVE
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PASSIVE)
TESTS ?= tests
TORCHAO_TESTS := tests/test_quantized.py tests/test_kinds.py tests/test_expert_columns.py
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder --durations 20

GAUDI_VENV := .venv-gaudi
GAUDI_READY := $(GAUDI_VENV)/.complete

.PHONY: help demo test test-long test-fast test-gaudi test-deepspeed test-torchao lint format docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       set up .venv and run the main job on the model that the repository ships"
	@echo "make test       set up .venv, lint, type-check and run every test but the long ones"
	@echo "make test-long  the tests that take minutes: learning on real data, ONNX graphs of all families, compiled models"
	@echo "make test-fast  the same tests without those marked slow, no lint (TESTS=tests/test_x.py for a part)"
	@echo "make test-gaudi contract tests of the Gaudi backend in .venv-gaudi, without a Gaudi"
	@echo "make test-deepspeed  the tests of DeepSpeed's ZeRO on the CPU (installs it into build/deepspeed)"
	@echo "make test-torchao  the tests of bases that torchao quantizes (installs it into build/torchao)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       write docs/cli.md from the commands' help"
	@echo "make format     let ruff rewrite what it can"
	@echo "make clean      remove .venv, caches and build outputs"
	@echo "PYTHON=python3.12 picks the interpreter that .venv is made with."

define require_python
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), expected Python 3.10-3.13. Name one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: $(PYTHON) has no venv module, expected one. On Debian and Ubuntu: apt install python3-venv." >&2; exit 2; }
endef

# .venv and .venv-gaudi are whole or absent. The stamp is written last and removed first: an installation that was
# interrupted leaves none, and the next run starts from an empty environment. With a stamp that is merely out of date pip
# only updates.
$(READY): pyproject.toml constraints.txt
	$(require_python)
	@test -f $@ || { echo "make: setting up $(VENV) (a few minutes: PyTorch is large)" >&2; $(PYTHON) -m venv --clear $(VENV); }
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# optimum-habana pins transformers 4.55, so it has an environment of its own. There is no Gaudi in it: tests/gaudi holds
# a stand-in for the hardware bridge.
$(GAUDI_READY): pyproject.toml constraints-gaudi.txt
	$(require_python)
	@test -f $@ || { echo "make: setting up $(GAUDI_VENV) (a few minutes: PyTorch is large)" >&2; $(PYTHON) -m venv --clear $(GAUDI_VENV); }
	@rm -f $@
	$(GAUDI_VENV)/bin/python -m pip install --disable-pip-version-check -c constraints-gaudi.txt -e '.[gaudi]' pytest pytest-xdist
	@touch $@

demo: $(READY)
	$(PASSIVE) $(BIN)/python recipes/quickstart/demo.py

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest $(IN_TWO) -m "not long" $(TESTS)

test-long: $(READY)
	$(PASSIVE) $(BIN)/python -m pytest $(IN_TWO) -m long $(TESTS)

test-gaudi: $(GAUDI_READY)
	$(ONE_THREAD) $(GAUDI_VENV)/bin/python -m pytest $(IN_TWO) -c tests/gaudi/pytest.ini tests/gaudi

test-fast: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest $(IN_TWO) -m "not slow and not long" $(TESTS)

# Beside the environment, not in it: accelerate imports DeepSpeed wherever it finds it. Its operators need g++.
test-deepspeed: $(READY)
	test -d build/deepspeed || $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps \
	  --target build/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	$(ONE_THREAD) PYTHONPATH=build/deepspeed $(BIN)/python -m pytest tests/test_distributed.py -k deepspeed

# Beside it as well: torchao speaks of other devices wherever transformers finds it. Only the tests that are named by it.
test-torchao: $(READY)
	test -d build/torchao || $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps \
	  --target build/torchao torchao
	$(ONE_THREAD) PYTHONPATH=build/torchao $(BIN)/python -m pytest $(IN_TWO) $(TORCHAO_TESTS) -k torchao

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_combinations.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(GAUDI_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find surgery exporters tests benchmarks recipes -name __pycache__ -type d -prune -exec rm -rf {} +
