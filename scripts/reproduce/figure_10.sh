#!/usr/bin/env bash
# Figure 10: perplexity against training FLOPs on the Pile, at 2k and 8k. figure_10.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

grid "$pile" "2k 8k" "$sizes" "ttt_linear ttt_mlp ttt_linear_t ttt_mlp_t transformer"
draw figure_10 flops "${grid_runs[@]}" "${published[@]}"
