#!/bin/bash
# Stage 2 of the share recipe: long captions, from the connector of the base recipe.
# Written by `tinyllava launch share`, which writes variants too. DRY_RUN=1 prints the command only.
#SBATCH --job-name=share                                   # name in squeue and of the log
#SBATCH --nodes=1                                          # nodes; the global batch stays the same
#SBATCH --ntasks-per-node=8                                # one process for each GPU
#SBATCH --gpus-per-node=8                                  # GPUs of a node
#SBATCH --cpus-per-task=8                                  # cores of a process, for reading images
#SBATCH --time=24:00:00                                    # time limit; a longer run is requeued and resumes
#SBATCH --signal=B:USR1@120                                # signal this script two minutes before the time limit
#SBATCH --requeue                                          # the job may be requeued
#SBATCH --open-mode=append                                 # and then appends to its log
#SBATCH --output=%x-%j.log                                 # log of this script; each rank has its own in OUT/logs

set -euo pipefail                                          # an error ends the job
# with one line that says why
die() { echo "${SLURM_JOB_NAME-dry run}: $*" >&2; exit 1; }

STAGE=${STAGE-share}                                       # of the recipe
RECIPE=${RECIPE-tinyllava_share}                           # `tinyllava recipes` lists them; or a JSON file
OUT=${OUT-runs/$(basename -- "$RECIPE" .json)}             # weights, checkpoints, logs: where all nodes see it
PLUGINS=${PLUGINS-${TINYLLAVA_PLUGINS-}}                   # Python that registers your own parts: own.py, or A:B
DATA=${DATA-data/sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json} # training data; empty: the recipe's
IMAGES=${IMAGES-data/sharegpt4v}                           # folder of the images; empty: the recipe's
START=${START-runs/tinyllava_base/pretrain}                # model to start from; empty: the parts of the recipe
PARALLEL=${PARALLEL-ddp}                                   # zero2, zero3, fsdp: for what one GPU cannot hold
DEVICE=${DEVICE-cuda}                                      # or cpu
VENV=${VENV-.venv}                                         # its bin/tinyllava is the program

# resume where an earlier job stopped
command=(train "$RECIPE" "$STAGE" --out "$OUT" --resume auto)
command+=(--parallel "$PARALLEL" --device "$DEVICE")       # parallelism and device
[ -z "$DATA" ] || command+=(--data "$DATA")                # empty: the recipe's data
[ -z "$IMAGES" ] || command+=(--images "$IMAGES")          # the same
[ -z "$START" ] || command+=(--start "$START")             # empty: from the parts of the recipe
[ -z "$PLUGINS" ] || command+=(--import "$PLUGINS")        # parts of your own
command+=("$@")                                            # words after the script's name

program=("$VENV/bin/tinyllava")                            # the exported library, and nothing else

step=(srun --kill-on-bad-exit=0 --wait=60)                 # when one rank ends, the others have a minute to save
step+=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")        # newer versions of srun do not inherit it
# a log for each rank
step+=(--open-mode=append --output="${OUT//%/%%}/logs/%x-%j-%t.log")
# shellcheck disable=SC2016
# for torch.distributed
as_rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
# the words are passed on as they are
step+=(bash -c "$as_rank" rank "${program[@]}" "${command[@]}")
# a dry run prints the command, ready to paste
if [ "${DRY_RUN-}" = 1 ]; then printf '%q ' "${step[@]}"; echo; exit 0; fi

# make quickstart installs it
[ -x "$VENV/bin/tinyllava" ] || die "no program '$VENV/bin/tinyllava' in $PWD: install it there, or say VENV=DIR"

# before any GPU waits for it
[ -z "$DATA" ] || [ -e "$DATA" ] || die "no training data at '$DATA': say DATA=FILE"
# the same for images
[ -z "$IMAGES" ] || [ -d "$IMAGES" ] || die "no images in '$IMAGES': say IMAGES=DIR"
# and for weights
[ -z "$START" ] || [ -d "$START" ] || die "no model in '$START' to start from: train it, or say START=DIR"
# a mistake in the recipe, or a global batch that these ranks cannot share equally
ranks=${SLURM_NTASKS:-$((${SLURM_NNODES:-1} * ${SLURM_NTASKS_PER_NODE:-1}))}
WORLD_SIZE=$ranks "${program[@]}" "${command[@]}" --dry-run || die "see the line above" # its own message

# or a driver that does not answer
[ "$DEVICE" != cuda ] || nvidia-smi -L >/dev/null 2>&1 ||
  die "no GPU on $(hostname): ask for --gpus-per-node, or say DEVICE=cpu"
mkdir -p -- "$OUT/logs"                                    # srun makes no folders
# the ranks meet on the first node
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# at a free port: one for each job number
export MASTER_ADDR MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
asked='' srun=''                                           # was a signal seen; the process of srun
# pass the signal to srun, which passes it to every rank: once, as SLURM may repeat it and a second one ends a rank
pass_on() { [ -n "$asked" ] || [ -z "$srun" ] || kill -USR1 "$srun"; asked=1; }
trap pass_on USR1                                          # the time limit is near, or the job is preempted
"${step[@]}" &                                             # in the background, so that the signal is seen at once
srun=$!                                                    # to be waited for
[ -z "$asked" ] || kill -USR1 "$srun"                      # the signal came before there was anybody to tell
code=0                                                     # exit code of the ranks
wait "$srun" || code=$?                                    # a signal ends the waiting, not the ranks
# so wait until they are gone
while kill -0 "$srun" 2>/dev/null; do code=0; wait "$srun" || code=$?; done
# saved, or stopped before there was anything to save
if [ "$code" = 85 ] || { [ -n "$asked" ] && [ "$code" != 0 ]; }; then
  echo "stopped with code $code: back into the queue"      # where --resume auto resumes
  scontrol requeue "$SLURM_JOB_ID"                         # under the same number
elif [ "$code" != 0 ]; then                                # a true failure
  tail -n 5 -- "$OUT/logs/"*"-$SLURM_JOB_ID-"*.log >&2 || true # what each rank said last
fi                                                         # done
exit "$code"                                               # 0 lets the next job of a chain begin
