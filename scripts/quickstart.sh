#!/usr/bin/env bash
# Go from a bare machine to a picture: install into .venv, train a TTT-Linear, a TTT-MLP and a Transformer on the
# embedded corpus, evaluate each by token index, and draw the three in one figure. Takes under two minutes on two
# cores, without the installation.
#
#   bash scripts/quickstart.sh
#
# Run again, the script continues where it was stopped. Arguments such as --config.training.duration="1000 steps" are
# passed to `ttt train`; OUT sets another folder than runs/quickstart, CONTEXT another context.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
source scripts/environment.sh

out="${OUT:-runs/quickstart}"
context="${CONTEXT:-2048}"
mixers=(ttt_linear ttt_mlp attention)
started=$SECONDS
if grep -qsE '\[(madvise|always)\]' /sys/kernel/mm/transparent_hugepage/enabled; then
    # Use huge pages for the arrays of a step: on a CPU, page faults otherwise take a third of its time.
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi

echo "Installing into .venv"
install_environment "" --no-compile # Python compiles what it imports; pip would compile everything, which takes seconds
for mixer in "${mixers[@]}"; do
    echo "Training $mixer"
    ttt train --config "configs/quickstart.py:$mixer" --workdir "$out/$mixer" "$@"
done
ttt eval --workdir "${mixers[@]/#/$out/}" --context "$context" --max-windows 64 --batch-size 4
ttt plot loss-by-position "${mixers[@]/#/$out/}" --context "$context" --output "$out/loss-by-position.png"
echo "Done in $((SECONDS - started)) s. The picture: $PWD/$out/loss-by-position.png"
