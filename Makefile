# Everything a person does with a clone. Each target installs what it needs and is quick the second time.

PY := .venv/bin/python
PYTEST := $(PY) -m pytest -q
ASAN := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

.PHONY: help demo test test-flow test-rest check bench build test-asan test-debug coverage fuzz soak clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

demo: ## the main job on real traffic, in network namespaces (under 30 s)
	@.ci/bootstrap demo
	@$(PY) -m l4mesh demo

test: ## all tests
	@.ci/bootstrap test
	@$(MAKE) --no-print-directory -j2 test-flow test-rest

# Side by side, because most of their time goes into waiting for processes. What the second says comes when it is through.
test-flow:
	@$(PYTEST) tests/flow

test-rest:
	@$(PYTEST) --ignore tests/flow >.cache/test-rest.log 2>&1; code=$$?; cat .cache/test-rest.log; exit $$code

check: ## style, types, layers, stubs, and the generated C
	@.ci/bootstrap run
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH=$$PWD/.venv/bin:$$PATH .venv/bin/cython-lint l4mesh tests/native bench
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo
	$(PY) -m mypy.stubtest l4mesh._fastpath --allowlist tests/guard/stubtest-allowlist.txt
	$(PYTEST) tests/guard

bench: ## the comparison with HAProxy, nginx and Envoy (40 minutes)
	@.ci/bootstrap bench
	@$(PY) -m bench

build: ## the virtual environment and the extension
	@.ci/bootstrap run

test-debug: ## the tests with the extension's own checks on
	@L4MESH_BUILD=debug .ci/bootstrap test
	@$(PYTEST)

test-asan: ## the tests under address and undefined-behaviour sanitizers
	@L4MESH_BUILD=asan .ci/bootstrap test
	@$(ASAN) $(PYTEST) tests/native tests/flow tests/netns tests/parties --ignore tests/netns/test_demo.py

coverage: ## line counts of the compiled code, without the GIL
	@L4MESH_BUILD=gcov .ci/bootstrap test
	@$(PYTEST) tests/native tests/flow
	@cd build && gcov -r -s .. $$(find . -name '*_fastpath*.gcda') 2>/dev/null | grep -A1 -E "File '.*(_native|_fastpath)" || true

fuzz: ## five minutes of hostile bytes at the parsers of unauthenticated input, under sanitizers
	@L4MESH_BUILD=asan .ci/bootstrap test
	@L4MESH_FUZZ_SECONDS=300 $(ASAN) $(PYTEST) -s tests/native/test_fuzz.py

soak: ## ten minutes of hostile traffic with every byte checked, and ten of a storm beside mutual TLS
	@.ci/bootstrap test
	@L4MESH_SOAK_SECONDS=600 $(PYTEST) tests/flow/test_soak.py tests/flow/test_storm.py --timeout 1200
	@L4MESH_SHORTAGE_SAMPLES=30000 $(PYTEST) tests/flow/test_shortage.py --timeout 7200

clean: ## everything that was built
	rm -rf .venv .cache build l4mesh/*.so l4mesh/_fastpath.c tests/native/*.so tests/native/*.c
