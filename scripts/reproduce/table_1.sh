#!/usr/bin/env bash
# Table 1: from linear attention to TTT-Linear, 125M on the Pile at 2k. table_1.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

rungs="linear_attention equivalence learned_w0 norm_residual mini_batch learned_eta mamba_backbone"
rungs=$(chosen "$rungs" "$chosen_mixers")
# shellcheck disable=SC2086
train ablation $rungs
rows=()
for rung in $rungs; do rows+=("$(workdir ablation "$rung")"); done
evaluate 2k "${rows[@]}"
table="$pictures/table_1"
do_ ttt plot table "${rows[@]}" --published --output "$table.txt" --output "$table.tex" --output "$table.csv"
