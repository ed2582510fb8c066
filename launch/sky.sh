#!/usr/bin/env bash
# What `ttt launch sky` runs on the machines that SkyPilot makes, from the source tree that it has unpacked there.
#
#   sky.sh setup PYTHON EXTRAS         makes ../venv: Python and all packages, in the versions of launch-constraints.txt
#   sky.sh run tpu|cuda|cpu ARGUMENTS... runs `ttt ARGUMENTS...`, in the place of this shell, so that it gets its signals
set -euo pipefail

source_tree="$(cd "$(dirname "$0")/.." && pwd)"
venv="$(dirname "$source_tree")/venv"

find_uv() {
    local here="$HOME/.local/bin/uv"
    if command -v uv; then
        return
    fi
    if [ ! -x "$here" ]; then
        here="$venv-uv/bin/uv"
        [ -x "$here" ] || python3 -m pip install --quiet --disable-pip-version-check --target "$venv-uv" uv >&2
    fi
    echo "$here"
}

setup() {
    local python="$1" extras="$2" uv
    uv="$(find_uv)"
    "$uv" venv --quiet --allow-existing --python "$python" "$venv"
    "$uv" pip install --quiet --python "$venv/bin/python" --constraint "$source_tree/launch-constraints.txt" \
        --editable "${source_tree}[$extras]"
}

run() {
    local platform="$1"
    shift
    # Hosts of a TPU slice find each other. Of other nodes the first one is where they meet.
    if [ "$platform" != tpu ] && [ "${SKYPILOT_NUM_NODES:-1}" -gt 1 ]; then
        export JAX_COORDINATOR_ADDRESS="${SKYPILOT_NODE_IPS%%$'\n'*}:8476"
        export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"
    fi
    cd "$source_tree"
    export PYTHONUNBUFFERED=1 PATH="$venv/bin:$PATH"
    exec ttt "$@"
}

"$@"
