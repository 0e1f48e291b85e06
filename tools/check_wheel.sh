#!/usr/bin/env bash
# Installs the wheel in dist/ into a fresh environment, which sees the project's torch, and runs
# tools/smoke.py there. PYTHON names the environment that has torch.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
fresh=build/check-wheel
rm -rf "$fresh"
"$python" -m venv "$fresh"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
start=$(date +%s)
"$fresh/bin/python" -m pip --disable-pip-version-check install -q --no-deps --ignore-installed \
    dist/*"$(uname -m)".whl
echo "installed in $(($(date +%s) - start)) s"
"$fresh/bin/python" -I tools/smoke.py "$fresh"
