# Every target makes its own environment in .venv on first use.
PYTHON ?= python3
VENV ?= .venv
NB ?=
BIN = $(VENV)/bin
READY = $(VENV)/.installed
OFFLINE = HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 \
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PATH="$(abspath $(BIN)):$$PATH"

.PHONY: help demo lab test test-slow docs refresh export clean-notebooks
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' Makefile

$(READY): settings.ini setup.py constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing moe_nb into $(VENV) (several minutes the first time)"
	@$(BIN)/python -m pip install --quiet --use-pep517 -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## compress, export and evaluate a small model on a CPU, into runs/demo
	@$(BIN)/moe-nb demo --output_dir runs/demo

lab: $(READY) ## open the notebooks in JupyterLab
	@PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs/tutorials/quickstart.ipynb

test: $(READY) ## run every notebook as a test, then pytest
	@status=0; \
	$(OFFLINE) timeout 1500 $(BIN)/nbdev_test --n_workers 2 --do_print || status=1; \
	$(OFFLINE) $(BIN)/python -m pytest -q tests moe_nb --doctest-modules || status=1; \
	exit $$status

test-slow: $(READY) ## the same with the cells and tests marked slow
	@status=0; \
	$(OFFLINE) timeout 7200 $(BIN)/nbdev_test --n_workers 2 --do_print --flags slow || status=1; \
	$(OFFLINE) $(BIN)/python -m pytest -q tests moe_nb --doctest-modules -m "slow or not slow" || status=1; \
	exit $$status

docs: $(READY) ## render README.md from nbs/index.ipynb
	@$(BIN)/python .ci/readme.py

refresh: $(READY) ## run notebooks and store their outputs (NB=path for one)
	@$(BIN)/python .ci/refresh.py $(NB)

export: $(READY) ## clean the notebooks and write moe_nb/*.py from them
	@$(BIN)/nbdev_clean && $(BIN)/nbdev_export

clean-notebooks: $(READY) ## strip noise from the notebooks
	@$(BIN)/nbdev_clean
