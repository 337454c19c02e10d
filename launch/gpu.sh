#!/usr/bin/env bash
# Trains on the GPUs of this machine; one process sees them all:
#   ./launch/gpu.sh --workdir=DIR [OPTIONS] -- --config=FILE [ARGUMENTS OF mor.main]
#
#   --workdir=DIR    of the run, local or gs://
#   --gpus=0,1,…     the GPUs to use; default all
#   --extra=cuda     or cuda12, of setup.py
#   --retries=100    how often a run that stopped, hung or was killed goes on
#   --dry_run        print the commands and run nothing
#
# Interrupted, it saves and ends; the same command goes on.
set -euo pipefail

source "$(dirname "$0")/common.sh"
extra=cuda gpus=''
parse "workdir gpus extra retries" "" "$@"
need workdir runs/mine
need_number retries
need_args

if [[ $workdir != *://* ]]; then workdir=$(realpath -m "$workdir"); fi
cd "$(dirname "$0")/.."
visible=()
if [[ -n $gpus ]]; then visible=(env "CUDA_VISIBLE_DEVICES=$gpus"); fi
run launch/worker.sh "$extra$(store)"
retry "${visible[@]}" launch/worker.sh "$extra$(store)" --workdir="$workdir" "${args[@]}"
