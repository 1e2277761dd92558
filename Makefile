# Everything a developer or CI does with echod. Needs Python >= 3.11 and make; each target sets up what it uses.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 3
UPGRADE ?=
COVERAGE_MIN ?= 95
FUZZ_S ?= 300
CAMPAIGN ?= mixes model endurance
SANITIZE_S ?= 10

# Where `make install` puts what; DESTDIR goes before all of them, for packagers.
DESTDIR ?=
PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
MANDIR ?= $(PREFIX)/share/man
PIP_OPTIONS ?=

# `make image`: its name, and options of `docker build`, such as a network or a proxy.
IMAGE ?= echod
DOCKER_BUILD_FLAGS ?=
DOCKER_RUN_FLAGS ?= --publish 8888:8888

# What a newcomer runs, and what runs before each commit. The other suites measure, or need a machine of their own.
TESTS = -n $(WORKERS) --dist worksteal tests/unit tests/integration
FAULTS = tests/faults tests/fuzz

BIN := $(VENV)/bin
# Errors only: a warning about how this machine's pip is configured is nothing about echod.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
SOURCES := echod tests tools
LOCKS := $(patsubst %,requirements/%.lock,run build dev dist bench)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

.PHONY: help
help: ## show this help
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'
	@echo "variables: PYTHON=$(PYTHON) (3.11 or newer), VENV=$(VENV)"

.PHONY: run
run: $(VENV)/.echod ## set up and start `echod serve`; options in ARGS="..."; Ctrl-C drains and stops
	@exec $(BIN)/echod serve $(ARGS)

.PHONY: test
test: $(VENV)/.echod $(VENV)/.dev ## run the tests; pytest's options in PYTEST_ARGS="..."
	@$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(VENV)/.echod $(VENV)/.dev ## do to a real echod what can go wrong around it, and print the figures
	@$(BIN)/python -m pytest $(FAULTS) $(PYTEST_ARGS)

# Coverage with a configuration of its own: the tests' would measure atheris too, which instruments echod itself.
FUZZED = echod/protocol/echo.py,echod/config/loader.py,echod/net/address.py
COVERED = --rcfile=/dev/null --data-file=$(VENV)/fuzz.coverage

.PHONY: campaign
campaign: $(VENV)/.echod $(VENV)/.dev ## the long runs of the fault suite: CAMPAIGN="mixes model endurance", three hours and a half
	@set -e; for part in $(CAMPAIGN); do echo "$$part:"; case $$part in \
	  mixes) $(BIN)/python -m tests.faults.mixes --seeds 1-10 --seconds 600 ;; \
	  model) $(BIN)/python -m tests.faults.model --minutes 60 ;; \
	  endurance) $(BIN)/python -m tests.faults.endurance --minutes 30 ;; \
	  *) echo "unknown part of CAMPAIGN: $$part; there are mixes, model and endurance" >&2; exit 2 ;; \
	esac; done

.PHONY: fuzz
fuzz: $(VENV)/.echod $(VENV)/.dev ## look for bytes that echod is wrong about, for FUZZ_S=300 seconds
	@$(WITH_ATHERIS)
	@PYTHONPATH=$(VENV)/atheris $(BIN)/coverage run --branch --include=$(FUZZED) $(COVERED) -m tests.fuzz $(FUZZ_S)
	@$(BIN)/coverage report --show-missing $(COVERED)

# Not in dev.lock, which holds everywhere: its wheels are for x86-64 and glibc alone, its newest release has none for
# Python 3.11, and to build it takes clang. In a folder of its own, so that nothing but the fuzzing sees it.
WITH_ATHERIS = [ -d "$(VENV)/atheris" ] \
  || $(PIP) install --retries 1 --only-binary :all: --target "$(VENV)/atheris" "atheris>=3" >/dev/null 2>&1 \
  || echo "atheris can't be installed here: hypothesis alone looks for findings, without knowing what it reaches"

