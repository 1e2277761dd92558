# Everything a developer or CI does with echod. Needs Python >= 3.11 and make; each target sets up what it uses.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PYTEST_ARGS ?=
# More processes than cores, because the tests mostly wait.
WORKERS ?= 12
UPGRADE ?=
COVERAGE_MIN ?= 95
FUZZ_S ?= 300
CAMPAIGN ?= mixes model endurance
SANITIZE_S ?= 10
# The steps of `make ci`, each a target.
CI_STEPS ?= lint types coverage test-build test-faults test-balancer test-bench sanitize wheel

# Where `make install` puts the files; packagers put DESTDIR before all of them.
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

TESTS = -n $(WORKERS) --dist worksteal tests/unit tests/integration

BIN := $(VENV)/bin
# Errors only: warnings are about how pip is configured on this machine.
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
SOURCES := echod tests tools
LOCKS := $(patsubst %,requirements/%.lock,run build dev dist bench)

# Without bytecode each start of echod takes twice as long, and each test process compiles all tests again.
unexport PYTHONDONTWRITEBYTECODE

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:

.PHONY: help
help: ## show this help
	@echo "usage: make TARGET [VARIABLE=VALUE]"
	@sed -n 's/^# -- \(.*[^-]\) --*$$/\1:/p; s/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | awk -F'|' '/\|/ {printf "%s%-16s %s\n", title, $$1, $$2; title = ""; next} {title = "\n" $$0 "\n"}'
	@printf '\nPYTHON=%s (3.11 or newer) is the interpreter, VENV=%s the virtual environment.\n' '$(PYTHON)' '$(VENV)'

# -- development ------------------------------------------------------------------------------------------------------

.PHONY: run
run: $(VENV)/.echod ## start `echod serve` with options from ARGS="..."; Ctrl-C drains and stops
	@exec $(BIN)/echod serve $(ARGS)

.PHONY: test
test: $(VENV)/.echod $(VENV)/.dev ## run the unit and integration tests; options of pytest in PYTEST_ARGS="..."
	@$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS)

.PHONY: check
check: lint types test ## run before a commit: lint, types, test

.PHONY: lint
lint: $(VENV)/.dev ## check the format and the rules of ruff
	@$(BIN)/ruff format --check --quiet $(SOURCES) || { echo "format: run \`make format\`" >&2; exit 1; }
	@$(BIN)/ruff check --quiet $(SOURCES)

.PHONY: types
types: $(VENV)/.dev ## check the types with mypy
	@$(BIN)/mypy --no-error-summary $(SOURCES)

.PHONY: format
format: $(VENV)/.dev ## format with ruff, and fix what is safe to fix
	@$(BIN)/ruff format --quiet $(SOURCES)
	@$(BIN)/ruff check --quiet --fix $(SOURCES)

# Beside its source, so that `import echod` finds it. Run each time, because a compiler may have been installed or
# removed; compiles only if the source is newer.
.PHONY: fastpath
fastpath: $(VENV)/.run ## compile the fast path if its source has changed, and say whether there is one
	@$(BIN)/python tools/build_fastpath.py

.PHONY: docs
docs: $(VENV)/.echod ## renew the generated tables of docs/ from the code
	@$(BIN)/python tools/generate_docs.py

.PHONY: config
config: $(VENV)/.echod ## renew systemd/echod.toml from the keys and their defaults
	@{ sed '/^$$/q' systemd/echod.toml; $(BIN)/echod config | sed -E '/^(\[[a-z]+\].*)?$$/!s/^/#/'; } >systemd/echod.toml.new
	@mv systemd/echod.toml.new systemd/echod.toml

.PHONY: clean
clean: ## remove everything that make, the tests and the tools have created
	@for venv in "$(VENV)" "$(VENV)-bench"; do if [ -f "$$venv/pyvenv.cfg" ]; then rm -rf "$$venv"; fi; done
	@rm -rf .coverage .coverage.* .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist echod/server/_fastpath.*.so
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# -- all tests --------------------------------------------------------------------------------------------------------

.PHONY: ci
ci: ## run everything at full repetition, as CI does; the steps in CI_STEPS="lint types ..."
	@set -e; for step in $(CI_STEPS); do echo "make $$step"; began=$$(date +%s); \
	  $(MAKE) $$step PYTEST_ARGS="--full $(PYTEST_ARGS)"; echo "make $$step: $$(($$(date +%s) - began)) s"; done

