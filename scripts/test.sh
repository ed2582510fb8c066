#!/usr/bin/env bash
# Installs what the tests need into .venv, lints, type-checks, and runs the tests.
#
#   bash scripts/test.sh            everything
#   bash scripts/test.sh --fast     without the tests marked slow
#   bash scripts/test.sh tests/ttt  these tests only; further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
install_environment "[dev]"

if [ "${1:-}" = --fast ]; then
    shift
    set -- -m "not slow" "$@"
fi
ruff check .
ruff format --check .
mypy
shellcheck scripts/*.sh scripts/reproduce/*.sh launch/*.sh launch/*.sbatch .ci/run
if command -v hadolint >/dev/null; then hadolint launch/Dockerfile; fi # its wheel is for Linux on x86_64
export OPENBLAS_NUM_THREADS=1 # the tests share the cores already, and threads that wait for work take a part of them
SECONDS=0
python -m pytest -n 2 --dist worksteal --durations 20 "$@"
echo "tests took $SECONDS s"
