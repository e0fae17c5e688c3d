#!/usr/bin/env bash
# Everything there is to run on a GPU machine, in nine minutes: see gpu.py. The machine's own torch is used, so no venv:
#     [PYTHON=python3] [WHEELS=folder] bash benchmarks/gpu.sh [--rehearse] [--minutes 9] [--out DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