# The tests of the Python code alone: `make test` has run them on the compiled fast path.
.PHONY: coverage
coverage: WORKERS = 6 # at full repetition they compute more
coverage: $(VENV)/.echod $(VENV)/.dev ## run the tests without the fast path, and require COVERAGE_MIN=95 % of the branches
	@$(BIN)/coverage erase
	@ECHOD_FASTPATH=0 $(BIN)/coverage run -m pytest $(TESTS) $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --fail-under=$(COVERAGE_MIN)

# These tests install packages and compile, which takes long; they measure nothing, so they run side by side.
.PHONY: test-build
test-build: $(VENV)/.echod $(VENV)/.dev ## test wheels, `make install`, and a clean clone with and without a C compiler
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/system/build tests/system/install --timeout 300 $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: $(VENV)/.echod $(VENV)/.dev ## attack a real echod, fuzz it for a moment, and print the figures; run it alone
	@$(BIN)/python -m pytest tests/faults tests/fuzz $(PYTEST_ARGS)

.PHONY: test-balancer
test-balancer: $(VENV)/.echod $(VENV)/.dev ## restart three echods behind an HAProxy, as docs/scaling.md says
	@$(BIN)/python -m pytest tests/system/balancer --timeout 180 $(PYTEST_ARGS)

.PHONY: test-bench
test-bench: $(VENV)/.echod $(VENV)/.dev ## bound the cost of a line on both paths, and test the benchmark; run it alone
	@$(BIN)/python -m pytest tests/bench --timeout 180 $(PYTEST_ARGS)

.PHONY: test-systemd
test-systemd: $(VENV)/.echod $(VENV)/.dev ## install on a machine booted by systemd, ECHOD_TEST_MACHINE="..." (see CONTRIBUTING), and test
	@$(BIN)/python -m pytest tests/system/systemd --timeout 300 $(PYTEST_ARGS)

.PHONY: test-docker
test-docker: $(VENV)/.echod $(VENV)/.dev ## build the image and test it in containers; options of the build in DOCKER_BUILD_FLAGS="..."
	@DOCKER_BUILD_FLAGS="$(DOCKER_BUILD_FLAGS)" $(BIN)/python -m pytest tests/system/docker --timeout 300 $(PYTEST_ARGS)

# -- long runs --------------------------------------------------------------------------------------------------------

.PHONY: campaign
campaign: $(VENV)/.echod $(VENV)/.dev ## run the fault suite for three and a half hours; parts in CAMPAIGN="mixes model endurance"
	@set -e; for part in $(CAMPAIGN); do echo "$$part:"; case $$part in \
	  mixes) $(BIN)/python -m tests.faults.mixes --seeds 1-10 --seconds 600 ;; \
	  model) $(BIN)/python -m tests.faults.model --minutes 60 ;; \
	  endurance) $(BIN)/python -m tests.faults.endurance --minutes 30 ;; \
	  *) echo "unknown part of CAMPAIGN: $$part; expected mixes, model or endurance" >&2; exit 2 ;; \
	esac; done

# Without the tests' configuration of coverage: it would measure atheris too, which instruments echod itself.
FUZZED = echod/protocol/echo.py,echod/config/loader.py,echod/net/address.py
COVERED = --rcfile=/dev/null --data-file=$(VENV)/fuzz.coverage

.PHONY: fuzz
fuzz: $(VENV)/.echod $(VENV)/.dev ## look for bytes that echod handles wrongly, for FUZZ_S=300 seconds
	@$(WITH_ATHERIS)
	@PYTHONPATH=$(VENV)/atheris $(BIN)/coverage run --branch --include=$(FUZZED) $(COVERED) -m tests.fuzz $(FUZZ_S)
	@$(BIN)/coverage report --show-missing $(COVERED)

# Not in dev.lock: it has wheels for x86-64 and glibc only, the newest release none for Python 3.11, and building it
# takes clang. In a directory of its own, so that only the fuzzing imports it.
WITH_ATHERIS = [ -d "$(VENV)/atheris" ] \
  || $(PIP) install --retries 1 --only-binary :all: --target "$(VENV)/atheris" "atheris>=3" >/dev/null 2>&1 \
  || echo "atheris can't be installed here: hypothesis alone looks for findings, without coverage as a guide"

# In a virtual environment of its own. Its interpreter should be built with profile-guided optimization: PYTHON if it is
# given, else the best one found on this machine.
.PHONY: bench
bench: ## measure echod, its peers and the limit, and write docs/performance.md; options in ARGS="..."
	@set -eu; python=$$($(if $(filter file,$(origin PYTHON)),"$(PYTHON)" tests/bench/interpreter.py,echo "$(PYTHON)")); \
	$(MAKE) VENV="$(VENV)-bench" PYTHON="$$python" measure

