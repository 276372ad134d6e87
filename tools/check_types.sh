#!/usr/bin/env bash
# Check the types of the package as it is installed (`passes/` and `kernels/python/` are parts of it only then).
# usage: tools/check_types.sh [mypy options]      environment: PYTHON, by default .venv's
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wheel=$("$python" "$root/tools/build_wheel.py" "$work")
"$python" -m zipfile -e "$wheel" "$work/site"
cd "$work/site"
# The names of the files are given as they are in the repository.
MYPYPATH="$work/site" "$python" -m mypy --strict --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" \
    "$@" -p qcompiler |
    sed -E "s#^qcompiler/(passes|kernels/triton)/#\1/#; s#^qcompiler/kernels/#kernels/python/#"
