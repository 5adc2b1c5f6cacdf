# `docker build .` builds the CPU image. Select another with `--target`:
#   cpu    onnxruntime only (default)     torch  with PyTorch, for TorchScript-only models
#   gpu    onnxruntime for NVIDIA GPUs    train  trains and publishes models
#   grpc   onnxruntime, and gRPC
ARG BASE=python:3.11-slim-bookworm

# Packages are installed into an environment that later stages copy, without pip, its cache and build tools.
FROM ${BASE} AS packages
WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_ONLY_BINARY=:all:
RUN python3 -m venv --without-pip /opt/venv

FROM packages AS packages-cpu
COPY deploy/requirements.lock ./
RUN python3 -m pip --python /opt/venv/bin/python install --require-hashes -r requirements.lock

FROM packages-cpu AS packages-grpc
COPY deploy/requirements-grpc.lock ./
RUN python3 -m pip --python /opt/venv/bin/python install --require-hashes -r requirements-grpc.lock

# PyTorch's CPU builds have their own index; those on PyPI pull in 4 GB of CUDA. pip reads both PIP_ variables.
FROM packages-cpu AS packages-torch
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS=""
COPY deploy/requirements-torch.lock ./
RUN python3 -m pip --python /opt/venv/bin/python install --require-hashes -r requirements-torch.lock

# WITHOUT=torchvision leaves it out, where PyTorch's index cannot be reached; only the recipe of digits needs it.
FROM packages-torch AS packages-train
ARG WITHOUT=""
COPY deploy/requirements-train.lock ./
RUN sed -i "/^${WITHOUT:-nothing}==/,/[^\\\\]$/d" requirements-train.lock && \
    python3 -m pip --python /opt/venv/bin/python install --require-hashes -r requirements-train.lock

FROM packages AS packages-gpu
COPY deploy/requirements-gpu.lock ./
RUN python3 -m pip --python /opt/venv/bin/python install --require-hashes -r requirements-gpu.lock

# Compile the code now, because the container's file system is read-only.
FROM ${BASE} AS code
WORKDIR /app
COPY service service
COPY training training
COPY deploy/healthcheck.py ./
RUN python3 -m compileall -q --invalidation-mode unchecked-hash .

FROM ${BASE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="model-service" \
      org.opencontainers.image.description="Serves a folder of ONNX and TorchScript models over HTTP" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# SERVICE_PORT is not set, so that PORT from the platform is used.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    SERVICE_HOST=0.0.0.0 \
    SERVICE_MODELS_DIR=/models
WORKDIR /app
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=2s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-IS", "/app/healthcheck.py"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["serve"]

FROM runtime AS grpc
COPY --from=packages-grpc /opt/venv /opt/venv
COPY --from=code /app/healthcheck.py ./
COPY --from=code /app/service service

FROM runtime AS torch
COPY --from=packages-torch /opt/venv /opt/venv
COPY --from=code /app/healthcheck.py ./
COPY --from=code /app/service service

FROM runtime AS gpu
# Where the CUDA packages from PyPI put their libraries.
ENV LD_LIBRARY_PATH=/opt/venv/lib/python3.11/site-packages/nvidia/cu13/lib:/opt/venv/lib/python3.11/site-packages/nvidia/cudnn/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-gpu /opt/venv /opt/venv
COPY --from=code /app/healthcheck.py ./
COPY --from=code /app/service service

FROM runtime AS train
ENV MPLCONFIGDIR=/tmp USER=train
COPY --from=packages-train /opt/venv /opt/venv
COPY --from=code /app ./
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "training", "--models-dir", "/models", "--data-dir", "/tmp/data"]
CMD ["--list"]

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
COPY --from=code /app/healthcheck.py ./
COPY --from=code /app/service service
