#!/usr/bin/env bash
# Figure 15: perplexity against training FLOPs on Books, at all contexts, with fine-tuned Transformers. figure_15.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

grid "$books" "$contexts" "$sizes" "ttt_linear ttt_mlp transformer"
finetune "$contexts" "$sizes"
draw figure_15 flops "${grid_runs[@]}"
