# `make demo` and `make test` do all the set-up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# A constraint file, like constraints-3.11.txt, makes an environment with just those versions; without one pip chooses.
PINS ?=
INSTALL = -m pip install --quiet $(if $(PINS),-c $(PINS))

# The newest Python here, on which the core is tested: without PyTorch and ONNX, and with the newest JAX.
NEWEST ?= $(firstword $(foreach minor,14 13 12,$(if $(shell python3.$(minor) -c 'print(1)' 2>&1 | grep -x 1),python3.$(minor))) $(PYTHON))
NEWEST_VENV := .venv-newest
DOCS_VENV := .venv-docs
# The files of tests that need no package of an extra; one test imports every module, also those that need PyTorch.
CORE_TESTS := $(addprefix tests/,$(addsuffix .py,\
	data/test_augmentation test_backbone test_compatibility test_config data/test_sources data/test_decoding \
	test_files test_hub test_images test_installation data/test_jpeg test_nnx test_parallel \
	preparation/test_parquet data/test_survey test_transformations training/test_workdir)) \
	--deselect tests/test_transformations.py::test_importing_the_package_changes_no_setting_of_the_process

.PHONY: demo test test-newest prove lint docs audit constraints clean
.DELETE_ON_ERROR:

$(VENV)/demo.stamp: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or later is needed; name one with PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -r requirements.txt
	$(BIN)/python $(INSTALL) --no-deps -e .
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp tests/requirements.txt
	$(BIN)/python $(INSTALL) -r tests/requirements.txt
	@touch $@

$(NEWEST_VENV)/test.stamp: pyproject.toml tests/requirements.txt
	@$(NEWEST) -c "import sys; sys.exit(sys.version_info < (3, 12) and 'error: the newest JAX needs Python 3.12 or later; name one with NEWEST=...')"
	$(NEWEST) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python $(INSTALL) -e . -r tests/requirements.txt
	@touch $@

# Trains on the digits inside scikit-learn from the beginning, then evaluates the best checkpoint.
demo: $(VENV)/demo.stamp
	@rm -rf $(DEMO)
	@$(BIN)/python train.py --config digits --workdir $(DEMO)
	@$(BIN)/python eval.py --checkpoint $(DEMO) --data digits

test: lint
	$(BIN)/python -m pytest

test-newest: $(NEWEST_VENV)/test.stamp
	$(NEWEST_VENV)/bin/python -m pytest $(CORE_TESTS)

# The long tests, some two hours; SHARE=0.1 runs a tenth of them.
prove: export SHARE ?= 1
prove: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_VENV)/docs.stamp: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python $(INSTALL) -r docs/requirements.txt
	@touch $@

# Builds the site of docs/ and of the docstrings, without JAX; a warning is an error. Material's notice about the future
# of MkDocs is no warning about the pages.
docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "open site/index.html"

# Whether advisories are known of what is installed; asks a service for them, and fails where it cannot.
audit: $(VENV)/test.stamp
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python -m pip freeze | sed 's/+[a-z0-9.]*$$//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)/audit/installed.txt

# Writes the versions of both environments into the constraint files; `make clean` before it lets pip choose anew.
constraints: $(VENV)/test.stamp $(NEWEST_VENV)/test.stamp
	(echo '# Written by `make constraints`.'; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//') > constraints-3.11.txt
	(echo '# Written by `make constraints`.'; $(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable) > constraints-newest.txt

clean:
	rm -rf $(VENV) $(NEWEST_VENV) $(DOCS_VENV) .cache runs site
