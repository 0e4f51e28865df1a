#!/usr/bin/env bash
# The GPU tests and benchmarks of every operator, on a machine with a GPU, a torch of its own (2.11 or newer) and no network.
#
#     benchmarks/gpu.sh [WHEELS]
#
# WHEELS: a folder with the wheels that the machine lacks (timm, mmengine, pytest, ...). At most 9 minutes: run it again to go
# on with the cases that are left. Writes benchmarks/results/cuda_DATE.json and shows what it holds.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-}

if [ ! -x .gpu/bin/python ]; then
    python3 -m venv --system-site-packages .gpu
    if [ -n "$wheels" ]; then
        .gpu/bin/python -m pip install --quiet --no-index --find-links "$wheels" "$wheels"/*.whl
    fi
    .gpu/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
fi

tests=0
timeout 120 .gpu/bin/python -m pytest -q -m gpu || tests=$?
timeout 360 .gpu/bin/python -m benchmarks.kernels --device cuda --rounds 9 --minutes 4.5
.gpu/bin/python -m benchmarks.report
exit "$tests"
