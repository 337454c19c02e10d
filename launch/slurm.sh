#!/usr/bin/env bash
# Submits a run to SLURM, one process a GPU; it is queued again until it is done:
#   ./launch/slurm.sh --name=NAME --time=HH:MM:SS --workdir=DIR [OPTIONS] \
#     -- --config=FILE [ARGUMENTS OF mor.main]
#
#   --name=NAME      of the job
#   --time=HH:MM:SS  a submission's limit; the run saves two minutes before it
#   --workdir=DIR    of the run, where all nodes see it
#   --nodes=1        machines
#   --gpus=8         of each
#   --partition=P    default SLURM's; --account=A likewise
#   --extra=cuda     or cuda12, of setup.py
#   --retries=100    how often a run that stopped, hung or was killed is queued again
#   --dry_run        print the batch script and the command, and submit nothing
#
# Installs here, so this directory must be one that the nodes see.
set -euo pipefail

source "$(dirname "$0")/common.sh"
name='' time='' nodes=1 gpus=8 partition='' account='' extra=cuda
parse "name time workdir nodes gpus partition account extra retries" "" "$@"
need name mor
need time 24:00:00
need workdir /shared/runs/mine
for number in nodes gpus retries; do need_number $number; done
need_args

if [[ $workdir != *://* ]]; then workdir=$(realpath -m "$workdir"); fi
cd "$(dirname "$0")/.."

# The job. TERM goes to the processes, which save and end with 75; the script then
# queues the job again, as SLURM itself does when it is preempted or a node fails.
script() {
  cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --time=$time
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=$name-%j.log
EOF
  if [[ -n $partition ]]; then echo "#SBATCH --partition=$partition"; fi
  if [[ -n $account ]]; then echo "#SBATCH --account=$account"; fi
  cat <<EOF
set -uo pipefail
source launch/common.sh
status=0
$(quoted srun --kill-on-bad-exit=1 .venv/bin/python -m mor.main --distributed=auto --workdir="$workdir" "${args[@]}") || status=\$?
if resumable \$status && ((\${SLURM_RESTART_COUNT:-0} < $retries)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
EOF
}

run launch/worker.sh "$extra$(store)"
if [[ $dry_run == true ]]; then
  script
  run sbatch --parsable
else
  script | sbatch --parsable
fi
