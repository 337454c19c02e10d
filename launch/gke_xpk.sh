#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk, which restarts what is preempted:
#   ./launch/gke_xpk.sh --name=NAME --cluster=CLUSTER --zone=ZONE --type=TYPE \
#     --image=REGISTRY/IMAGE:TAG --workdir=gs://BUCKET/DIR [OPTIONS] \
#     -- --config=FILE [ARGUMENTS OF mor.main]
#
#   --name=NAME        of the workload
#   --cluster=CLUSTER  made before, by `xpk cluster create`
#   --zone=ZONE        of the cluster; --project=ID, default gcloud's
#   --type=TYPE        v5litepod-256, v5p-64, v6e-64, …
#   --image=IMAGE      built of the committed tree by launch/Dockerfile, and pushed
#   --workdir=URL      of the run; all hosts see it
#   --slices=1         how many of that type
#   --retries=100      how often a run that stopped, hung or was preempted goes on
#   --built            the image is there; do not build it
#   --dry_run          print the commands and run nothing
set -euo pipefail

source "$(dirname "$0")/common.sh"
name='' cluster='' zone='' project='' type='' image='' slices=1 built=false
parse "name cluster zone project type image workdir slices retries" "built" "$@"
need name mor
need cluster mine
need zone us-west4-a
need type v5litepod-256
need image REGISTRY/mor:v1
need workdir gs://BUCKET/DIR
for number in slices retries; do need_number $number; done
need_args
[[ $workdir == gs://* ]] || wrong "--workdir=$workdir is not seen by all hosts; use gs://BUCKET/DIR"

cd "$(dirname "$0")/.."
if [[ $built == false ]]; then
  build=(docker build --file=launch/Dockerfile --build-arg=EXTRAS="tpu$(store)" --tag="$image" -)
  if [[ $dry_run == true ]]; then
    echo "git archive HEAD | $(quoted "${build[@]}")"
  else
    git archive HEAD | "${build[@]}"
  fi
  run docker push "$image"
fi
command=$(quoted python -m mor.main --distributed=auto --workdir="$workdir" "${args[@]}")
options=(--workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" --num-slices="$slices"
  --docker-image="$image" --max-restarts="$retries" --restart-on-exit-codes="$STOPPED,$HUNG"
  --termination-grace-period-seconds=120)
if [[ -n $project ]]; then options+=(--project="$project"); fi
run xpk workload create "${options[@]}" --command="$command"
