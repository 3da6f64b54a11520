# inpaint-service for NVIDIA GPUs, or for a CPU:
#
#   docker build -t inpaint-service:cuda .
#   docker build -t inpaint-service:cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu \
#       --build-arg COMPILER_PACKAGES= .
#
# PyTorch's wheels bring every CUDA library they need, so a CUDA base image would only
# carry them twice: a slim Python base is the leaner of the two. What the host adds is
# the driver (580 or newer for CUDA 13), through the NVIDIA Container Toolkit.

FROM python:3.12.13-slim-bookworm AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1


# The dependencies: a layer of gigabytes that only pyproject.toml and constraints.txt change.
FROM base AS dependencies
ARG TORCH_INDEX_URL=""
WORKDIR /build
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml constraints.txt ./
# An extra index, not the only one: a torch with a local version (2.13.0+cpu) outranks PyPI's.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project["dependencies"], *project["optional-dependencies"]["tracing"], sep="\n")' \
        > requirements.txt \
    && pip --python /opt/venv/bin/python install ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} \
        -c constraints.txt -r requirements.txt


# The service itself, as a wheel: a layer of megabytes.
FROM base AS package
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /dist .


FROM base AS service
LABEL org.opencontainers.image.title="inpaint-service" \
      org.opencontainers.image.description="Stable Diffusion inpainting over HTTP" \
      org.opencontainers.image.licenses="Apache-2.0"

# What compiles the model for a GPU (Triton) builds its launchers with a C compiler.
# On a CPU nothing is compiled: build with an empty COMPILER_PACKAGES.
ARG COMPILER_PACKAGES="g++ libc6-dev"
# hadolint ignore=DL3008,SC2086
RUN if [ -n "${COMPILER_PACKAGES}" ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends ${COMPILER_PACKAGES} \
        && rm -rf /var/lib/apt/lists/*; \
    fi

# Fixed ids, so that a volume keeps its owner from one image to the next.
RUN groupadd --gid 10001 inpaint \
    && useradd --uid 10001 --gid inpaint --home-dir /cache --no-create-home --shell /usr/sbin/nologin inpaint \
    && install --directory --owner=inpaint --group=inpaint /cache

COPY --from=dependencies /opt/venv /opt/venv
RUN --mount=type=bind,from=package,source=/dist,target=/dist \
    pip --python /opt/venv/bin/python install --no-cache-dir --no-deps /dist/*.whl
COPY deploy/healthcheck.py /opt/healthcheck.py

# Loopback inside a container is reachable by nobody; who may reach the port is for `-p` to say.
ENV PATH=/opt/venv/bin:$PATH \
    HF_HOME=/cache/huggingface \
    INPAINT_COMPILE_CACHE=/cache/compile \
    INPAINT_HOST=0.0.0.0 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Downloaded checkpoints, compiled code (/tmp may be mounted without leave to execute), and the home of whatever else keeps a cache. The only writable folder besides /tmp.
VOLUME ["/cache"]
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
STOPSIGNAL SIGTERM

# Liveness, not readiness: an orchestrator that replaces unhealthy containers must not do so
# while a checkpoint downloads or a lost worker comes back.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=4 \
    CMD ["python", "/opt/healthcheck.py", "/healthz"]

ENTRYPOINT ["inpaint-service"]
CMD ["serve"]
