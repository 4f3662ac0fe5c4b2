# One command runs each thing:
#   make demo    virtual environment, package with its native extension, then the whole method offline
#   make test    the same environment plus test tools, then the tests
#   make lint types    what CI checks besides
#   make docs    the site of docs/ into build/site; a link or an anchor that leads nowhere is an error
#   make aot     every configuration of the Triton kernels compiled for sm_80, sm_90 and sm_100, of which `make test`
#                takes the largest of each variant; needs no GPU
#   make torture runs killed everywhere, stopped at random and spoilt, loaders fed broken files: MINUTES, SEED, RANKS
#   make wheel image   source archive, wheel and Docker image, each built and tried in an empty folder
#   make bench   the kernels beside their peers on the device that is there, at most 8 minutes, one table
# Needed: Python >= 3.11, make; a C++17 compiler for the native CPU kernels. CMake, ninja and nanobind come with pip.
# Overrides: PYTHON=python3.12  VENV=dir  PIP_FLAGS="..."  TORCH_FLAGS="..." (pip flags for torch alone)
#            JOBS=4 (test processes)  DEMO_FLAGS="..."  PYTEST_FLAGS="..."  BENCH_FLAGS="--minutes 4"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= --quiet
TORCH_FLAGS ?=
JOBS ?= 2
DEMO_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
MINUTES ?= 60
SEED ?= 0
RANKS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -c constraints.txt
# pip shows nothing of a build that succeeds, so that a missing extension is told here.
NATIVE = @ls kernels/_native.*.so >/dev/null 2>&1 || \
  echo "without a C++17 compiler: torch runs on CPUs instead of the native kernels, 1.3 times as long or more for each"
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard kernels/csrc/*)

.PHONY: venv dev demo test aot torture bench lint types docs wheel image clean

venv: $(VENV)/.stamp-package
dev: $(VENV)/.stamp-dev

# torch first and alone: nothing that follows may bring another one.
$(VENV)/.stamp-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11. Fix: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_FLAGS) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.stamp-package: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	$(PIP) -e .
	$(NATIVE)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	$(PIP) -e '.[dev,docs]'
	$(NATIVE)
	@touch $@ $(VENV)/.stamp-package

# flash-attn, quack-kernels and flashinfer-python take part where they are installed by hand.
$(VENV)/.stamp-bench: $(VENV)/.stamp-torch $(BUILD_INPUTS)
	$(PIP) -e '.[bench]'
	@touch $@ $(VENV)/.stamp-package

demo: venv
	$(BIN)/macpo demo $(DEMO_FLAGS)

test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

aot: dev
	$(BIN)/python -m bench.compile_report

# A sixth of the MINUTES for each part; the kills are those that the time allows, in an order drawn from the SEED.
# Alone, tests/torture/kills.py tries every one (some two hours on one core; --slice K/N divides them).
TORTURE = OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/python tests/torture
EACH = --seed $(SEED) --minutes $(shell expr $(MINUTES) / 6)
torture: dev
	@status=0; \
	$(TORTURE)/kills.py $(EACH) || status=1; \
	$(TORTURE)/stops.py $(EACH) || status=1; \
	$(TORTURE)/stops.py $(EACH) $(if $(filter 1,$(RANKS)),--jobs 2,--ranks $(RANKS)) || status=1; \
	$(TORTURE)/stops.py $(EACH) --small-disk || status=1; \
	$(TORTURE)/corruption.py $(EACH) || status=1; \
	$(TORTURE)/fuzz.py $(EACH) || status=1; \
	exit $$status

bench: $(VENV)/.stamp-bench
	$(BIN)/python -m bench.run_all $(BENCH_FLAGS)

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not know package_dir, so it gets a tree of links in which folders lie where they are imported from.
types: dev
	rm -rf build/types
	mkdir -p build/types/macpo
	ln -s $(foreach entry,$(filter-out macpo/__pycache__,$(wildcard macpo/*)),$(CURDIR)/$(entry)) \
	  $(CURDIR)/kernels $(CURDIR)/engine build/types/macpo/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p macpo

docs: dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel image:
	PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" TORCH_FLAGS="$(TORCH_FLAGS)" .ci/$@

clean:
	rm -rf build $(VENV) kernels/_native.*.so *.egg-info
