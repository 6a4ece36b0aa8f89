# The API: the base dependencies of pyproject.toml and service/. No torch, no workers.
#   docker build -f docker/service.Dockerfile -t catmerge-service .

FROM python:3.13.14-slim-trixie AS build
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/catmerge
ENV PATH=/opt/catmerge/bin:$PATH
WORKDIR /build
COPY pyproject.toml README.md LICENSE requirements.lock ./
# Without its code the project is its dependencies: a layer that stays until the lock changes.
RUN mkdir service && pip install --constraint requirements.lock .
COPY service ./service
RUN pip install --no-deps --force-reinstall .

FROM python:3.13.14-slim-trixie
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/catmerge catmerge
COPY --from=build /opt/catmerge /opt/catmerge
ENV PATH=/opt/catmerge/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 CATMERGE_HOST=0.0.0.0
# By number: Kubernetes can only tell that a number is not root.
USER 10001
WORKDIR /var/lib/catmerge
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + (os.environ.get('CATMERGE_PORT') or '8000') + '/healthz', timeout=4)"]
CMD ["python", "-m", "service.api"]
