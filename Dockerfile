# Target cpu computes on the processor; target cuda adds what an NVIDIA card needs beside its driver.
#   docker build --target cpu -t arrowquant .
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS cpu

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

RUN useradd --system --uid 10001 arrowquant \
    && install --directory --owner=arrowquant /data /models /var/cache/numba

WORKDIR /app
COPY pyproject.toml requirements.lock README.md LICENSE ./

# The dependencies on their own first, so that a change of the code does not fetch them again.
RUN mkdir service \
    && touch service/__init__.py \
    && python -m pip install --quiet --constraint requirements.lock ".[otel,s3,hub]" \
    && python -m pip uninstall --quiet --yes arrowquant-service \
    && rm -r service build ./*.egg-info

COPY service ./service
RUN python -m pip install --quiet --no-deps .

ENV ARROWQUANT_HOST=0.0.0.0 \
    ARROWQUANT_PORT=8000 \
    ARROWQUANT_DATA_DIR=/data \
    ARROWQUANT_MODEL_ROOTS=/models \
    NUMBA_CACHE_DIR=/var/cache/numba

USER 10001
# Kernels for a processor like the one that builds; another one compiles its own when it starts.
RUN arrowquant warmup
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['ARROWQUANT_PORT'] + '/healthz', timeout=3)"]
ENTRYPOINT ["arrowquant"]
CMD ["serve"]

FROM cpu AS cuda

USER 0
RUN python -m pip install --quiet --constraint requirements.lock ".[cuda]"
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
