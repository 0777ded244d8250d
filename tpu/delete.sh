#!/usr/bin/env bash
# Deletes a slice, and with it what it costs.
#   tpu/delete.sh --name=run1 --zone=us-west4-a [--direct]
set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
case "${rest[*]-}" in
  "") run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet ;;
  --direct) run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet ;;
  *) fail "unknown argument ${rest[0]}. Valid: --name= --zone= --project= --direct --dry_run" ;;
esac
