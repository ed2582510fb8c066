# shellcheck shell=bash
# Make .venv with this package in it, and put it on PATH. Sourced by the other scripts.
#
#   install_environment EXTRAS [OPTION ...]
#
# EXTRAS is "", "[dev]" or similar; the options are those of pip install. PYTHON chooses the interpreter (default:
# python3).

install_environment() {
    local extras="$1" python="${PYTHON:-python3}" wanted
    shift
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "ttt_jax needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to one that is." >&2
        return 1
    fi
    [ -x .venv/bin/python ] || "$python" -m venv .venv || {
        echo "could not make .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    }
    wanted="$extras $(cat setup.py constraints.txt ttt_jax/__init__.py | cksum)"
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" -c constraints.txt -e ".$extras" || return 1
        echo "$wanted" > .venv/installed
    fi
    PATH="$PWD/.venv/bin:$PATH"
    export PATH
}
