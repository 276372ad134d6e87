#!/usr/bin/env bash
# Make or update .venv in the root of the repository: the compiler, editable, with the extras given.
# usage: tools/venv.sh EXTRA...      for example: tools/venv.sh dev cpu text
# environment:
#   PYTHON             the interpreter to start from; by default the first of python3, python3.13 ... that is 3.10 or newer
#   QCOMPILER_RUNTIME  cpu or gpu: which ONNX Runtime the extra `cpu` stands for; by default the one that .venv has
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.10 or newer is needed; install it, or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}

has_distribution() {
    .venv/bin/python -c 'import importlib.metadata as m, sys; m.version(sys.argv[1])' "$1" 2>/dev/null
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)" >&2
    if ! "$python" -m venv --clear .venv >&2; then
        echo "Python's venv does not work here; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
fi

# Two ONNX Runtimes must not meet: where the GPU build is installed, it stays.
runtime=${QCOMPILER_RUNTIME:-$(has_distribution onnxruntime-gpu && echo gpu || echo cpu)}
extras=()
for extra in "$@"; do
    if [[ $extra == cpu ]]; then extra=$runtime; fi
    if [[ $extra == real && $runtime == gpu ]]; then
        echo "the extra real needs onnxruntime-genai, which brings the CPU build of ONNX Runtime; use a second .venv" >&2
        exit 1
    fi
    extras+=("$extra")
done
if [[ $runtime == gpu ]]; then kept=onnxruntime-gpu other=onnxruntime; else kept=onnxruntime other=onnxruntime-gpu; fi
switched=
if has_distribution "$other"; then
    echo "removing $other from .venv" >&2
    .venv/bin/python -m pip uninstall --yes --quiet "$other" >&2
    rm -f .venv/installed-*
    switched=yes
fi

list=$(IFS=, && echo "${extras[*]}")
stamp=.venv/installed-$( (cat pyproject.toml && pwd && echo "$list") | cksum | cut -d' ' -f1)
if [[ ! -e $stamp ]]; then
    echo "installing onnx-qcompiler[$list] into .venv" >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$list]" </dev/null >&2
    if [[ -n $switched ]]; then # removing one has taken files of the other
        .venv/bin/python -m pip install --quiet --force-reinstall --no-deps "$kept" >&2
    fi
    touch "$stamp"
fi
