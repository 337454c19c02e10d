#!/usr/bin/env bash
# Runs the tests, or those named: ./launch/test.sh [PYTEST ARGUMENTS]
# Needs a Python >= 3.11; PYTHON=… names one.
set -euo pipefail

cd "$(dirname "$0")/.."
source launch/venv.sh

install test
keep_compiled_programs
exec .venv/bin/python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder "$@"
