# Sourced by the scripts beside it: options, dry runs, retries.
# shellcheck shell=bash disable=SC2034 # the scripts use what `parse` sets

STOPPED=75 HUNG=76  # statuses of mor.main after which the same command goes on
workdir='' retries=100 dry_run=false

# The comment at the top of the script.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# WHAT, VALUE and REMEDY as one line, and status 2.
wrong() {
  echo "error: $*" >&2
  exit 2
}

# parse "NAMES" "SWITCHES" ARGUMENTS: sets $name of --name=value, $switch to true, and
# `args` to what follows --.
parse() {
  local values=" $1 " switches=" $2 dry_run " option
  shift 2
  args=()
  while (($#)); do
    option=${1#--} option=${option%%=*}
    case $1 in
      --) args=("${@:2}"); return ;;
      --help | -h) usage; exit ;;
      --*=*) [[ $values == *" $option "* ]] || wrong "--$option is no option with a value; --help lists all"
             printf -v "$option" %s "${1#*=}" ;;
      --*) [[ $switches == *" $option "* ]] || wrong "--$option is no switch; --help lists all, values are --name=value"
           printf -v "$option" true ;;
      *) wrong "'$1' is no option; arguments of mor.main come after --" ;;
    esac
    shift
  done
}

# need NAME EXAMPLE: stops where --NAME was not given.
need() { [[ -n ${!1:-} ]] || wrong "--$1 is not given; add --$1=$2"; }

need_number() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || wrong "--$1=${!1} is no number; use 1 or more"; }

need_args() {
  ((${#args[@]})) || wrong "there is nothing to train; add -- --config=FILE and other arguments of mor.main"
}

# The bucket's library, by the scheme of --workdir.
store() { if [[ $workdir == gs://* ]]; then echo ,gcs; fi; }

# A command as it could be typed; %q would escape more than it must.
quoted() {
  local word line=
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    line+=" $word"
  done
  echo "${line# }"
}

# Runs a command, or prints it with --dry_run.
run() {
  if [[ $dry_run == true ]]; then quoted "$@"; else "$@"; fi
}

# Whether a status means that the same command can go on: not success, not a mistake
# (2) nor divergence or a crash (1), not a program that is missing (126, 127). What is
# left is a run that stopped and saved, one that hung, and one that was killed.
resumable() {
  case $1 in 0 | 1 | 2 | 126 | 127) return 1 ;; esac
}

# Asks the run of `retry` to save and end.
interrupt() { kill -TERM "$child" 2>/dev/null; }

# retry COMMAND: runs it until its status is not resumable, at most $retries times more;
# an interrupt is passed on, and ends it.
retry() {
  local status left=$retries child stopped=false seen
  if [[ $dry_run == true ]] && ! declare -F "$1" >/dev/null; then run "$@"; return; fi
  while true; do
    "$@" &
    child=$!
    trap 'stopped=true; interrupt' INT TERM
    seen=false
    while true; do  # a signal ends `wait` before the run has ended
      status=0
      wait $child || status=$?
      if [[ $stopped == "$seen" ]] && ! kill -0 $child 2>/dev/null; then break; fi
      seen=$stopped
    done
    trap - INT TERM
    if [[ $stopped == true ]] || ! resumable $status; then return $status; fi
    if ((left == 0)); then
      echo "status $status after $retries retries; run the same command to go on" >&2
      return $status
    fi
    left=$((left - 1))
    echo "status $status; going on, $left retries left" >&2
    sleep "${PAUSE:-10}"
  done
}
