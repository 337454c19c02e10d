#!/usr/bin/env bash
# Trains a small Mixture-of-Recursions on the shipped corpus, minutes on two cores:
#   ./launch/quickstart.sh [WORKDIR] [--config.FIELD=VALUE …]
# Run again, it resumes. Needs a Python >= 3.11; PYTHON=… names one.
set -euo pipefail

workdir=${1:-$(dirname "$0")/../runs/quickstart}
mkdir -p "$workdir"
workdir=$(cd "$workdir" && pwd)
cd "$(dirname "$0")/.."
source launch/venv.sh

install core
keep_compiled_programs
exec .venv/bin/python -m mor.main --config=configs/quickstart.py --workdir="$workdir" \
  --mode=train "${@:2}"
