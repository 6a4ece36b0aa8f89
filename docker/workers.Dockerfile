# A worker: the [worker] extra on top of the base, service/ (for its contract and stores) and workers/.
#   docker build -f docker/workers.Dockerfile -t catmerge-workers .
#
# Which torch this gets is the package index's choice. The usual index has the CUDA build for Linux on x86-64: it runs
# on GPUs and on CPUs, and takes several gigabytes. For a small image without CUDA, name PyTorch's CPU index (its address
# is on PyTorch's installation page) as well; pip then prefers the "+cpu" build of the locked version:
#   docker build -f docker/workers.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU index> -t catmerge-workers .

FROM python:3.13.14-slim-trixie AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/catmerge
ENV PATH=/opt/catmerge/bin:$PATH
WORKDIR /build
COPY pyproject.toml README.md LICENSE requirements.lock ./
# Without its code the project is its dependencies: a layer that stays until the lock changes.
RUN mkdir service workers && pip install --constraint requirements.lock ".[worker]"
COPY service ./service
COPY workers ./workers
RUN pip install --no-deps --force-reinstall .

FROM python:3.13.14-slim-trixie
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/catmerge catmerge
COPY --from=build /opt/catmerge /opt/catmerge
# A volume that is mounted here for CATMERGE_INPUT_CACHE belongs to the one who writes it.
RUN install --directory --owner=10001 --group=10001 /var/cache/catmerge
ENV PATH=/opt/catmerge/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# By number: Kubernetes can only tell that a number is not root.
USER 10001
WORKDIR /var/lib/catmerge
# No health check: a worker answers to nobody. One that died or hangs loses its lease, and another takes its part.
CMD ["python", "-m", "workers"]
