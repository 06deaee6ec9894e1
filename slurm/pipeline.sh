#!/bin/bash
# A job for each stage of a recipe, then evaluation: each begins when the one before has succeeded.
# Data of a stage: <STAGE>_DATA and <STAGE>_IMAGES, such as FINETUNE_DATA; `tinyllava recipes stages NAME`
# lists the defaults. Written by `tinyllava launch pipeline`. DRY_RUN=1 prints the commands only.
set -euo pipefail                                          # an error ends the script
export RECIPE=${RECIPE-tinyllava_base}                     # `tinyllava recipes` lists them; or a JSON file
export OUT=${OUT-runs/$(basename -- "$RECIPE" .json)}      # weights, checkpoints, logs: where all nodes see it
export PLUGINS=${PLUGINS-${TINYLLAVA_PLUGINS-}}            # Python that registers your own parts: own.py, or A:B
export EVAL_DATA=${EVAL_DATA-data/eval}                    # the benchmarks' own files
export BENCH=${BENCH-gqa,textvqa,scienceqa,pope,mme}       # as `tinyllava eval` takes it
export STAGES=${STAGES-}                                   # some of the recipe's stages, apart by blanks; empty: all
export START=${START-}                                     # model that the first of them starts from; empty: as the recipe says

die() { echo "pipeline: $*" >&2; exit 1; }                 # with one line that says why
here=$(dirname -- "$0")                                    # the scripts of the jobs are beside this one
# sbatch works on a copy
[ -e "$here/finetune.sh" ] || die "use bash, not sbatch: this script submits the jobs"
program=${VENV-.venv}/bin/tinyllava                        # knows the stages of every recipe
[ -x "$program" ] || program=tinyllava                     # or the one on the PATH
# it is needed here too, not only on the nodes
command -v "$program" >/dev/null || die "no program '${VENV-.venv}/bin/tinyllava': install it there, or say VENV=DIR"
ask=("$program" recipes stages "$RECIPE")                  # stage, folder of its weights, data, images
[ -z "$PLUGINS" ] || ask+=(--import "$PLUGINS")            # parts of your own
read -r -a only <<<"$STAGES"                               # some of the stages
stages=$("${ask[@]}" "${only[@]}")                         # ends here, with its message, where there is no such recipe or stage

unset STAGE MODEL                                          # each job knows its own
after=() name=() start=$START                              # options of a job, and what it starts from
# bash prints the command of a job, sbatch submits it
if [ "${DRY_RUN-}" = 1 ]; then submit=(bash); else
  read -r -a submit <<<"${SBATCH-sbatch}"                  # SBATCH='sbatch --partition=gpu --nodes=4' is for all jobs
  submit+=(--parsable)                                     # print the number of the job, nothing else
fi                                                         # now submit

# in the order of the recipe
while IFS=$'\t' read -r -u 3 stage folder data images; do
  of=$(tr '[:lower:]' '[:upper:]' <<<"${stage//[^[:alnum:]]/_}") # SHARE, for SHARE_DATA and SHARE_IMAGES
  [ "$data" != - ] || data=''                              # the recipe's
  [ "$images" != - ] || images=''                          # the recipe's
  of_data=${of}_DATA of_images=${of}_IMAGES                # what was set from outside comes first
  job=$here/finetune.sh                                    # does for any stage
  case $stage in pretrain|share) job=$here/$stage.sh;; esac # their own
  [ "${DRY_RUN-}" = 1 ] || name=(--job-name="$stage")      # in squeue, and of the log
  with=(env STAGE="$stage" START="$start")                 # what is particular to this job
  with+=(DATA="${!of_data-$data}" IMAGES="${!of_images-$images}") # empty: the recipe's
# words of this script go to every stage
  id=$("${with[@]}" "${submit[@]}" "${name[@]}" "${after[@]}" "$job" "$@")
  echo "$stage: $id"                                       # to look it up in squeue
  start=$OUT/$folder                                       # the next stage starts from its weights
# and waits for it, and is canceled if it fails
  [ "${DRY_RUN-}" = 1 ] || after=(--kill-on-invalid-dep=yes --dependency="afterok:${id%%;*}")
done 3<<<"$stages"                                         # now what was trained last

# the finished model
id=$(MODEL=$start DATA=$EVAL_DATA "${submit[@]}" "${after[@]}" "$here/evaluate.sh")
echo "evaluate: $id"                                       # to look it up in squeue
