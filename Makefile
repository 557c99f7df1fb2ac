# `make demo` and `make test` need Python 3.11 or newer, a C++17 compiler and a package index; each
# sets up what it needs. Paths are relative, so a space in the path of this folder does no harm.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --progress-bar off -c constraints.txt

# The build calls cmake and ninja by name and shall find the environment's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

CXX_NAMES := -name '*.c' -o -name '*.cc' -o -name '*.h' -o -name '*.inl' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh'
CXX_FILES := $(shell find csrc $(CXX_NAMES))
TEST_FILES := $(shell find tests/emulation $(CXX_NAMES))
CMAKE_TESTS := cmake -S . -G Ninja -DSPARSEKD_PYTHON=OFF -DSPARSEKD_TESTS=ON

# A moved or copied folder carries a CMake cache that names the old place, which CMake refuses.
DROP_FOREIGN_BUILD := grep -qsxF 'CMAKE_HOME_DIRECTORY:INTERNAL=$(CURDIR)' build/*/CMakeCache.txt \
  || rm -rf build

.PHONY: demo test test-cpp test-wide test-neon test-python lint format sanitize package gpu-races bench gpu-check docs clean
.DEFAULT_GOAL := test

demo: $(VENV)/.built
	$(RUN) -m sparsekd demo

# Python comes last: its closing line sums up the run.
test: test-cpp test-python

# In the build of the Python module, whose objects these tests are linked with.
BUILD = build/cmake-$(shell $(RUN) -c 'import sys; print(sys.implementation.cache_tag)')
CMAKE_IN_BUILD = cmake -S . -B $(BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release -DSPARSEKD_TESTS=ON \
  -Dpybind11_DIR=$(shell $(RUN) -m pybind11 --cmakedir)

test-cpp: $(VENV)/.built
	$(DROP_FOREIGN_BUILD)
	$(CMAKE_IN_BUILD)
	cmake --build $(BUILD) --target core_tests
	$(BUILD)/core_tests

# The engine of 64-byte vectors on a processor without AVX-512.
test-wide: $(VENV)/.built
	$(DROP_FOREIGN_BUILD)
	$(CMAKE_IN_BUILD)
	cmake --build $(BUILD) --target core_tests_wide
	$(BUILD)/core_tests_wide

# The engine of 16-byte vectors is NEON on ARM; Debian: apt-get install g++-aarch64-linux-gnu qemu-user
NEON := aarch64-linux-gnu
test-neon: $(VENV)/.installed
ifeq ($(and $(shell command -v $(NEON)-g++),$(shell command -v qemu-aarch64)),)
	@echo "skipped: test-neon needs $(NEON)-g++ and qemu-aarch64"
else
	$(DROP_FOREIGN_BUILD)
	$(CMAKE_TESTS) -B build/neon -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(NEON)-g++
	cmake --build build/neon --target core_tests
	qemu-aarch64 -L /usr/$(NEON) build/neon/core_tests
endif

# What the tests choose on a busy machine is not for keeps, hence no cache; and two processes of one
# thread each pass in half the time of one process of two threads. A file stays in one process, as
# its tests share what is slow to make. Tests that take more threads do not spin while they wait:
# with no core to spare that takes ten times as long.
JOBS ?= 2
test-python: $(VENV)/.built $(VENV)/.models
	SPARSEKD_CACHE=off OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive \
	  $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
	  --doctest-modules tests tools sparsekd

lint: $(VENV)/.built
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	lint-imports
	clang-format --dry-run -Werror $(CXX_FILES) $(TEST_FILES)

format: $(VENV)/.installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	clang-format -i $(CXX_FILES) $(TEST_FILES)

sanitize: $(VENV)/.installed
	$(DROP_FOREIGN_BUILD)
	$(CMAKE_TESTS) -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DSPARSEKD_SANITIZE=address,undefined
	cmake --build build/sanitize --target core_tests
	build/sanitize/core_tests

# The sdist and a wheel in dist/, tried in a clean environment with and without a compiler on PATH. The
# wheel has no CUDA kernels, and runs on systems as old as this one; see docs/releasing.md.
package: $(VENV)/.packaging
	$(RUN) tools/package.py

# The site of docs/ and the docstrings, in build/site; a warning, a dead link included, is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Races in the CUDA kernels by ThreadSanitizer, and what else is too slow for every day: minutes.
gpu-races: $(VENV)/.built
	$(RUN) -m pytest tests/emulation -m thorough

# Every figure of README.md and docs/performance.md, about twenty minutes on an idle machine. The
# packages it compares with come from `pip install -e '.[bench]'`; those that are missing are left out.
BENCH := $(RUN) -m benchmarks.arena
bench: $(VENV)/.built
	$(BENCH) --rows benchmarks/results/arena.jsonl --out docs/results/arena
	ONEDNN_MAX_CPU_ISA=AVX2 SPARSEKD_ISA=avx2 $(BENCH) --level peaks,layer,step --network resnet18,resnet50 \
	  --rows benchmarks/results/arena_avx2.jsonl --out docs/results/arena-avx2

# On a machine with a GPU, nvcc and a torch that has CUDA, in the environment of PYTHON, which has
# `pip install -e '.[dev,gpu]'` behind it. Needs no network then, and less than twelve minutes.
gpu-check:
	"$(PYTHON)" benchmarks/gpu_check.py

clean:
	rm -rf build $(VENV)/.built sparsekd/_C*.so sparsekd/libsparsekd_cuda.so

$(VENV)/.built: $(VENV)/.installed setup.py CMakeLists.txt kernels/__init__.py $(CXX_FILES)
	$(DROP_FOREIGN_BUILD)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(RUN)
	$(RUN) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["build-system"]["requires"], *p["project"]["dependencies"], \
	  *p["project"]["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.packaging: $(VENV)/.installed
	$(RUN) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["project"]["optional-dependencies"]["package"], sep="\n")' > $(VENV)/packaging.txt
	$(PIP) -r $(VENV)/packaging.txt
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(RUN) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)/docs.txt
	$(PIP) -r $(VENV)/docs.txt
	touch $@

# Popular models for tests/thirdparty. Without what torchvision and timm depend on, which would bring
# another torch; and optional: where they cannot be installed, their tests are skipped. To try again,
# remove the file.
$(VENV)/.models: $(VENV)/.installed
	$(RUN) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*p["project"]["optional-dependencies"]["models"], sep="\n")' > $(VENV)/models.txt
	$(PIP) --no-deps -r $(VENV)/models.txt && $(PIP) transformers pillow \
	  || echo "going on without popular models: the tests of those that are missing are skipped"
	$(PIP) lightning accelerate webdataset submitit \
	  || echo "going on without Lightning, accelerate, webdataset, submitit: their tests are skipped"
	touch $@

$(RUN):
	"$(PYTHON)" -m venv $(VENV)
