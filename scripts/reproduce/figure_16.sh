#!/usr/bin/env bash
# Figure 16: perplexity against context on Books, with fine-tuned Transformers; by size, as in the paper, and by model. figure_16.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

grid "$books" "$contexts" "$sizes" "ttt_linear ttt_mlp transformer"
finetune "$contexts" "$sizes"
draw figure_16 context "${grid_runs[@]}" --lines model
draw figure_16_by_model context "${grid_runs[@]}" --lines size
