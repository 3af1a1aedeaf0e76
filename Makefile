# Two commands matter: `make bench` and `make test`. Each sets up what it needs in $(VENV), once.
#
#   PYTHON=python3.12   the Python to build the environment from (>= 3.10)
#   VENV=path           the environment; one that exists is used as it is and gets what it lacks
#   TORCH="..."         arguments for `pip install` that choose a build of PyTorch. Without them a torch >= 2.10
#                       that PYTHON or VENV has is used; else pip's default is installed: on Linux the CUDA
#                       build, several GB. The selector on PyTorch's site gives the arguments for the CPU build.
#   EXTRAS=dev,...      extras of pyproject.toml to install: cuda-build (nvcc), plots, peers
#   ARGS="..."          further arguments for the command behind the target
#
# TORCH and EXTRAS matter at set-up only; `make clean` first to change them later.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
EXTRAS ?= dev
JOBS ?= auto
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.mhc-ready

.DELETE_ON_ERROR:
.PHONY: help bench check doctor inspect-kernels docs docs-guide docs-predict test test-full lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

bench: $(READY) ## check and measure the kernels, then what they add to a layer; with ARGS, what these say
	$(BIN)/mhc-tilelang bench $(ARGS)
	$(if $(ARGS),,$(BIN)/mhc-tilelang bench overhead --model 3b)

check: $(READY) ## compare the kernels with the float64 reference
	$(BIN)/mhc-tilelang check $(ARGS)

doctor: $(READY) ## report what this machine has and what is missing
	$(BIN)/mhc-tilelang doctor $(ARGS)

inspect-kernels: $(READY) ## build KERNELS="post ..." for every CUDA architecture (without: those that changed), and keep what came out
	$(BIN)/python -m mhc_tilelang.perf.inspect.stored $(KERNELS)

docs: $(READY) ## build the documentation as a site in build/site; a link that leads nowhere is an error
	$(BIN)/python -m mhc_tilelang.perf.inspect.pages docs/kernels
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-guide: $(READY) ## take the excerpts, tables, numbers and figures of the pages from their sources again
	$(BIN)/python -m mhc_tilelang.perf.figures.excerpts .
	$(BIN)/python -m mhc_tilelang.perf.figures.guide docs/guide/figures

docs-predict: $(READY) ## predict anew what changed (nvcc), write the tables of docs/predict.md and docs/tuning.md
	$(BIN)/python -m mhc_tilelang.perf.predict.stored
	$(BIN)/python -m mhc_tilelang.perf.predict.report docs/predict.md docs/tuning.md

test: $(READY) ## run the tests, without those that take minutes
	$(BIN)/pytest -n $(JOBS) --dist loadscope -m "not full" $(ARGS)

test-full: $(READY) ## run all tests
	$(BIN)/pytest -n $(JOBS) --dist loadscope $(ARGS)

lint: $(READY) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPED) && mkdir -p $(TYPED)
	ln -s $(CURDIR)/mhc_tilelang/* $(CURDIR)/kernels $(CURDIR)/perf $(CURDIR)/reference $(TYPED)
	$(BIN)/mypy $(TYPED)

format: $(READY) ## fix style and formatting where a tool can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, build products and the tools' caches (compiled kernels stay)
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# mypy reads paths, not the mapping in pyproject.toml: show it the package as it is installed.
TYPED := build/typed/mhc_tilelang

# Set-up. A torch that is found is never exchanged: the constraints are rewritten to its version.
FIND_TORCH := from importlib.metadata import distribution; torch = distribution("torch"); \
	assert tuple(map(int, torch.version.split(".")[:2])) >= (2, 10)
SITE := "import sysconfig; print(sysconfig.get_path('purelib'))"

$(READY): pyproject.toml constraints.txt | $(BIN)/python
ifdef TORCH
	$(BIN)/pip install $(TORCH)
else
	$(BIN)/python -c '$(FIND_TORCH)' 2>/dev/null || $(BIN)/pip install -c constraints.txt torch
endif
	$(BIN)/python -c '$(FIND_TORCH); print("torch==" + torch.version)' > $(VENV)/constraints.txt
	grep -v '^torch==' constraints.txt >> $(VENV)/constraints.txt
	$(BIN)/pip install -q -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# PYTHON may itself be a virtual environment, which --system-site-packages does not reach: a .pth file does.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
ifndef TORCH
	if path=$$($(PYTHON) -c '$(FIND_TORCH); print(torch.locate_file(""))' 2>/dev/null); \
		then echo "$$path" > "$$($@ -c $(SITE))/torch-of-python.pth"; fi
endif
