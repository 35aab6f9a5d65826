# CPU:  docker build -t keysift .
# CUDA: docker build -t keysift:cuda --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH_BACKEND=cu130 .
# Run:  docker run -p 127.0.0.1:50051:50051 keysift serve --strategy streaming
# Linux x86-64. Every package has the version and hash of requirements/run.txt; torch has its version, in the build of TORCH_BACKEND,
# which uv takes from PyTorch's own index (TORCH_BACKEND= takes the package index's).
ARG BASE=python:3.12-slim

FROM --platform=linux/amd64 python:3.12-slim AS wheel
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src

FROM --platform=linux/amd64 ${BASE}
ARG TORCH_BACKEND=cpu
# A base without pip is a CUDA one: Python, and the C compiler and headers with which Triton builds its launchers.
RUN if ! command -v pip; then \
        apt-get update \
        && apt-get install --no-install-recommends --yes python3.12-venv python3.12-dev gcc \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && "$(command -v python3.12 || command -v python3)" -m venv /opt/keysift
ENV PATH=/opt/keysift/bin:$PATH VIRTUAL_ENV=/opt/keysift
COPY --from=wheel /wheels /wheels
COPY requirements /requirements
RUN pip install --no-cache-dir --require-hashes --requirement /requirements/uv.txt \
    && uv pip install --no-cache ${TORCH_BACKEND:+--torch-backend $TORCH_BACKEND} "$(grep '^torch==' /requirements/run.txt)" \
    && uv pip install --no-cache --no-deps --requirement /requirements/run.txt \
    && uv pip install --no-cache --no-deps /wheels/*.whl \
    && rm -rf /wheels /requirements
RUN useradd --create-home keysift
USER keysift
# All addresses of the container, whose network is its own: who publishes its port beyond loopback gives it TLS and tokens,
# and KEYSIFT_INSECURE=false, with which it does not start without them.
ENV KEYSIFT_HOST=0.0.0.0 KEYSIFT_METRICS_HOST=0.0.0.0 KEYSIFT_INSECURE=true
EXPOSE 50051
# The health service asks for no token. A server with TLS wants a probe of its own: override or --no-healthcheck.
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import grpc; \
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
stub = rpc.HealthStub(grpc.insecure_channel('127.0.0.1:50051')); \
raise SystemExit(stub.Check(pb.HealthCheckRequest(), timeout=5).status != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["keysift"]
CMD ["serve"]
