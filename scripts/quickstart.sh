#!/usr/bin/env bash
# From a bare machine to a picture: installs into .venv, trains a TTT-Linear, a TTT-MLP and a Transformer on the
# embedded corpus, evaluates each by token index, and draws the three on one figure. Under two minutes on two
# cores, beside the installation.
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
if grep -qsE '\[(madvise|always)\]' /sys/kernel/mm/transparent_hugepage/enabled; then
    # Huge pages for the arrays of a step: on a CPU, a third of its time goes into page faults otherwise.
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi

echo "Installing into .venv"
install_environment "" --no-compile # Python compiles what is imported; pip would compile all there is, for some seconds
for mixer in "${mixers[@]}"; do
    echo "Training $mixer"
    ttt train --config "configs/quickstart.py:$mixer" --workdir "$out/$mixer" "$@"
done
ttt eval --workdir "${mixers[@]/#/$out/}" --context "$context" --max-windows 64 --batch-size 4
ttt plot loss-by-position "${mixers[@]/#/$out/}" --context "$context" --output "$out/loss-by-position.png"
echo "Done in $((SECONDS - started)) s. The picture: $PWD/$out/loss-by-position.png"
