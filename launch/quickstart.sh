#!/usr/bin/env bash
# From a fresh checkout to a trained model that writes text: sets up the environment, shards the
# Python standard library, trains a small HTEN, evaluates it and generates a sample.
#   bash launch/quickstart.sh [--output_dir DIR]        (default: runs/quickstart in the checkout)
# The same command again continues where it was cut off, and once all is there only shows it.
set -euo pipefail

STEPS=${STEPS:-150}
SEQ_LEN=${SEQ_LEN:-256}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}
VAL_FRACTION=${VAL_FRACTION:-0.05}

fail() {
  printf 'quickstart: %s\n' "$1" >&2
  exit "${2:-2}"
}

output_dir=
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --output_dir=?*) output_dir=${1#*=} ;;
    --output_dir)
      [ -n "${2:-}" ] || fail "--output_dir needs a folder"
      output_dir=$2
      shift
      ;;
    *) fail "unknown argument '$1'; the only option is --output_dir DIR" ;;
  esac
  shift
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/.." && pwd)
venv=$root/.venv
output_dir=$(realpath -m "${output_dir:-$root/runs/quickstart}")
data=$output_dir/data
run=$output_dir/run
record=$output_dir/made_of

# What the results below depend on: the settings, and what was written, by names and sizes or, for
# the files that decide the results, by their contents.
settings="STEPS=$STEPS SEQ_LEN=$SEQ_LEN GLOBAL_BATCH_SIZE=$GLOBAL_BATCH_SIZE VAL_FRACTION=$VAL_FRACTION"
made_of() {
  printf '%s\n' "$settings"
  find "$data" "$run" -type f ! -name '.*' -printf '%P %s\n' | LC_ALL=C sort | sha256sum
  sha256sum "$run"/{COMPLETED,config.json,model.safetensors,checkpoints/latest} "$data/manifest.json" "$@"
}

# is_recorded FILE: it was made by these settings of the run as it is now, and is unchanged.
is_recorded() {
  [ -e "$record.${1##*/}" ] && [ "$(made_of "$1" 2>/dev/null)" = "$(cat "$record.${1##*/}")" ]
}

summary() {
  cat <<SUMMARY

The quickstart is complete.

Held-out text, and a model that knows only how frequent each token is:
$(sed 's/^/  /' "$output_dir/evaluation.txt")

What the model writes after "def ":
$(sed 's/^/  /' "$output_dir/sample.txt")

Where everything is:
  $data   token shards, tokenizer, manifest
  $run   configuration, metrics.jsonl, checkpoints, TensorBoard files
  $output_dir/evaluation.txt, $output_dir/sample.txt

Watch the training:  $venv/bin/tensorboard --logdir $run/tensorboard
Use the model:       $venv/bin/ten-dist generate $run --prompt "class "
SUMMARY
}

if is_recorded "$output_dir/evaluation.txt" && is_recorded "$output_dir/sample.txt"; then
  summary
  exit
fi

# Known before the minutes of the set-up, not after.
if ! mkdir -p "$output_dir" 2>/dev/null || ! [ -w "$output_dir" ]; then
  fail "cannot write to $output_dir; choose another folder with --output_dir"
fi

source "$here/environment.sh"
cd "$root"
trap 'fail "interrupted; the same command again continues" 130' INT
trap 'fail "terminated; the same command again continues" 143' TERM

trap 'rm -f "$output_dir"/*.partial' EXIT

phase_failed() {
  local what=$1 status=$2
  shift 2
  {
    printf "\nquickstart: the phase '%s' failed with status %s. By hand, in %s:\n" "$what" "$status" "$root"
    printf '  source .venv/bin/activate\n '
    printf ' %q' "$@"
    printf '\n'
  } >&2
  exit "$status"
}

quickstart_phase() {
  local what=$1 start=$SECONDS status=0
  shift
  printf '\n== %s\n' "$what" >&2
  "$@" || status=$?
  [ "$status" -eq 0 ] || phase_failed "$what" "$status" "$@"
  printf '== %s: %s s\n' "$what" "$((SECONDS - start))" >&2
}

# As quickstart_phase, with the standard output kept in a file: whole, or not at all. What is there
# already is not made again.
quickstart_phase_into() {
  local file=$1
  shift
  ! is_recorded "$file" || return 0
  quickstart_phase "$@" >"$file.partial"
  mv "$file.partial" "$file"
  made_of "$file" >"$file.partial"
  mv "$file.partial" "$record.${file##*/}"
}

count_gpus
# bfloat16 is the faster one only where the processor multiplies in it.
precision=bf16
if [ "$gpus" -gt 0 ]; then
  processes=$gpus
  # Every process takes the same number of rows.
  GLOBAL_BATCH_SIZE=$(((GLOBAL_BATCH_SIZE + processes - 1) / processes * processes))
  start=(deepspeed)
else
  # A CPU has no natural number of processes: DeepSpeed would start one for each memory node.
  processes=2
  if ! grep -qsE 'avx512_bf16|amx_bf16|\bbf16\b' /proc/cpuinfo; then
    precision=fp32
    printf 'quickstart: training in fp32, this processor has no bfloat16 arithmetic\n' >&2
  fi
  start=(env DS_ACCELERATOR=cpu deepspeed --num_accelerators "$processes")
fi
# A fixed port would be refused beside any other run on this machine.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

quickstart_phase "shard the standard library" \
  "${mpi_launch[@]}" -n 2 python -m mpi4py -m data_prep.shard --corpus python-stdlib \
  --output "$data" --vocab_size 4096 --val_fraction "$VAL_FRACTION" --shard_megabytes 4

quickstart_phase "train ($processes processes)" \
  "${start[@]}" --master_port "$port" --log_level warning launch/train.py --config pico --use_hten --hten_scales 1,2,4 \
  --data "$data" --output_dir "$run" --deepspeed_config ds_configs/zero2.json \
  --steps "$STEPS" --seq_len "$SEQ_LEN" --global_batch_size "$GLOBAL_BATCH_SIZE" \
  --precision "$precision" --eval_interval 50 --checkpoint_interval 50
# The launcher reports success also when its processes were killed; the run's own mark does not lie.
[ -e "$run/COMPLETED" ] ||
  fail "the phase 'train' ended before the run did: there is no $run/COMPLETED. The same command again continues" 1

quickstart_phase_into "$output_dir/evaluation.txt" "evaluate" ten-dist evaluate "$run" --unigram_baseline
quickstart_phase_into "$output_dir/sample.txt" "generate" ten-dist generate "$run" --prompt "def "
summary
