#!/usr/bin/env bash
# Trains on the GPUs of this machine. Arguments go to the trainer:
#   launch/gpu_box.sh --config=experiments/configs/NAME.py --workdir=runs/NAME --config.mesh.fsdp=8
# Install once: pip install -c constraints.txt -e '.[cuda12]'
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS=cuda,cpu # fail rather than fall back to the CPU
# JAX alone takes three quarters of the memory; compile_check counts with all of it.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.93}"
exec python -m prolong_jax.train "$@"
