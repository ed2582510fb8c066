#!/usr/bin/env bash
# Figure 14: the loss of the inner loop in all layers, of the 125M model of the Pile at 2k with b = 1. figure_14.sh --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=scripts/reproduce/common.sh
source scripts/reproduce/common.sh
options "$@"

train mini-batch "ttt_linear-125m-$pile-2k" -- --grid model.ttt.mini_batch=1
inspect 2k "$runs/mini-batch/mini_batch=1"
draw figure_14 inner-loss "$runs/mini-batch/mini_batch=1" --context "$(tokens 2k)"
