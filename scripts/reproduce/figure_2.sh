#!/usr/bin/env bash
# Figure 2. Left: perplexity against training FLOPs on the Pile at 8k, from 350M on. Right: perplexity by token index on
# Books at 32k, of 1.3B models with equal training FLOPs; the Transformer is one that was fine-tuned. figure_2.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

without_smallest="${sizes#125m }"
grid "$pile" 8k "$without_smallest" "ttt_linear ttt_mlp transformer"
draw figure_2_left flops "${grid_runs[@]}"

# Appendix C: other widths of the feed-forward layers, fewer blocks. At tiny scale, what has equal FLOPs there.
if [ "$scale" = paper ]; then
    linear=(--config.model.mlp_width=5808) mlp=(--config.model.mlp_width=5248) transformer=(--config.model.num_layers=19)
else
    linear=(--config.model.mlp_width=208) mlp=(--config.model.num_layers=3 --config.model.mlp_width=144)
    transformer=(--config.model.num_layers=2 --config.model.mlp_width=304)
fi
grid_runs=()
for mixer in $(chosen "ttt_linear ttt_mlp transformer" "$chosen_mixers"); do
    recipe="$mixer-1.3b-$books-32k"
    case "$mixer" in
        ttt_linear) train figure_2/linear "$recipe" -- "${linear[@]}" && folder=figure_2/linear ;;
        ttt_mlp) train figure_2/mlp "$recipe" -- "${mlp[@]}" && folder=figure_2/mlp ;;
        transformer)
            base="transformer-1.3b-$books-2k" folder=figure_2/finetuned recipe="transformer_finetune-1.3b-$books-32k"
            train figure_2/transformer "$base" -- "${transformer[@]}"
            start="--config.training.start_from=$(workdir figure_2/transformer "$base")"
            train "$folder" "$recipe" -- "${transformer[@]}" "$start"
            ;;
        *) continue ;;
    esac
    evaluate_recipes "$folder" 32k "$recipe"
done
draw figure_2_right loss-by-position "${grid_runs[@]}" --context "$(tokens 32k)" --perplexity
