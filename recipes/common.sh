# Sourced by each build.sh: runs its steps, skips those that are complete, and makes dry runs.
#   build.sh [--dry-run] [WORK]     WORK: folder for data and runs; default: build/
# A dry run executes all steps with a tiny random model, synthetic data and one training step each.
set -euo pipefail

RECIPES=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
DRY_RUN=${DRY_RUN:-0}
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
PYTHON=${PYTHON:-python}
mkdir -p "${1:-build}/.complete"
cd "${1:-build}"
PLAN=$PWD/.dry_run_plan
: > "$PLAN"

# step NAME COMMAND...: runs a command unless it was completed before.
step() {
  local name=$1
  shift
  if [[ $DRY_RUN == 1 ]]; then
    (IFS=$'\t'; printf '%s\n' "$*" >> "$PLAN")
  elif [[ -e .complete/$name ]]; then
    echo "$name: complete"
  else
    echo "$name: $*"
    "$@"
    touch ".complete/$name"
  fi
}

# fetch NAME COMMAND...: a step that downloads or prepares public data; a dry run generates data instead.
fetch() { if [[ $DRY_RUN != 1 ]]; then step "$@"; fi; }

# train NAME METHOD ARGUMENT...: a training run with the output folder NAME; a stopped run resumes.
train() { step "$1" "$PYTHON" -m llamory train "${@:2}" --output "$1" --resume; }

# join NAME ARGUMENT...: joins adapters into the folder NAME.
join() { step "$1" "$PYTHON" "$RECIPES/join_adapters.py" "$@" --base "$BASE"; }

# checkpoint RUN NUMBER: folder of a checkpoint.
checkpoint() { if [[ $DRY_RUN == 1 ]]; then echo "$1/checkpoint-1"; else echo "$1/checkpoint-$2"; fi; }

finish() { if [[ $DRY_RUN == 1 ]]; then "$PYTHON" "$RECIPES/dry_run.py" "$PLAN"; fi; }

# Without network access: the base model of a dry run is a folder that dry_run.py writes.
if [[ $DRY_RUN == 1 ]]; then BASE=base_model; TEACHER=base_model; else BASE=default; TEACHER=base; fi
