#!/usr/bin/env bash
# Copies this checkout to all workers of a slice and installs it there.
#   tpu/setup.sh --name=run1 --zone=us-west4-a
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=tpu/common.sh
source "$here/tpu/common.sh"
parse "$@"
if ((${#rest[@]})); then fail "unknown argument ${rest[0]}. Valid: --name= --zone= --project= --dry_run"; fi
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
run tar -czf "$archive" -C "$here" --exclude=.git --exclude='__pycache__' .
run gcloud compute tpus tpu-vm scp "$archive" "$name:peftree.tar.gz" "${where[@]}" --worker=all
# shellcheck disable=SC2016  # the worker expands it
on_workers all 'mkdir -p peftree && tar -xzf peftree.tar.gz -C peftree && python3 -m venv venv && venv/bin/pip install -q -e "peftree[tpu]" && venv/bin/python -c "import jax; print(jax.__version__)"'
