# `make demo` and `make test` work on a fresh checkout: they create .venv and install first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICK ?=

.PHONY: demo test coverage rest long test-k8s k8s-parts check format soak bench install clean

demo: install
	$(BIN)/graftwork demo examples/$(if $(QUICK),demo-quick,demo).yaml

# Compiled modules are written, whatever the caller's shell says: each of the tests' processes would compile them again.
unexport PYTHONDONTWRITEBYTECODE
PARALLEL = -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder
FAST = -m "not soak and not long and not k8s" $(PARALLEL)
test: install
	$(BIN)/pytest $(FAST)

# `make coverage rest` runs each test of `make test` once. Only tests/unit is measured: most of the other tests work in
# processes of Ray. Below Python 3.12 the tracer doubles the CPU time of a test.
coverage: install
	$(BIN)/pytest tests/unit $(FAST) --cov --cov-report=term:skip-covered

rest: install
	$(BIN)/pytest $(filter-out tests/unit/,$(wildcard tests/*/)) $(FAST)

long: install
	$(BIN)/pytest -m "long and not soak and not k8s" $(PARALLEL)

# On a real API server, which is built once from Debian's packages, as root, in some minutes, and with KubeRay's CRDs of
# the folder GRAFTWORK_CRDS. It fails where a part is missing: docs/guide.md says how to get each.
APISERVER = $(or $(GRAFTWORK_CACHE),$(HOME)/.cache/graftwork)/k8s/apiserver
test-k8s: k8s-parts install
	$(BIN)/pytest -m "k8s and not soak" $(PARALLEL)

k8s-parts:
	@bash tests/k8s/require_parts.sh $(APISERVER)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: install
	$(BIN)/pytest -m soak --timeout 3600

bench: install
	$(BIN)/python -m benchmarks.run

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "graftwork needs Python 3.11 or newer; found $$($(PYTHON) --version). Run: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt-get install python3-venv"; exit 2; }
	@echo "Installing into $(VENV): about 3.7 GB, 3 to 5 minutes, once."
	@$(BIN)/python -m pip install -q -U pip
	@$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .graftwork
