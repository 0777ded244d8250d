#!/usr/bin/env bash
# Follows the log of one worker (process 0 writes the metrics) or of all.
#   tpu/logs.sh --name=run1 --zone=us-west4-a [--worker=all]
set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
worker=0
for argument in "${rest[@]}"; do
  case "$argument" in
    --worker=*) worker=${argument#*=} ;;
    *) fail "unknown argument $argument. Valid: --name= --zone= --project= --worker= --dry_run" ;;
  esac
done
on_workers "$worker" 'tail -n 100 -F ~/peftree.log'
