#!/usr/bin/env bash
# The GPU tests and benchmarks of every operator, on a machine with a GPU, torch 2.11 or newer and no network.
#
#     benchmarks/gpu.sh [WHEELS]
#
# WHEELS: a folder of wheels, for what the machine's python3 lacks or has in an older version of timm, filelock, rich,
# pytest, pytest-xdist (optional) and setuptools. Where there is a network, for example, 4 MB:
#
#     python3 -m pip download --no-deps --only-binary=:all: -d WHEELS 'timm>=1.0.31' 'setuptools>=77,<82'
#
# At most 9 minutes; run it again to go on with the cases that are left. The figures go to cuda_DATE.json in
# benchmarks/results/, and what became of the tests to cuda_DATE_tests.txt. The exit status is 0 if all went well.
set -euo pipefail
wheels=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
python=.gpu/bin/python
export PYTHONUNBUFFERED=1 COLUMNS=120
device=$(python3 -c 'import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)')

if [ ! -e .gpu/complete ]; then
    # --system-site-packages would show those of the interpreter that a virtual environment was made from, not its own.
    python3 -m venv --clear --without-pip .gpu
    python3 -c 'import sys
for path in sys.path:
    if path.endswith("-packages"):
        print(f"import site; site.addsitedir({path!r})")
    ' >"$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    if [ -n "$wheels" ]; then
        $python -m pip install --quiet --no-index --no-deps "$wheels"/*.whl
    fi
    $python -m pip install --quiet --no-index --no-deps --no-build-isolation -e .
    touch .gpu/complete
fi

# The tests have some 800 kernels compiled, which takes a core about a second each.
workers=()
if $python -c 'import xdist' 2>/dev/null; then
    workers=(-n logical --maxprocesses 16)
fi
# An interrupted pytest still says what has failed so far; a job in the background would ignore the interrupt.
status=0
timeout --signal INT --kill-after 10 240 env --default-signal=INT $python -m pytest -m gpu "${workers[@]}" -v -rfE \
    --tb=short -o faulthandler_timeout=100 tests/kernels 2>&1 | tee .gpu/tests.log || status=$?
record=benchmarks/results/cuda_$(date +%F)_tests.txt
{
    echo "$device"
    grep -E '^(FAILED|ERROR) ' .gpu/tests.log || true
    grep -E '^=+ .* in [0-9.]+s' .gpu/tests.log | tail -n 1 || true
    echo "exit status $status"
} >"$record"

# A process for each operator, since a kernel that fails leaves no CUDA to its process, and to each its part of the
# time; the case that it has begun then may take a minute more.
operators=(window routing aggregated neighborhood)
for i in "${!operators[@]}"; do
    left=$((510 - SECONDS))
    share=$((left / (${#operators[@]} - i)))
    [ "$share" -gt 0 ] || break
    timeout --signal INT --kill-after 5 $((share + 60 < left ? share + 60 : left)) $python -m benchmarks.kernels \
        "${operators[i]}" --device cuda --rounds 9 --minutes "$($python -c "print($share / 60)")" || status=$?
done
cat "$record"
exit "$status"
