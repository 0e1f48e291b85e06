#!/usr/bin/env bash
# Makes dist/ anew: the source distribution, and from it a manylinux wheel for x86-64 and, where
# there is a cross compiler, one for Arm. PYTHON names the environment with torch and auditwheel.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
export PATH="$(dirname "$python"):$PATH"
export LLMQ_CUDA=0 PIP_DISABLE_PIP_VERSION_CHECK=1

rm -rf dist
"$python" setup.py -q sdist >/dev/null
# Object files stay from the last run; they are compiled again where a source changed.
mkdir -p build/sdist
find build/sdist -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
find build/sdist/build -mindepth 1 -maxdepth 1 ! -name 'wheel-*' -exec rm -rf {} + 2>/dev/null || true
tar -xf dist/*.tar.gz --strip-components 1 -C build/sdist

make_wheel() {  # machine, compiler
  # manylinux.h: for older systems than this one.
  CXX=$2 CXXFLAGS="-include $PWD/build/sdist/csrc/manylinux.h" LLMQ_BUILD=wheel-$1 \
      _PYTHON_HOST_PLATFORM=linux-$1 "$python" -m pip wheel -q --no-deps --no-build-isolation \
      -w "build/sdist/build/$1" build/sdist
  auditwheel show "build/sdist/build/$1"/*.whl
  auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist "build/sdist/build/$1"/*.whl
}

machine=$(uname -m)
make_wheel "$machine" "${CXX:-g++}"
if [ "$machine" = x86_64 ] && command -v aarch64-linux-gnu-g++ >/dev/null; then
  rm -rf build/sdist/build/lib*
  make_wheel aarch64 aarch64-linux-gnu-g++
fi
ls -l dist
