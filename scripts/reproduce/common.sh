# shellcheck shell=bash
# Reproduce the figures and tables of the paper: the same ttt sweep, eval, inspect and plot at two scales. Sourced by the
# scripts of this folder, one for each figure or table. docs/reproduce.md has the pictures.
#
#   bash scripts/reproduce/figure_10.sh [--scale tiny]       trains, evaluates and draws; minutes on two CPU cores
#   bash scripts/reproduce/figure_10.sh --scale paper --bucket gs://BUCKET/reproduce --pile gs://BUCKET/pile \
#       --books gs://BUCKET/books --accelerator v5litepod-256 --zone ZONE [--spot]      prints the commands
#   ... --run                                                runs them, too; evaluations on --eval-accelerator v5litepod-8
#
# At both scales:
#   --mixers A,B --sizes A,B --contexts A,B    fewer or other runs than the figure has, by the names of configs/paper.py;
#                         for table_1, --mixers names its rungs
#   --mini-batches A,B    mini-batch sizes of figure_7
#   --out DIR             folder of pictures, and at tiny scale of runs (default: runs/reproduce)
# At tiny scale:
#   --data DIR            dataset of ttt tokenize --tokenizer byte (default: the embedded corpus); its runs have their own
#                         folder
#   --steps N             shorter runs, in their own folder
#   --jobs N              runs at a time (default: 2)
#
# All scripts share one folder of runs, so no run is trained twice.

# shellcheck disable=SC2034  # the scripts that source this file use several variables

options() {
    scale=tiny out=runs/reproduce chosen_mixers='' chosen_sizes='' chosen_contexts='' mini_batches=''
    data='' steps='' jobs=2
    bucket='' data_pile='' data_books='' accelerator='' eval_accelerator=v5litepod-8 zone='' spot='' really=''
    while [ $# -gt 0 ]; do
        case "$1" in
            --spot) spot=yes && shift && continue ;;
            --run) really=yes && shift && continue ;;
            --help) sed -n '2,/^$/s/^#\{0,1\} \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        esac
        [ $# -gt 1 ] || fail "$1: expected an option and its value; --help lists them"
        case "$1" in
            --scale) scale="$2" ;;
            --out) out="$2" ;;
            --bucket) bucket="${2%/}" ;;
            --pile) data_pile="$2" ;;
            --books) data_books="$2" ;;
            --accelerator) accelerator="$2" ;;
            --eval-accelerator) eval_accelerator="$2" ;;
            --zone) zone="$2" ;;
            --data) data="$2" ;;
            --steps) steps="$2" ;;
            --jobs) jobs="$2" ;;
            --mixers) chosen_mixers="$2" ;;
            --mini-batches) mini_batches="$2" ;;
            --sizes) chosen_sizes="$2" ;;
            --contexts) chosen_contexts="$2" ;;
            *) fail "$1: no such option; --help lists them" ;;
        esac
        shift 2
    done
    case "$scale" in
        tiny)
            # One text stands for both datasets, so that figures share their runs.
            file=tiny shorter=16 pile=books books=books data_books="${data:-embedded}" evaluated=65536
            sizes='125m 350m 760m' contexts='2k 8k 32k' layers=0,1 published=()
            [ -z "$steps" ] || evaluated=8192
            runs="$out/tiny${data:+-$(basename "$data")}${steps:+-$steps-steps}" pictures="$runs"
            really=yes
            ;;
        paper)
            file=paper shorter=1 pile=pile books=books evaluated=16777216
            sizes='125m 350m 760m 1.3b' contexts='1k 2k 4k 8k 16k 32k' layers=0-2 published=(--published)
            pictures="$out/paper" runs="$bucket"
            [ -z "$steps$data" ] || fail "--steps, --data: expected --scale tiny"
            [ -n "$bucket" ] || fail "--bucket: missing; expected where runs live, such as gs://BUCKET/reproduce"
            [ -n "$accelerator" ] || fail "--accelerator: missing; expected a TPU slice, such as v5litepod-256"
            [ -n "$zone" ] || fail "--zone: missing; expected a zone of Google Cloud, such as us-west4-a"
            ;;
        *) fail "--scale $scale: expected tiny or paper" ;;
    esac
}

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# chosen DEFAULT CHOICE: print the names of the choice (a,b), or the default names (a b).
chosen() {
    echo "${2:-$1}" | tr ',' ' '
}

# tokens 2k: print the number of tokens of a context at this scale.
tokens() {
    echo $((${1%k} * 1024 / shorter))
}

# dataset_of RECIPE: print the dataset of a recipe; recipes of configs/ablation.py use the Pile.
dataset_of() {
    local name="$pile" at
    case "$1" in *-books-*) name=books ;; esac
    case "$name" in books) at="$data_books" ;; *) at="$data_pile" ;; esac
    [ -n "$at" ] || fail "--$name: missing; expected a dataset of ttt tokenize, such as gs://BUCKET/$name"
    echo "$at"
}

# chips_for RECIPE: print the accelerator; at long contexts, the rows of the 125m cannot be split over 256 chips.
chips_for() {
    case "${accelerator:-here}:$1" in
        v5litepod-256:*-125m-*-16k) echo v5litepod-128 ;;
        v5litepod-256:*-125m-*-32k) echo v5litepod-64 ;;
        *) echo "${accelerator:-here}" ;;
    esac
}

# workdir FOLDER RECIPE: print the workdir that ttt sweep gives to the run of a recipe.
workdir() {
    local stem="$file"
    [[ "$2" == *-* ]] || [ "$file" = tiny ] || stem=ablation
    echo "$runs/$1/$stem.$2"
}

# config RECIPE: print the config file and its argument.
config() {
    local stem="$file"
    [[ "$1" == *-* ]] || [ "$file" = tiny ] || stem=ablation
    echo "configs/$stem.py:$1"
}

# train FOLDER RECIPE... [-- OPTIONS]: run a sweep of the recipes, without those that are done.
train() {
    local folder="$1" recipes=() recipe accelerators chips command text
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do recipes+=("$1") && shift; done
    [ $# -eq 0 ] || shift
    text=$(dataset_of "${recipes[0]}")
    accelerators=$(for recipe in "${recipes[@]}"; do chips_for "$recipe"; done | sort -u)
    for chips in $accelerators; do
        command=(ttt sweep)
        for recipe in "${recipes[@]}"; do
            [ "$(chips_for "$recipe")" != "$chips" ] || command+=(--config "$(config "$recipe")")
        done
        command+=("--config.data.source=$text" "$@" --workdir "$runs/$folder")
        if [ "$scale" = tiny ]; then
            command+=(${steps:+"--config.training.duration=$steps steps"} --jobs "$jobs")
        else
            command+=(-- launch tpu --accelerator "$chips" --zone "$zone" ${spot:+--spot})
        fi
        do_ "${command[@]}"
    done
}

# evaluate CONTEXT WORKDIR...: evaluate runs at a context; locally, only runs without that evaluation.
evaluate() {
    local length windows left=() each
    length=$(tokens "$1") && shift
    windows=$((evaluated / length))
    for each in "$@"; do [ -f "$each/eval/validation-$length.json" ] || left+=("$each"); done
    [ ${#left[@]} -gt 0 ] || return 0
    there eval --workdir "${left[@]}" --context "$length" --max-windows "$windows"
}

# inspect CONTEXT WORKDIR: inspect the inner loop of a run.
inspect() {
    local length
    length=$(tokens "$1")
    [ ! -f "$2/inspect/validation-$length.json" ] || return 0
    there inspect --workdir "$2" --context "$length"
}

# there VERB ...: run a command of ttt here, or on a host with TPUs at the scale of the paper.
there() {
    if [ "$scale" = tiny ]; then
        do_ ttt "$@"
    else
        local name
        name="reproduce-$1-$(cksum <<<"$*" | cut -d ' ' -f 1)"
        do_ ttt launch tpu --name "$name" --accelerator "$eval_accelerator" --zone "$zone" ${spot:+--spot} -- "$@"
    fi
}

# draw NAME KIND ARGUMENTS...: draw a picture as .png and .svg.
draw() {
    local name="$1" kind="$2"
    shift 2
    do_ ttt plot "$kind" "$@" --output "$pictures/$name.png" --output "$pictures/$name.svg"
}

# grid DATASET CONTEXTS SIZES MIXERS: train and evaluate all combinations, or those that are chosen, and set `grid_runs`
# to their workdirs.
grid() {
    local dataset="$1" mixers contexts sizes context mixer size recipes=()
    contexts=$(chosen "$2" "$chosen_contexts") sizes=$(chosen "$3" "$chosen_sizes") mixers=$(chosen "$4" "$chosen_mixers")
    for context in $contexts; do
        for size in $sizes; do
            for mixer in $mixers; do recipes+=("$mixer-$size-$dataset-$context"); done
        done
    done
    train "$dataset" "${recipes[@]}"
    grid_runs=()
    for context in $contexts; do evaluate_recipes "$dataset" "$context" "${recipes[@]}"; done
}

# finetune CONTEXTS SIZES: fine-tune Transformers, if chosen, from 2k of Books to longer contexts, and add them to
# `grid_runs`.
finetune() {
    local contexts sizes context size recipes base
    case ",${chosen_mixers:-transformer}," in *,transformer,*) ;; *) return 0 ;; esac
    contexts=$(chosen "$1" "$chosen_contexts") sizes=$(chosen "$2" "$chosen_sizes")
    for size in $sizes; do
        recipes=()
        for context in $contexts; do
            case "$context" in 1k | 2k) ;; *) recipes+=("transformer_finetune-$size-$books-$context") ;; esac
        done
        [ ${#recipes[@]} -gt 0 ] || continue
        base="transformer-$size-$books-2k"
        train "$books" "$base"
        train "finetune-$size" "${recipes[@]}" -- "--config.training.start_from=$(workdir "$books" "$base")"
        for context in $contexts; do evaluate_recipes "finetune-$size" "$context" "${recipes[@]}"; done
    done
}

# evaluate_recipes FOLDER CONTEXT RECIPE...: evaluate the recipes with this context, and add them to `grid_runs`.
evaluate_recipes() {
    local folder="$1" context="$2" recipe found=()
    shift 2
    for recipe in "$@"; do
        [[ "$recipe" != *-"$context" ]] || found+=("$(workdir "$folder" "$recipe")")
    done
    [ ${#found[@]} -gt 0 ] || return 0
    evaluate "$context" "${found[@]}"
    grid_runs+=("${found[@]}")
}

# do_ COMMAND...: print a command as one would type it, and run it.
do_() {
    local word line=''
    for word in "$@"; do
        case "$word" in *[\ \'\"]* | '') word="'$word'" ;; esac
        line+="$word "
    done
    echo "${line% }"
    [ -z "$really" ] || "$@"
}
