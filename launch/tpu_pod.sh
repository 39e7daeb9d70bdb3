#!/usr/bin/env bash
# Trains on all hosts of a TPU pod slice, one process per host. From any machine with gcloud:
#   TPU=my-slice ZONE=us-central1-a launch/tpu_pod.sh --config=... --workdir=/nfs/runs/NAME --config.mesh.fsdp=16
# Every host needs this repository at $DIRECTORY with pip install -c constraints.txt -e '.[tpu]' done;
# the workdir and the model must be on a file system that all of them mount.
set -euo pipefail
: "${TPU:?name of the TPU slice}" "${ZONE:?its zone}"
directory=${DIRECTORY:-prolong_jax}
printf -v arguments '%q ' "$@" --config.mesh.coordinator=auto
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd $directory && JAX_PLATFORMS=tpu,cpu exec python -m prolong_jax.train $arguments"
