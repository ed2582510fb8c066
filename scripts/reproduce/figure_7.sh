#!/usr/bin/env bash
# Figure 7: perplexity, and the time of a training step, by the mini-batch size b of the inner loop. figure_7.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

values="${mini_batches:-pow2:1:$(tokens 2k)}"
train mini-batch "ttt_linear-125m-$pile-2k" -- --grid "model.ttt.mini_batch=$values"
of_b=()
for ((b = 1; b <= $(tokens 2k); b *= 2)); do
    case ",${mini_batches:-$b}," in *",$b,"*) of_b+=("$runs/mini-batch/mini_batch=$b") ;; esac
done
evaluate 2k "${of_b[@]}"
draw figure_7 mini-batch "${of_b[@]}" "${published[@]}"
