# shellcheck shell=bash
# Make a virtual environment with this package in it, and put it on PATH. Sourced by the other scripts.
#
#   install_environment EXTRAS [OPTION ...]
#
# EXTRAS is for example "" or "[dev]"; the options are those of pip install. These variables are read:
#
#   PYTHON       the interpreter (default: python3)
#   VENV         the folder of the environment (default: .venv)
#   CONSTRAINTS  versions of packages (default: constraints.txt)

install_environment() {
    local extras="$1" python="${PYTHON:-python3}" venv="${VENV:-.venv}" constraints="${CONSTRAINTS:-constraints.txt}" wanted
    shift
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "ttt_jax needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON to one that is." >&2
        return 1
    fi
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
        echo "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    }
    wanted="$extras $(cat setup.py "$constraints" ttt_jax/__init__.py | cksum)"
    if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" -c "$constraints" -e ".$extras" || return 1
        echo "$wanted" > "$venv/installed"
    fi
    PATH="$PWD/$venv/bin:$PATH"
    export PATH
}

# Print the newest Python at hand, of 3.13 and 3.12, on PATH or among the versions of pyenv; fail where there is none.
newest_python() {
    local version each
    for version in 3.13 3.12; do
        for each in "$(command -v "python$version")" "$(pyenv root 2>/dev/null)/versions/$version".*/bin/python; do
            if [ -x "$each" ] && "$each" -c 'import venv' 2>/dev/null; then
                echo "$each"
                return
            fi
        done
    done
    return 1
}
