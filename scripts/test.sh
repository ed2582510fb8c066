#!/usr/bin/env bash
# Install what the tests need into .venv, lint, check types, and run the tests.
#
#   bash scripts/test.sh            everything
#   bash scripts/test.sh --fast     without the tests marked slow
#   bash scripts/test.sh --newest   the fast tests on Python 3.13 or 3.12 with the newest packages, in .venv-newest
#   bash scripts/test.sh tests/ttt  these tests only; further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

if [ "${1:-}" = --newest ]; then
    shift
    PYTHON=$(newest_python) || { echo "skipped: no Python 3.13 or 3.12 here to run the fast tests with"; exit 0; }
    VENV=.venv-newest CONSTRAINTS=/dev/null install_environment "[dev]"
    python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
    set -- -m "not slow" "$@"
else
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
fi
unset PYTHONDONTWRITEBYTECODE # or the package and the tests are compiled again in each of many processes
export OPENBLAS_NUM_THREADS=1 # the tests share the cores already, and threads that wait for work take a part of them
SECONDS=0
python -m pytest -n 2 --dist worksteal --durations 20 "$@"
echo "tests took $SECONDS s"
