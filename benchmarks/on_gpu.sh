#!/usr/bin/env bash
# Runs the GPU lines of the project, most wanted first, for under nine minutes:
#   [PYTHON=python3] [OUT=folder] [SECONDS_LEFT=520] benchmarks/on_gpu.sh [LINE...]
# PYTHON needs a CUDA build of jax; nothing is installed here. A line that is
# cut off is listed as such; a second call goes on with the lines not yet done
# (their logs in OUT end in 'done'). With LINE numbers it runs only those.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python=${PYTHON:-python3}
out=${OUT:-out/on_gpu}
deadline=$((SECONDS + ${SECONDS_LEFT:-520}))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"

# Limit in seconds, then the command.
lines=(
  '60 -m experiments.doctor --want=gpu'
  '150 -m benchmarks.train_mfu --model=llama_350m'
  '150 -m benchmarks.train_mfu --model=llama_1b'
  '120 -m benchmarks.train_mfu --model=llama_350m --packed'
  '120 -m pytest -q tests/training/planner_test.py tests/models/attention_test.py'
  '150 -m benchmarks.kernel_speed --quick'
  '150 -m pytest -q tests/speculative/engine_test.py'
  '520 -m benchmarks.tlt_end_to_end --config=experiments/configs/tlt_gpu.py --cache_dir=out/tlt_gpu --quick'
)

table=()
for index in "${!lines[@]}"; do
  number=$((index + 1))
  if (($#)) && [[ " $* " != *" $number "* ]]; then continue; fi
  read -r limit command <<<"${lines[$index]}"
  log=$out/line_$number.log
  if [[ -f $log && $(tail -n 1 "$log") == done ]]; then
    table+=("$number  before  $command")
    continue
  fi
  left=$((deadline - SECONDS))
  if ((left < 20)); then
    table+=("$number  not begun, call again  $command")
    continue
  fi
  start=$SECONDS
  # shellcheck disable=SC2086 # a line is several words
  timeout --kill-after=10 $((left < limit ? left : limit)) "$python" $command \
    2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  case $code in
    0) echo done >>"$log" && state=ok ;;
    124 | 137) state="cut off after $((SECONDS - start)) s" ;;
    *) state="failed ($code)" ;;
  esac
  table+=("$number  $state  $command")
done

# What was recorded travels with the logs.
cp benchmarks/results/*.json "$out"/ 2>/dev/null
echo
echo 'line  state  command'
printf '%s\n' "${table[@]}"
