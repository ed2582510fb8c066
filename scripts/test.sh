#!/usr/bin/env bash
# Install what the tests need into .venv, lint, check types, and run the tests.
#
#   bash scripts/test.sh            all tests
#   bash scripts/test.sh --fast     all tests that are not marked slow
#   bash scripts/test.sh tests/ttt  the tests of a folder; further arguments go to pytest
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
if command -v hadolint >/dev/null; then hadolint launch/Dockerfile; fi # its wheel exists for Linux on x86_64 only
export OPENBLAS_NUM_THREADS=1 # the tests share the cores already, and idle threads of BLAS would take time from them
SECONDS=0
python -m pytest -n 2 --dist worksteal --durations 20 "$@"
echo "tests took $SECONDS s"
