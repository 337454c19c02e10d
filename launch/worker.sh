#!/usr/bin/env bash
# Installs mor on one machine and runs it there; the other scripts call this:
#   ./launch/worker.sh EXTRAS [ARGUMENTS OF mor.main]
# EXTRAS are those of setup.py, e.g. cuda or tpu,gcs. Without arguments it only installs.
# Where no Python >= 3.11 is found, uv fetches one.
set -euo pipefail

cd "$(dirname "$0")/.."
source launch/venv.sh

extras=$1
shift
if ! [[ -x .venv/bin/python ]] && ! find_python >/dev/null 2>&1; then
  python3 -m pip install -q --user uv
  python3 -m uv python install -q 3.12
  PYTHON=$(python3 -m uv python find 3.12)
  export PYTHON
fi
install "$extras"
if (($# == 0)); then exit; fi
exec .venv/bin/python -m mor.main "$@"
