#!/usr/bin/env bash
# Runs a command until it ends well: after a preemption deletes the slice, asks for another, sets it up and runs the
# command again, which goes on from its newest checkpoint (--workdir must outlive the slice: a mounted bucket or disk).
#   tpu/keep_alive.sh --name=run1 --zone=us-west4-a --type=v5litepod-16 --spot -- python -m experiments.classify --workdir=/mnt/run1
# A command that fails while the slice is there is not run again: its reason would only come back.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=tpu/common.sh
source "$here/common.sh"
split "$@"
parse "${own[@]}"
common=("--name=$name" "${where[@]}")
if $dry_run; then
  "$here/create.sh" "${own[@]}"
  "$here/setup.sh" "${common[@]}" --dry_run
  "$here/run.sh" "${common[@]}" --dry_run -- "${command[@]}"
  echo "# and if the slice was preempted, again from the start after:"
  "$here/delete.sh" "${common[@]}" --dry_run
  exit
fi
while true; do
  if [[ $(state) != ACTIVE ]]; then
    if [[ -n $(state) ]]; then "$here/delete.sh" "${common[@]}"; fi
    "$here/create.sh" "${own[@]}"
    "$here/setup.sh" "${common[@]}"
  fi
  status=0
  "$here/run.sh" "${common[@]}" -- "${command[@]}" || status=$?
  if ((status == 0)); then exit 0; fi
  sleep 60 # a preemption shows in the state a little later than in ssh
  if [[ $(state) == ACTIVE ]]; then
    echo "error: the command failed with status $status while $name is ACTIVE" >&2
    exit "$status"
  fi
done
