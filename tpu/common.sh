# shellcheck shell=bash
# Sourced by the other scripts: flags as --name=value, --dry_run, and running or printing a command.

dry_run=false
name=peftree
zone=us-central2-b
project=""
rest=()

fail() {
  echo "error: $*" >&2
  exit 2
}

# Reads --name, --zone, --project, --dry_run; what it doesn't know goes to `rest`.
parse() {
  rest=()
  for argument in "$@"; do
    case "$argument" in
      --dry_run) dry_run=true ;;
      --name=*) name=${argument#*=} ;;
      --zone=*) zone=${argument#*=} ;;
      --project=*) project=${argument#*=} ;;
      *) rest+=("$argument") ;;
    esac
  done
  where=("--zone=$zone")
  if [[ -n $project ]]; then where+=("--project=$project"); fi
}

# Reads the flags before "--" into `own` and the command after it into `command`.
split() {
  own=()
  while (($#)) && [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  (($# > 1)) || fail "no command: give it after --, as in tpu/${0##*/} --name=run1 -- python -m experiments.classify"
  # shellcheck disable=SC2034  # the caller reads it
  command=("${@:2}")
}

# Prints a command so that a shell would read it back, and runs it unless --dry_run.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  if ! $dry_run; then "$@"; fi
}

# on_workers WORKER COMMAND: through ssh, on one worker or "all".
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

# The state of the queued resource: ACTIVE, SUSPENDED, FAILED, ..., or nothing where there is none.
state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)" 2>/dev/null || true
}
