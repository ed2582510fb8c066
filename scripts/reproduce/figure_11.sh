#!/usr/bin/env bash
# Figure 11: perplexity against training FLOPs on Books, at 2k and 32k. figure_11.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

grid "$books" "2k 32k" "$sizes" "ttt_linear ttt_mlp ttt_linear_t ttt_mlp_t transformer"
draw figure_11 flops "${grid_runs[@]}"
