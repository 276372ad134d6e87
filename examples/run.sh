#!/usr/bin/env bash
# See the compiler at work on a small language model that comes with this repository.
# Needs Python 3.10 or newer; what else it needs goes into .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/venv.sh cpu text
exec .venv/bin/python examples/austen/demo.py "$@"
