#!/usr/bin/env bash
# Run the benchmarks on an NVIDIA GPU: install missing packages into .venv, then time training steps and inner loops
# (scripts/bench_gpu.py lists them) in under 8 minutes. Writes bench_gpu.json and prints a table.
#
#   bash scripts/bench_gpu.sh [--output FILE] [--limit SECONDS] [--only TEXT]
#
# Where `python` already has JAX with a GPU and the other packages, nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

needed='import jax, flax, optax, ml_collections, grain; assert jax.devices()[0].platform == "gpu"'
if ! command -v nvidia-smi > /dev/null && [[ " $* " != *" --tiny"* ]]; then
    echo "bench_gpu: found no NVIDIA GPU (no nvidia-smi); expected one, or --tiny" >&2
    exit 2
fi
if ! python -c "$needed" 2> /dev/null && [[ " $* " != *" --tiny"* ]]; then
    install_environment "[cuda]"
fi
# Without preallocation, the reported peak is the memory that a step needs.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH="$PWD"
exec python scripts/bench_gpu.py "$@"
