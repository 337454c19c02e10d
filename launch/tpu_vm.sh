#!/usr/bin/env bash
# Trains on the hosts of a TPU slice of Google Cloud, and makes it anew when it is lost:
#   ./launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --workdir=gs://BUCKET/DIR \
#     [OPTIONS] -- --config=FILE [ARGUMENTS OF mor.main]
#
#   --name=NAME      of the slice; one that exists is used
#   --zone=ZONE      e.g. us-west4-a
#   --type=TYPE      v5litepod-256, v5p-64, v6e-64, …
#   --workdir=URL    of the run; all hosts and all later slices see it
#   --version=IMAGE  of the hosts; default by type
#   --project=ID     default gcloud's
#   --spot           cheap, and taken away at any time
#   --retries=100    how often a run that stopped, hung or lost its slice goes on
#   --delete         delete the slice at the end, whatever the end
#   --dry_run        print the commands and run nothing
#
# The committed tree is copied to every host. Interrupted, the hosts save and end; the
# same command goes on.

# shellcheck disable=SC2329 # `retry` calls the functions
set -euo pipefail

source "$(dirname "$0")/common.sh"
name='' zone='' type='' version='' project='' spot=false delete=false
parse "name zone type workdir version project retries" "spot delete" "$@"
need name mor
need zone us-west4-a
need type v5litepod-256
need workdir gs://BUCKET/DIR
need_number retries
need_args
[[ $workdir == gs://* ]] || wrong "--workdir=$workdir is not seen by all hosts; use gs://BUCKET/DIR"
case $type in
  v5litepod-*) image=v2-alpha-tpuv5-lite ;;
  v5p-*) image=v2-alpha-tpuv5 ;;
  v6e-*) image=v2-alpha-tpuv6e ;;
  *) image='' ;;
esac
version=${version:-$image}
[[ -n $version ]] || wrong "--type=$type has no image that this script knows; add --version=IMAGE"

cd "$(dirname "$0")/.."
where=("--zone=$zone")
if [[ -n $project ]]; then where+=("--project=$project"); fi
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT

queued() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
vm() { run gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
hosts() { vm ssh "$name" --worker=all --command="$1"; }
ready() { [[ $(vm describe "$name" --format='value(state)' 2>/dev/null) == READY ]]; }

create() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version")
  if [[ $spot == true ]]; then options+=(--spot); fi
  queued create "${options[@]}"
}

# Waits in the queue until there is a slice whose hosts are up.
ensure() {
  if [[ $dry_run == true ]]; then create; return; fi
  while true; do
    case $(queued describe --format='value(state.state)' 2>/dev/null || echo NONE) in
      NONE) create || return ;;
      ACTIVE) ready && return; queued delete --force --quiet || return ;;
      FAILED | SUSPENDED) queued delete --force --quiet || return ;;
    esac
    sleep "${PAUSE:-30}"
  done
}

# The tree, and the command that installs and runs it; what an earlier connection left
# behind is stopped first, for it holds the chips.
train() {
  local command
  run git archive --format=tar.gz --prefix=mor/ -o "$files/mor.tar.gz" HEAD
  command=$(quoted mor/launch/worker.sh "tpu$(store)" --distributed=auto --workdir="$workdir" "${args[@]}")
  vm scp "$files/mor.tar.gz" "$name:mor.tar.gz" --worker=all || return
  hosts "pkill -TERM -f '[m]or\.main' && sleep 60; tar -xzf mor.tar.gz && $command; echo mor: exit status \$?"
}

# gcloud does not pass on what each host said, so each host prints it.
outcome() {
  local status=$1 statuses
  if ! ready; then return 143; fi  # taken away: what the others said of it does not count
  mapfile -t statuses < <(sed -n 's/.*mor: exit status \([0-9]*\).*/\1/p' "$files/log")
  if ((${#statuses[@]} == 0)); then return 255; fi
  for status in "${statuses[@]}"; do
    if ((status)) && ! resumable "$status"; then return "$status"; fi
  done
  for status in "${statuses[@]}" "$1"; do
    if ((status)); then return 255; fi
  done
}

attempt() {
  ensure || return
  if [[ $dry_run == true ]]; then train; return; fi
  local status=0
  train 2>&1 | tee "$files/log" || status=$?
  outcome "$status"
}

interrupt() { hosts "pkill -TERM -f '[m]or\.main'" || kill -TERM "$child"; }

status=0
retry attempt || status=$?
if [[ $delete == true ]]; then queued delete --force --quiet; fi
exit $status
