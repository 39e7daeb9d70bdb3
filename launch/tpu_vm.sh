#!/usr/bin/env bash
# Trains on the chips of this one TPU VM host. Arguments go to the trainer:
#   launch/tpu_vm.sh --config=experiments/configs/NAME.py --workdir=runs/NAME --config.mesh.fsdp=4
# Install once: pip install -c constraints.txt -e '.[tpu]'
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${TPU_WORKER_HOSTNAMES:-} == *,* ]]; then
  echo "this slice has several hosts (TPU_WORKER_HOSTNAMES); use launch/tpu_pod.sh" >&2
  exit 2
fi
export JAX_PLATFORMS=tpu,cpu # fail rather than fall back to the CPU
exec python -m prolong_jax.train "$@"