# The packages of the peers go into a directory that echod doesn't import from: structlog imports Twisted if it is there.
.PHONY: measure
measure: $(VENV)/.echod $(VENV)/.bench
	@PYTHONPATH=$(VENV)/bench $(BIN)/python -m tests.bench $(ARGS)

# In a copy of the project, so that nothing else loads the slow extension. A finding ends the process, so pytest must not
# capture its file descriptors. Leaks are not detected, because an interpreter never frees everything.
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

# -- installation -----------------------------------------------------------------------------------------------------
# With the interpreter itself instead of a virtual environment around it; the program gets an environment of its own.

.PHONY: install
install: ## install for the system: PREFIX, DESTDIR; pip's options in PIP_OPTIONS="--no-index --find-links DIR"
	@set -eu; $(ASK); "$$(echo "$$found" | head -n 1)" tools/install.py install $(PLACES) --pip-options="$(PIP_OPTIONS)"

.PHONY: uninstall
uninstall: ## remove what `make install` created, with the same PREFIX and DESTDIR; a changed configuration is kept
	@set -eu; $(ASK); "$$(echo "$$found" | head -n 1)" tools/install.py uninstall $(PLACES)

PLACES = --destdir="$(DESTDIR)" --prefix="$(PREFIX)" --sysconfdir="$(SYSCONFDIR)" --unitdir="$(UNITDIR)" --mandir="$(MANDIR)"

# -- wheels -----------------------------------------------------------------------------------------------------------
# Files get the time of the commit, so that every build of a commit has the same bytes.

COMMITTED_AT = $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),315532800)

.PHONY: wheel
wheel: $(VENV)/.dist ## build two wheels in dist/: manylinux with the fast path for this Python, and a pure Python one
	@rm -rf build/wheel
	@set -eu; export SOURCE_DATE_EPOCH=$(COMMITTED_AT); build="$(BIN)/python -m hatchling build --target wheel --directory"; \
	ECHOD_BUILD_STRICT=1 $$build build/wheel; \
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	ECHOD_FASTPATH=0 $$build dist

# -- Docker -----------------------------------------------------------------------------------------------------------

.PHONY: image
image: ## build the Docker image, IMAGE=echod; options of `docker build` in DOCKER_BUILD_FLAGS="..."
	@docker build $(DOCKER_BUILD_FLAGS) --tag "$(IMAGE)" --build-arg VERSION="$(VERSION)" --build-arg REVISION="$(REVISION)" .

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' echod/__init__.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)

.PHONY: docker-run
docker-run: image ## build the image and serve on port 8888; DOCKER_RUN_FLAGS="...", options of `echod serve` in ARGS="..."
	@exec docker run --rm --read-only --cap-drop ALL --security-opt no-new-privileges $(DOCKER_RUN_FLAGS) "$(IMAGE)" serve $(ARGS)

# -- the locks --------------------------------------------------------------------------------------------------------
# Each lock but the last is constrained by those before it, so that they fit into one environment. uv is installed for
# the moment only.

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
# Each step leaves a file in $(VENV), and is repeated if a file that it depends on is newer.

# Sets the shell's `found`: the interpreter in the first line, its release in the second. The virtual environment is
# created with the interpreter below PYTHON's own environment, because that may be the very one that is removed, and is
# created again when the interpreter, its release or this directory has changed.
ASK = command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer (Debian: apt-get install python3-venv), or name one with \`make PYTHON=...\`" >&2; exit 1; }; \
	found=$$("$(PYTHON)" tools/check_python.py "$(PYTHON)")

$(VENV)/.python: FORCE
	@set -eu; $(ASK); \
	wanted="$$found in $(CURDIR)"; \
	if [ "$$(cat $@ 2>/dev/null)" != "$$wanted" ]; then \
	  echo "Setting up $(VENV) ..."; \
	  if [ -e "$(VENV)" ] && [ ! -f "$(VENV)/pyvenv.cfg" ] && ! rmdir "$(VENV)" 2>/dev/null; then \
	    echo "$(VENV) is not a virtual environment: move it away, or name another with \`make VENV=...\`" >&2; exit 1; fi; \
	  rm -rf "$(VENV)"; \
	  "$$(echo "$$found" | head -n 1)" -m venv "$(VENV)"; \
	  echo "$$wanted" >$@; \
	fi

$(VENV)/.run: $(VENV)/.python requirements/run.lock requirements/build.lock
	@echo "Installing requirements/run.lock and build.lock ..."
	@$(PIP) install --require-hashes -r requirements/run.lock -r requirements/build.lock
	@touch $@

# Editable, so the code is never installed twice; but the version and the commands are recorded at installation. Compiled
# to bytecode, because a daemon of another user can't write it.
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
