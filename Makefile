# `make demo` and `make test` do all the set-up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo

.PHONY: demo test prove lint audit clean
.DELETE_ON_ERROR:

$(VENV)/demo.stamp: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or later is needed; name one with PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	@touch $@

# Trains on the digits inside scikit-learn from the beginning, then evaluates the best checkpoint.
demo: $(VENV)/demo.stamp
	@rm -rf $(DEMO)
	@$(BIN)/python train.py --config digits --workdir $(DEMO)
	@$(BIN)/python eval.py --checkpoint $(DEMO) --data digits

test: lint
	$(BIN)/python -m pytest

# The long proofs, some two hours; SHARE=0.1 runs a tenth of them.
prove: export SHARE ?= 1
prove: $(VENV)/test.stamp
	$(BIN)/python -m pytest proofs

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whether advisories are known of what is installed; asks a service for them, and fails where it cannot.
audit: $(VENV)/test.stamp
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python -m pip freeze | sed 's/+[a-z0-9.]*$$//' > $(VENV)/audit/installed.txt
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --requirement $(VENV)/audit/installed.txt

clean:
	rm -rf $(VENV) .cache runs
