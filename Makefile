# make demo: set up and run the whole road on the model that ships with the package.
# make test: set up and pass the tests.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin

.PHONY: demo test lint clean
demo: $(VENV)/.package
	$(RUN)/weightkit demo

test: lint
	env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 3 tests

lint: $(VENV)/.test
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN)/pip install --quiet -c constraints.txt -e '.[mirror]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) build dist *.egg-info
