# The image contains echod, its dependencies and the Python of the base image. `make image` builds it.

ARG BASE=python:3.13-slim-trixie

# -- the dependencies, locked by hash; rebuilt only when a lock changes ------------------------------------------------

FROM ${BASE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends binutils >/dev/null
RUN python -m venv --without-pip /opt/echod && rm -f /opt/echod/bin/[Aa]ctivate* /opt/echod/.gitignore
COPY requirements/run.lock /
RUN python -m pip --python /opt/echod/bin/python install -q --no-compile --require-hashes --only-binary :all: -r /run.lock
# Without 14 MB of debug symbols of uvloop.
RUN find /opt/echod -name '*.so' -exec strip --strip-unneeded {} + \
 && find /opt/echod -regex '.*\.\(c\|h\|pxd\|pxi\|pyi\|pyx\)' -delete \
 && find /opt/echod -type d -empty -delete \
 && python -m compileall -q /opt/echod/lib

# -- echod -------------------------------------------------------------------------------------------------------------

FROM dependencies AS build
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends gcc libc6-dev >/dev/null
COPY requirements/build.lock /
RUN python -m pip install -q --require-hashes --only-binary :all: -r /build.lock
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tools/build_fastpath.py tools/
COPY echod echod
# Install by name, because pip records the path of a package that is installed from one. -s strips the fast path.
RUN LDFLAGS=-s python -m hatchling build --target wheel --directory /wheels \
 && python -m pip --python /opt/echod/bin/python install -q --no-compile --no-deps --no-index --find-links /wheels \
      --prefix /echod/opt/echod echod \
 && python -m compileall -q -s /echod /echod

# -- the image ---------------------------------------------------------------------------------------------------------

FROM ${BASE}
COPY --from=dependencies /opt/echod /opt/echod
COPY --from=build /echod /
# The base image has no bytecode of the standard library, and the user of the service cannot write any, so each start
# would compile it. Therefore import every module that echod uses once, including imports in functions.
RUN python -m pip uninstall -q -y --root-user-action ignore pip && /opt/echod/bin/python <<'PYTHON'
import ast, importlib, pathlib, echod

for file in pathlib.Path(echod.__file__).parent.rglob("*.py"):
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            [importlib.import_module(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            importlib.import_module(node.module)
PYTHON

ENV PATH=/opt/echod/bin:$PATH ECHOD_DEFAULT_LISTEN=0.0.0.0:8888,[::]:8888
EXPOSE 8888
USER 10001:10001
STOPSIGNAL SIGTERM
# env(1) blocks the signals until echod is ready for them; process 1 would lose those that arrive before its first line.
# Options without a command are options of `serve`, as users of an image expect.
ENTRYPOINT ["env", "--block-signal=TERM,INT,HUP,USR1,USR2", "sh", "-c", "case ${1-} in -h | --help | --version) ;; -*) set -- serve \"$@\" ;; esac; exec echod \"$@\"", "echod"]
CMD ["serve"]
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --start-interval=200ms --retries=3 \
  CMD ["echod", "ping", "-c", "1", "-W", "1", "127.0.0.1:8888"]

ARG VERSION=unknown REVISION=unknown
LABEL org.opencontainers.image.title="echod" \
  org.opencontainers.image.description="A TCP daemon that echoes every line in upper case" \
  org.opencontainers.image.version="$VERSION" \
  org.opencontainers.image.revision="$REVISION" \
  org.opencontainers.image.licenses="MIT"
