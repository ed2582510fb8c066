#!/usr/bin/env bash
# Makes an environment with Python and all packages, in the versions of launch-constraints.txt of this source tree:
#
#   install.sh VENV PYTHON EXTRAS
#
# Images of TPU hosts have Python 3.10; uv brings another one. --target needs no permission of the system.
set -euo pipefail

venv="$1" python="$2" extras="$3"
source_tree="$(cd "$(dirname "$0")/.." && pwd)"
PATH="$PATH:$HOME/.local/bin:$venv-uv/bin"
if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --disable-pip-version-check --target "$venv-uv" uv >&2
fi
uv venv --quiet --allow-existing --python "$python" "$venv"
uv pip install --quiet --python "$venv/bin/python" --constraint "$source_tree/launch-constraints.txt" \
    --editable "${source_tree}[$extras]"