# In a venv of its own, made with an interpreter that was built with profile-guided optimization: PYTHON if it is given,
# else one that is found here.
.PHONY: bench
bench: ## measure echod, its peers and the limit side by side, and write docs/performance.md; options in ARGS="..."
	@set -eu; python=$$($(if $(filter file,$(origin PYTHON)),"$(PYTHON)" tests/bench/interpreter.py,echo "$(PYTHON)")); \
	$(MAKE) VENV="$(VENV)-bench" PYTHON="$$python" measure

# What the peers need goes into a folder that echod doesn't see: structlog imports Twisted where it finds it.
.PHONY: measure
measure: $(VENV)/.echod $(VENV)/.bench
	@PYTHONPATH=$(VENV)/bench $(BIN)/python -m tests.bench $(ARGS)

.PHONY: test-bench
test-bench: $(VENV)/.echod $(VENV)/.dev ## bound what a line costs on both paths, as ratios in one run, and test the benchmark
	@$(BIN)/python -m pytest tests/bench --timeout 180 $(PYTEST_ARGS)

.PHONY: test-balancer
test-balancer: $(VENV)/.echod $(VENV)/.dev ## restart three behind an HAProxy as docs/scaling.md says, and print the figures
	@$(BIN)/python -m pytest tests/system/balancer --timeout 180 $(PYTEST_ARGS)

.PHONY: test-systemd
test-systemd: $(VENV)/.echod $(VENV)/.dev ## install it on a machine booted by systemd (ECHOD_TEST_MACHINE="...", see CONTRIBUTING) and test it there
	@$(BIN)/python -m pytest tests/system/systemd --timeout 300 $(PYTEST_ARGS)

.PHONY: test-docker
test-docker: $(VENV)/.echod $(VENV)/.dev ## build the image and test it in containers, on the engine that `docker` reaches (DOCKER_BUILD_FLAGS="...")
	@DOCKER_BUILD_FLAGS="$(DOCKER_BUILD_FLAGS)" $(BIN)/python -m pytest tests/system/docker --timeout 300 $(PYTEST_ARGS)

.PHONY: test-build
test-build: $(VENV)/.dev ## start and test a clean clone, with a C compiler and without one
	@$(BIN)/python -m pytest tests/system/build --timeout 300 $(PYTEST_ARGS)

# In a copy of the project, so that nothing else runs the slow extension by accident. A finding ends the process, so pytest
# must not capture what is written to its descriptors. Leaks aren't looked for: an interpreter never frees all it has.
SANITIZED = build/sanitized

