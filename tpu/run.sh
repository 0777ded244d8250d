#!/usr/bin/env bash
# Runs one command on all workers and streams what they print. Ends with the status of the command.
#   tpu/run.sh --name=run1 --zone=us-west4-a -- python -m experiments.classify --workdir=/mnt/run1
set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
split "$@"
parse "${own[@]}"
if ((${#rest[@]})); then fail "unknown argument ${rest[0]}. Valid: --name= --zone= --project= --dry_run, then -- command"; fi
printf -v words ' %q' "${command[@]}"
# The log stays on each worker too, so that tpu/logs.sh can show it when this terminal has gone.
on_workers all "set -o pipefail; source venv/bin/activate && cd peftree && $words 2>&1 | tee -a ~/peftree.log"
