#!/usr/bin/env bash
# Asks for a slice and waits until it is there.
#   tpu/create.sh --name=run1 --zone=us-west4-a --type=v5litepod-16 [--version=v2-alpha-tpuv5-lite] [--spot] [--direct]
# A queued resource by default, which Google fills when it can; --direct takes a slice now or fails.
set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
type=v5litepod-16 version="" spot=() direct=false
for argument in "${rest[@]}"; do
  case "$argument" in
    --type=*) type=${argument#*=} ;;
    --version=*) version=${argument#*=} ;;
    --spot) spot=(--spot) ;;
    --direct) direct=true ;;
    *) fail "unknown argument $argument. Valid: --name= --zone= --project= --type= --version= --spot --direct --dry_run" ;;
  esac
done
if [[ -z $version ]]; then
  case "$type" in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) fail "no runtime version is known for $type: give --version=. Known: v5litepod-*, v5p-*, v6e-*" ;;
  esac
fi
if $direct; then
  run gcloud compute tpus tpu-vm create "$name" "${where[@]}" "--accelerator-type=$type" "--version=$version" "${spot[@]}"
  exit
fi
run gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" \
  "--accelerator-type=$type" "--runtime-version=$version" "${spot[@]}"
if $dry_run; then
  echo "# then waits until the queued resource $name is ACTIVE"
  exit
fi
while true; do
  now=$(state)
  echo "$(date +%T) $name: ${now:-unknown}"
  case "$now" in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) fail "$name is $now: delete it with tpu/delete.sh --name=$name" ;;
  esac
  sleep 30
done
