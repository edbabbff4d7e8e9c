#!/usr/bin/env bash
# This project beside what one would run instead, on a GPU, at the size of Llama-3.2-3B with random weights. About 17 minutes
# for all stages on an H100, of which grpo takes 7; any can be named: `bash bench/gpu.sh sft eval`. `bash bench/gpu.sh profile` says
# where the steps go, `bash bench/gpu.sh ladder-sft` what each setting is worth in time and memory.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-runs/bench/gpu}
work=runs/bench/gpu-$(date +%Y%m%d-%H%M%S)
mkdir -p "$out" "$work"
# Logs travel with the numbers; run directories, with their adapters of 200 MB, stay.
trap 'find "$work" -name "*.log" | while read -r log; do cp "$log" "$out/$(tr / - <<<"${log#"$work"/}")"; done' EXIT
export HF_HUB_OFFLINE=1 TRL_EXPERIMENTAL_SILENCE=1 TOKENIZERS_PARALLELISM=false

nvidia-smi --query-gpu=name,memory.total,memory.used,utilization.gpu,clocks.sm --format=csv
python3 - <<'PY'
from importlib.metadata import version

print(" ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes", "trl")))
PY

# /proc/stat of a container is its host's, so the share that is busy is recorded and refuses nothing.
speed() {
  python3 bench/speed.py --model models/random-3b --random-3b --tokenizer "${TOKENIZER:-models/smollm2-135m-instruct}" \
    --data "${DATA:-data/gsm8k}" --repeats "${REPEATS:-1}" --busy-limit 1 --timeout "${TIMEOUT:-170}" \
    --steps "${STEPS:-16}" --grpo-steps "${GRPO_STEPS:-6}" --max-completion-length "${MAX_COMPLETION_LENGTH:-256}" \
    --eval-questions "${EVAL_QUESTIONS:-1319}" "$@"
}

[ $# -gt 0 ] || set -- sft large compiled grpo eval
for stage; do
  if [ "$stage" = grpo ]; then
    for size in ${NUM_COMPLETIONS:-32 128}; do
      micro=${MICRO_BATCH:-64}
      speed --stages grpo --num-completions "$size" --micro-batch $((micro < size ? micro : size)) --work "$work/grpo-$size" --json "$out/grpo-$size.json"
    done
  elif [ "$stage" = profile ]; then
    speed --stages large compiled grpo --only ours-large-sft ours-compiled-32-sft ours-grpo --profile --steps 8 --grpo-steps 6 \
      --num-completions 128 --micro-batch "${MICRO_BATCH:-64}" --work "$work/profile"
    grep -hA 26 " steps in " "$work"/profile/*.log
  else
    speed --stages "$stage" --work "$work/$stage" --json "$out/$stage.json"
  fi
done
