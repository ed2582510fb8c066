#!/usr/bin/env bash
# What `ttt launch sky` runs on the machines that SkyPilot makes, from the source tree that is unpacked there, after
# install.sh ../venv: runs `ttt ARGUMENTS...`, in the place of this shell, so that it gets its signals.
#
#   sky.sh tpu|cuda|cpu ARGUMENTS...
set -euo pipefail

platform="$1"
shift
# Hosts of a TPU slice find each other. Other nodes meet at the first one.
if [ "$platform" != tpu ] && [ "${SKYPILOT_NUM_NODES:-1}" -gt 1 ]; then
    export JAX_COORDINATOR_ADDRESS="${SKYPILOT_NODE_IPS%%$'\n'*}:8476"
    export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
fi
cd "$(dirname "$0")/.."
PATH="$(dirname "$PWD")/venv/bin:$PATH"
export PATH PYTHONUNBUFFERED=1
exec ttt "$@"
