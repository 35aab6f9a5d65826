# Everything a fresh machine needs: Python 3.11 or later, package access, and a C++17 compiler for the fast CPU kernels.
PYTHON ?= python3
BIN := .venv/bin
# As `keysift` itself does (server/__main__.py tells the measurement): it bounds how long busy neighbours can stall a barrier.
export GOMP_SPINCOUNT ?= 20000

# Processes that share the tests: most of them keep one core busy.
TESTERS ?= 2
PYTEST := -m pytest -q -m "not slow and not gpu" -n $(TESTERS) --dist loadfile
# The tests that meet the libraries whose versions float: models, the engine, the wire.
MATRIX := tests/engine tests/server

.PHONY: install lock demo test test-matrix check bench proto format clean

install:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed"; exit 1; }
	@$(PYTHON) tools/install.py

# Renew requirements/: `make lock` keeps what pyproject.toml still allows, `make lock UPGRADE=--upgrade` takes the newest.
lock: install
	$(BIN)/python tools/lock.py $(UPGRADE)

demo: install
	$(BIN)/python benchmarks/demo.py

test: install
	$(BIN)/python $(PYTEST)

# Both ends of the ranges in pyproject.toml, each in an environment of its own (torch as locked).
test-matrix:
	@for versions in oldest newest; do \
		echo "$$versions:" && $(PYTHON) tools/install.py --folder .venv-$$versions --versions $$versions \
		&& .venv-$$versions/bin/python $(PYTEST) $(MATRIX) || exit 1; \
	done

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.compile_kernels

# About four hours on two cores, most of it for the quality of prompts and tokens.
bench: install
	$(BIN)/python -m uv pip install --quiet --no-deps --python $(BIN)/python --requirement requirements/bench.txt
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
proto: install
	test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	$(BIN)/python -m uv pip install --quiet --no-deps --python .venv-proto/bin/python --requirement requirements/proto.txt
	cd .types && PATH="$(CURDIR)/.venv-proto/bin:$$PATH" python -m grpc_tools.protoc -I. \
		--python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. keysift/server/inference.proto

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv* .types build dist *.egg-info kvcache/native/*.so
