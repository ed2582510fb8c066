#!/usr/bin/env bash
# From a bare machine to a picture: installs into .venv, trains a TTT-Linear, a TTT-MLP and a Transformer on the
# embedded corpus, evaluates each by token index, and draws the three on one figure. About four minutes on two cores.
#
#   bash scripts/quickstart.sh
#
# Run again, it continues where it was stopped. Arguments are passed to `ttt train`, such as
# --config.training.duration="1000 steps"; OUT chooses another folder than runs/quickstart, CONTEXT another context.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

out="${OUT:-runs/quickstart}"
context="${CONTEXT:-2048}"
mixers=(ttt_linear ttt_mlp attention)
started=$SECONDS

echo "Installing into .venv"
install_environment ""
for mixer in "${mixers[@]}"; do
    echo "Training $mixer"
    ttt train --config "configs/quickstart.py:$mixer" --workdir "$out/$mixer" "$@"
    ttt eval --workdir "$out/$mixer" --context "$context"
done
ttt plot loss-by-position "${mixers[@]/#/$out/}" --context "$context" --output "$out/loss-by-position.png"
echo "Done in $((SECONDS - started)) s. The picture: $PWD/$out/loss-by-position.png"
