# make demo and make test are all a newcomer needs; both set up what they use (.venv, PyTorch for CPU, the extension).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CORPUS ?= stdlib
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml

.PHONY: setup test test-slow test-cpp test-aarch64 test-sanitize mutation demo lint format bench bench-regression clean

setup: $(VENV)/.built

$(VENV)/.packages: requirements-dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "foldscan needs Python >= 3.10")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

test: setup test-cpp
	$(PY) -m pytest

test-slow: setup
	$(PY) -m pytest -m slow

# The framework-free core alone: no PyTorch, no Python in this build.
test-cpp: setup
	mkdir -p build
	$(PY) -m cmake -S . -B build/cpp -G Ninja > build/cpp-configure.log || { cat build/cpp-configure.log; exit 1; }
	$(PY) -m cmake --build build/cpp > build/cpp-build.log || { cat build/cpp-build.log; exit 1; }
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure --no-tests=error

# The same tests under AddressSanitizer + UBSan, and the threaded ones under ThreadSanitizer.
test-sanitize: setup
	scripts/sanitize.sh $(PY)

# All kernels for aarch64, and the C++ tests under QEMU.
test-aarch64: setup
	scripts/cross_aarch64.sh $(PY)

# Plants the faults of tests/mutation and expects the tests to notice each one.
mutation: setup
	$(PY) tests/mutation/run.py

demo: setup
	$(PY) -m foldscan demo --corpus $(CORPUS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	git ls-files '*.cpp' '*.h' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(VENV)/bin/mypy
	$(PY) scripts/check_floors.py
	$(PY) benchmarks/plot.py --check

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	git ls-files '*.cpp' '*.h' | xargs $(VENV)/bin/clang-format -i

bench: setup
	$(PY) benchmarks/run.py --memory --out benchmarks/results/cpu.jsonl
	$(PY) benchmarks/plot.py

# Times by pytest-benchmark, instruction counts against benchmarks/results/instructions.json (needs valgrind).
bench-regression: setup test-cpp
	$(PY) -m pytest benchmarks/test_regression.py

clean:
	rm -rf build $(VENV) runs python/foldscan/*.so
