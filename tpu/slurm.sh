#!/usr/bin/env bash
# Submits one command to a SLURM cluster with GPUs: one process a node, which find each other by SLURM's variables.
#   tpu/slurm.sh --name=run1 --nodes=2 --gpus=8 --time=24:00:00 [--partition=gpu] -- python -m experiments.classify ...
# SIGTERM comes 120 s before the time limit, so that the run saves: submit the same command again and it goes on. After a
# node failure or a preemption --requeue does that by itself.
set -euo pipefail
# shellcheck source=tpu/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
split "$@"
parse "${own[@]}"
nodes=1 gpus=8 limit=24:00:00 partition=()
for argument in "${rest[@]}"; do
  case "$argument" in
    --nodes=*) nodes=${argument#*=} ;;
    --gpus=*) gpus=${argument#*=} ;;
    --time=*) limit=${argument#*=} ;;
    --partition=*) partition=("$argument") ;;
    *) fail "unknown argument $argument. Valid: --name= --nodes= --gpus= --time= --partition= --dry_run" ;;
  esac
done
printf -v words ' %q' "${command[@]}"
run sbatch "--job-name=$name" "--nodes=$nodes" --ntasks-per-node=1 "--gpus-per-node=$gpus" "--time=$limit" \
  "${partition[@]}" --requeue --signal=TERM@120 --open-mode=append "--output=$name-%j.log" \
  "--wrap=srun --kill-on-bad-exit=1$words"