.PHONY: sanitize
sanitize: $(VENV)/.echod $(VENV)/.dev ## fuzz and test the fast path under AddressSanitizer and UBSan; needs gcc
	@rm -rf $(SANITIZED)
	@mkdir -p $(SANITIZED)
	@cp -R echod tests pyproject.toml $(SANITIZED)
	@rm -f $(SANITIZED)/echod/server/*.so
	@env -u ECHOD_FASTPATH CC=gcc ECHOD_BUILD_STRICT=1 $(BIN)/python tools/build_fastpath.py --sanitize $(SANITIZED)/echod/server
	@set -eu; cd $(SANITIZED); unset ECHOD_FASTPATH; export PYTHONPATH="$$PWD" PYTHONMALLOC=malloc; \
	export LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	$(abspath $(BIN))/python -m tests.fuzz.fastpath $(SANITIZE_S); \
	$(abspath $(BIN))/python -m pytest --capture=sys tests/unit/test_fastpath.py $(PYTEST_ARGS)

.PHONY: check
check: lint types test ## what to run before a commit: lint, types and the tests

.PHONY: ci
ci: $(VENV)/.echod lint types ## everything at full repetition, with the coverage of the Python code; .ci/run calls it
	@$(BIN)/coverage erase
	@ECHOD_FASTPATH=0 $(BIN)/coverage run -m pytest $(TESTS) $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --fail-under=$(COVERAGE_MIN)
	@$(MAKE) test-build
	@$(MAKE) test-faults
	@$(MAKE) test-balancer
	@$(MAKE) test-bench

.PHONY: lint
lint: $(VENV)/.dev ## ruff: format and rules
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { echo "format: run \`make format\`" >&2; exit 1; }
	@$(BIN)/ruff check --quiet $(SOURCES)

.PHONY: types
types: $(VENV)/.dev ## mypy, strict
	@$(BIN)/mypy --no-error-summary $(SOURCES)

.PHONY: format
format: $(VENV)/.dev ## let ruff format, and fix what is safe to fix
	@$(BIN)/ruff format --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet --fix $(SOURCES)

.PHONY: clean
clean: ## remove what make, the tests and the tools have made
	@for venv in "$(VENV)" "$(VENV)-bench"; do if [ -f "$$venv/pyvenv.cfg" ]; then rm -rf "$$venv"; fi; done
	@rm -rf .coverage .coverage.* .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist echod/server/_fastpath.*.so
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# -- installation -----------------------------------------------------------------------------------------------------
# By the interpreter itself, not a venv around it; the program gets a venv of its own from it.

.PHONY: install
install: ## install for the system: PREFIX, DESTDIR; pip's options in PIP_OPTIONS="--no-index --find-links DIR"
	@set -eu; $(ASK); "$$(echo "$$said" | head -n 1)" tools/install.py install $(PLACES) --pip-options="$(PIP_OPTIONS)"

.PHONY: uninstall
uninstall: ## remove what `make install` made, with the same PREFIX and DESTDIR; a changed configuration is kept
	@set -eu; $(ASK); "$$(echo "$$said" | head -n 1)" tools/install.py uninstall $(PLACES)

PLACES = --destdir="$(DESTDIR)" --prefix="$(PREFIX)" --sysconfdir="$(SYSCONFDIR)" --unitdir="$(UNITDIR)" --mandir="$(MANDIR)"

# -- wheels -----------------------------------------------------------------------------------------------------------
# The commit's time is the files', so that who builds the same commit gets the same bytes.

COMMITTED_AT = $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),315532800)

.PHONY: wheel
wheel: $(VENV)/.dist ## make two wheels in dist/: manylinux with the fast path for this Python, and one without it for any
	@rm -rf build/wheel
	@set -eu; export SOURCE_DATE_EPOCH=$(COMMITTED_AT); build="$(BIN)/python -m hatchling build --target wheel --directory"; \
	ECHOD_BUILD_STRICT=1 $$build build/wheel; \
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	ECHOD_FASTPATH=0 $$build dist

# -- the image --------------------------------------------------------------------------------------------------------

.PHONY: image
image: ## build the Docker image, IMAGE=echod; options of `docker build` in DOCKER_BUILD_FLAGS="..."
	@docker build $(DOCKER_BUILD_FLAGS) --tag "$(IMAGE)" --build-arg VERSION="$(VERSION)" --build-arg REVISION="$(REVISION)" .

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' echod/__init__.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)

.PHONY: docker-run
docker-run: image ## build it and serve on port 8888; Ctrl-C drains; DOCKER_RUN_FLAGS="...", options of `echod serve` in ARGS="..."
	@exec docker run --rm --read-only --cap-drop ALL --security-opt no-new-privileges $(DOCKER_RUN_FLAGS) "$(IMAGE)" serve $(ARGS)

.PHONY: docs
docs: $(VENV)/.echod ## renew the generated tables of docs/ from the code
	@$(BIN)/python tools/generate_docs.py

.PHONY: config
config: $(VENV)/.echod ## renew systemd/echod.toml from the keys and their defaults
	@{ sed '/^$$/q' systemd/echod.toml; $(BIN)/echod config | sed -E '/^(\[[a-z]+\].*)?$$/!s/^/#/'; } >systemd/echod.toml.new
	@mv systemd/echod.toml.new systemd/echod.toml

# -- the locks --------------------------------------------------------------------------------------------------------
# Each but the last is constrained by those before it, so that one environment can hold all four. uv itself comes and
# goes.

COMPILE = uv pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

.PHONY: lock
lock: $(VENV)/.python ## renew requirements/*.lock from pyproject.toml; UPGRADE=1 takes the newest versions
	@set -eu; uv=$$(mktemp -d); trap 'rm -rf "$$uv"' EXIT; trap 'exit 1' INT TERM HUP; \
	echo "Renewing requirements/*.lock ..."; \
	"$(BIN)/python" -m venv "$$uv"; \
	"$$uv/bin/python" -m pip -qq --disable-pip-version-check --no-input install uv; \
	PATH="$$uv/bin:$$PATH"; \
	$(COMPILE) pyproject.toml -o requirements/run.lock; \
	$(COMPILE) --group build -c requirements/run.lock -o requirements/build.lock; \
	$(COMPILE) --group dev -c requirements/run.lock -c requirements/build.lock -o requirements/dev.lock; \
	$(COMPILE) --group dist -c requirements/run.lock -c requirements/build.lock -c requirements/dev.lock -o requirements/dist.lock; \
	$(COMPILE) --group bench -o requirements/bench.lock; \
	if grep -nE '^ *-[^-]|^ *--[^h]|://|file:|$(CURDIR)' $(LOCKS); then echo "make lock: a lock names a place" >&2; exit 1; fi

# -- set-up -----------------------------------------------------------------------------------------------------------
# A file in $(VENV) for each step that is done: newer than what it was made from, or the step is done again.

# The interpreter, its release and this folder: the venv is made anew when one of them has changed. The venv is made with
# the interpreter below PYTHON's own venv, if any, because that may be the very one that is removed.
define ASK_PYTHON
import os, sys
if sys.version_info < (3, 11):
    sys.exit("echod needs Python 3.11 or newer, $(PYTHON) is %d.%d: say which with `make PYTHON=python3.12 ...`" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("$(PYTHON) has no module %s, so no venv can be made: on Debian and Ubuntu, `apt-get install python3-venv`" % error.name)
print(os.path.realpath(sys._base_executable))
print(sys.version.replace("\n", " "))
endef
export ASK_PYTHON

# Sets the shell's `said`: the interpreter in the first line, its release in the second.
ASK = command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer (Debian: apt-get install python3-venv), or say which with \`make PYTHON=...\`" >&2; exit 1; }; \
	said=$$("$(PYTHON)" -c "$$ASK_PYTHON")

$(VENV)/.python: FORCE
	@set -eu; $(ASK); \
	wanted="$$said in $(CURDIR)"; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$wanted" ]; then \
	  echo "Setting up $(VENV) ..."; \
	  if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ] && ! rmdir "$(VENV)" 2>/dev/null; then \
	    echo "$(VENV) is not a Python environment: move it away, or name another with \`make VENV=...\`" >&2; exit 1; fi; \
	  rm -rf "$(VENV)"; \
	  "$$(echo "$$said" | head -n 1)" -m venv "$(VENV)"; \
	  echo "$$wanted" >$@; \
	fi

$(VENV)/.run: $(VENV)/.python requirements/run.lock requirements/build.lock
	@echo "Installing requirements/run.lock and build.lock ..."
	@$(PIP) install --require-hashes -r requirements/run.lock -r requirements/build.lock
	@touch $@

# Beside its source, so that `import echod` finds it. Each time, for a compiler may have come or gone; what is newer than
# its source stays.
.PHONY: fastpath
fastpath: $(VENV)/.run ## compile the fast path if its source has changed, and say whether there is one
	@$(BIN)/python tools/build_fastpath.py

# Editable, so the code is never installed twice; but its version and its commands are written down at installation. As
# bytecode too, for where PYTHONDONTWRITEBYTECODE is set each start would compile all of it, twice as long.
$(VENV)/.echod: $(VENV)/.run pyproject.toml echod/__init__.py | fastpath
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q echod
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.lock
	@echo "Installing requirements/dev.lock ..."
	@$(PIP) install --require-hashes -r requirements/dev.lock
	@touch $@

$(VENV)/.dist: $(VENV)/.run requirements/dist.lock
	@echo "Installing requirements/dist.lock ..."
	@$(PIP) install --require-hashes -r requirements/dist.lock
	@touch $@

$(VENV)/.bench: $(VENV)/.python requirements/bench.lock
	@echo "Installing requirements/bench.lock into $(VENV)/bench ..."
	@rm -rf "$(VENV)/bench"
	@$(PIP) install --require-hashes --target "$(VENV)/bench" -r requirements/bench.lock
	@touch $@

.PHONY: FORCE
FORCE:
