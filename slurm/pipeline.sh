#!/bin/bash
# Pretrain, finetune, evaluate: each begins when the one before has succeeded.
# Written by `tinyllava launch pipeline`. DRY_RUN=1 prints the commands only.
set -euo pipefail                                          # an error ends the script
export RECIPE=${RECIPE-tinyllava_base}                     # `tinyllava recipes` lists them; or a JSON file
export OUT=${OUT-runs/$(basename -- "$RECIPE" .json)}      # weights, checkpoints, logs: where all nodes see it
export PRETRAIN_DATA=${PRETRAIN_DATA-data/llava/blip_laion_cc_sbu_558k.json} # training data; empty: the recipe's
export PRETRAIN_IMAGES=${PRETRAIN_IMAGES-data/llava/llava_pretrain/images} # folder of the images; empty: the recipe's
export FINETUNE_DATA=${FINETUNE_DATA-data/llava/llava_v1_5_mix665k.json} # training data; empty: the recipe's
export FINETUNE_IMAGES=${FINETUNE_IMAGES-data/llava}       # folder of the images; empty: the recipe's
export EVAL_DATA=${EVAL_DATA-data/eval}                    # the benchmarks' own files
export BENCH=${BENCH-gqa,textvqa,scienceqa,pope,mme}       # as `tinyllava eval` takes it

unset STAGE START MODEL                                    # each job knows its own
here=$(dirname -- "$0")                                    # the scripts of the three jobs are beside this one
# sbatch works on a copy
[ -e "$here/pretrain.sh" ] || { echo "use bash, not sbatch: this script submits the jobs" >&2; exit 1; }
after=()                                                   # what the first job waits for: nothing
if [ "${DRY_RUN-}" = 1 ]; then submit=(bash); else         # each prints its command
  read -r -a submit <<<"${SBATCH-sbatch}"                  # SBATCH='sbatch --partition=gpu --nodes=4' is for all three
  submit+=(--parsable)                                     # print the number of the job, nothing else
fi                                                         # now submit

# further words are for both stages
id=$(DATA=$PRETRAIN_DATA IMAGES=$PRETRAIN_IMAGES "${submit[@]}" "${after[@]}" "$here/pretrain.sh" "$@")
echo "pretrain: $id"                                       # to look it up in squeue

# the next one waits for it, and is canceled if it fails
[ "${DRY_RUN-}" = 1 ] || after=(--kill-on-invalid-dep=yes --dependency="afterok:${id%%;*}")

# from what the first has saved
id=$(DATA=$FINETUNE_DATA IMAGES=$FINETUNE_IMAGES "${submit[@]}" "${after[@]}" "$here/finetune.sh" "$@")
echo "finetune: $id"                                       # to look it up in squeue

# the next one waits for it, and is canceled if it fails
[ "${DRY_RUN-}" = 1 ] || after=(--kill-on-invalid-dep=yes --dependency="afterok:${id%%;*}")

# the finished model
id=$(DATA=$EVAL_DATA "${submit[@]}" "${after[@]}" "$here/evaluate.sh")
echo "evaluate: $id"                                       # to look it up in squeue
