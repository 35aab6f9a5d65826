# Everything a fresh machine needs: Python 3.11 or later, package access, and a C++17 compiler for the fast CPU kernels.
PYTHON ?= python3
BIN := .venv/bin
# As `keysift` itself does (server/__main__.py tells the measurement): it bounds how long busy neighbours can stall a barrier.
export GOMP_SPINCOUNT ?= 20000

# Processes that share the tests: most of them keep one core busy.
TESTERS ?= 2
PYTEST := -m pytest -q -m "not slow and not gpu" -n $(TESTERS) --dist loadfile
# The tests that meet the libraries whose versions float: models, tokenizers, the engine, the wire, the command line.
MATRIX := tests/engine/model tests/engine/execution tests/engine/parallel tests/engine/text tests/engine/test_parity.py \
	tests/engine/test_engine.py tests/engine/test_llm.py tests/server tests/test_examples.py

.PHONY: install lock demo test test-matrix attack sanitize check bench soak docs proto format clean

install:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or later is needed"; exit 1; }
	@$(PYTHON) tools/install.py

# Renew requirements/: `make lock` keeps what pyproject.toml still allows, `make lock UPGRADE=--upgrade` takes the newest.
lock: install
	$(BIN)/python -m tools.lock $(UPGRADE)

demo: install
	$(BIN)/python -m benchmarks.demo

test: install
	$(BIN)/python $(PYTEST)

# Both ends of the ranges in pyproject.toml, each in an environment of its own (torch as locked).
test-matrix:
	@for versions in oldest newest; do \
		echo "$$versions:" && $(PYTHON) tools/install.py --folder .venv-$$versions --versions $$versions \
		&& .venv-$$versions/bin/python $(PYTEST) $(MATRIX) || exit 1; \
	done

# Hostile callers against servers of a tiny model, whose pages are in memory and offloaded, half of the time each:
# `make attack MINUTES=30`.
attack: install
	$(BIN)/python -m tests.attack --minutes $(or $(MINUTES),2)

# Ops, indexes, short lives of requests and attacks on kernels that are built with the address, undefined-behaviour and
# thread sanitizers, each of which first has to find a planted fault. Builds take minutes and are kept in build/sanitize/.
sanitize: install
	$(BIN)/python -m tools.sanitize $(SANITIZERS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.compile_kernels

# About four hours on two cores, most of it for the quality of prompts and tokens.
bench: install
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --requirement pyproject.toml --extra bench --constraint requirements/bench.txt
	$(BIN)/python -m benchmarks.ops.attention
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.engine.quantization
	$(BIN)/python -m benchmarks.ops.prefill
	$(BIN)/python -m benchmarks.ops.dense_kernel
	$(BIN)/python -m benchmarks.ops.decode
	$(BIN)/python -m benchmarks.ops.index --plot benchmarks/ops/index.svg
	$(BIN)/python -m benchmarks.quality.recall
	$(BIN)/python -m benchmarks.quality.recall --phase decode
	$(BIN)/python -m benchmarks.quality.prefill --plot benchmarks/quality/prefill.svg
	$(BIN)/python -m benchmarks.quality.decode --plot benchmarks/quality/decode.svg
	$(BIN)/python -m benchmarks.quality.locality --texts manual scripture --lengths 8000 --plot benchmarks/quality/locality.svg
	$(BIN)/python -m benchmarks.engine.offload

# Two servers under mixed load for an hour, or as long as `make soak MINUTES=3` says.
soak: install
	$(BIN)/python -m benchmarks.soak --minutes $(or $(MINUTES),60)

# The site, in site/: no network, and a warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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
