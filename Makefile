# Both commands work from a bare clone with nothing but Python 3.10 to 3.13 and make, and can be run again.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: help quickstart dense-demo test test-all test-gpu test-downstream lint bench clean

help:
	@echo "make quickstart   train a BiFormer on real digits, with pictures (about 5 minutes)"
	@echo "make dense-demo   train a detector and a segmentor on scenes of digits, with pictures (about 25 minutes)"
	@echo "make test         lint, and every quick test"
	@echo "make test-all     also the slow tests: timm's own tests on every variant"
	@echo "make test-downstream   the zoo in transformers, segmentation_models_pytorch, lightning, fastai"
	@echo "make bench        the benchmarks behind the documentation's figures"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v < (3, 14) else f"zoo needs Python 3.10 to 3.13, this is {v.major}.{v.minor}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.quickstart: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --upgrade-strategy only-if-needed -e '.[quickstart]'
	@touch $@

$(VENV)/.dense: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --upgrade-strategy only-if-needed -e '.[dense,quickstart]'
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --upgrade-strategy only-if-needed -e '.[test]'
	@touch $@

quickstart: $(VENV)/.quickstart
	$(RUN) -m zoo.train.quickstart

dense-demo: $(VENV)/.dense
	$(RUN) -m zoo.train.dense.demo

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	$(RUN) -m pytest -q -n 2 --dist worksteal -m 'not slow and not gpu and not downstream'

test-all: lint
	$(RUN) -m pytest -q -n 2 --dist worksteal -m 'not gpu and not downstream'

test-gpu: $(VENV)/.test
	$(RUN) -m pytest -q -n 8 -m gpu

$(VENV)/.downstream: $(VENV)/.test
	$(RUN) -m pip install --upgrade-strategy only-if-needed -e '.[test,downstream]'
	@touch $@

test-downstream: $(VENV)/.downstream
	$(RUN) -m pytest -q -m downstream tests/downstream

bench: $(VENV)/.test
	$(RUN) -m benchmarks.kernels
	$(RUN) -m benchmarks.models biformer_tiny biformer_tiny:official nat_mini dinat_tiny van_b0 van_b2 \
		transnext_micro transnext_micro:official transnext_tiny transnext_tiny:official crossformer_tiny \
		crossformer_tiny:official crossformer_pp_small crossformer_pp_small:official maxvit_tiny maxvit_tiny_tf_224
	$(RUN) -m benchmarks.models biformer_tiny transnext_micro transnext_micro:official --size 512 --batch 1
	$(RUN) -m benchmarks.models biformer_tiny biformer_tiny:official transnext_micro transnext_micro:official --compile
	$(RUN) -m benchmarks.models swin_tiny_patch4_window7_224 swin_tiny_patch4_window7_224:accelerated \
		maxvit_tiny_tf_224 maxvit_tiny_tf_224:accelerated maxvit_tiny_rw_224 maxvit_tiny_rw_224:accelerated
	$(RUN) -m benchmarks.models swinv2_tiny_window8_256 swinv2_tiny_window8_256:accelerated --size 256
	$(RUN) -m benchmarks.training
	$(RUN) -m benchmarks.loader --model vit_tiny_patch16_224 --workers 0 1 2 --json benchmarks/results/loader.json
	$(RUN) -m benchmarks.dense --json benchmarks/results/dense.json
	$(RUN) -m benchmarks.report --write

clean:
	rm -rf $(VENV) build dist *.egg-info
