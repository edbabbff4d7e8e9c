"""TRL's two trainers, corrected: what a training run computes, watches, writes and refuses.

The loss of a batch must stay what TRL's own path gives: a change of it shows both. Every override of TRL's internals is in
sft_trainer.py, grpo_trainer.py, or masters.py, which both share:

1. Master weights. Both trainers cast the adapter of a quantized model to bf16 (trl 1.16: sft_trainer.py and
   grpo_trainer.py, "the PEFT adapter weights are converted to bf16"). Here the adapter stays fp32, bit for bit as it was given.
2. Output head. On CPU TRL's fused head scores every position, prompt included, and multiplies back in fp32
   (trl/trainer/utils.py, `add_fused_lm_head`: "every position is scored instead"). With trained token rows TRL's head fails on
   every device: it asks PEFT's TrainableTokensWrapper for `bias`. In both cases ours scores the labelled positions, in bf16.
3. The KL reference. TRL copies the adapter to "ref" by matching ".default." in parameter names. That misses
   `trainable_tokens_delta.default` (grpo_trainer.py, `ref_name = name.replace(...)`), and KL would not start at 0.
4. Learner batches. TRL deals a step's completions out at random and pads each micro-batch to the longest of all. Ours are sorted
   by length, and each micro-batch is cut to its own longest.
5. Shared prompts. TRL runs the prompt again for every completion. Ours runs each prompt once for all completions of an optimizer
   step, or of a micro-batch if a step has more prompts than a micro-batch has rows. Without a gradient, a GPU scores several
   micro-batches at once.
6. TRL's own generation (rollouts.engine trl). TRL runs it outside autocast, where bf16 activations do not fit fp32 masters. Here
   it runs inside. TRL's continuous batching is refused: it casts the trained model to bf16 for good (`unwrapped_model.to`).
7. Adapted layers. posttrain/kernels/lora_linear.py computes what PEFT's layers do in a third of the operations.
8. FSDP2. It sends weights as they are stored: otherwise NF4 packed into bf16 loses bits. Checkpoints hold the adapter alone, and
   each process reads them back: accelerate's gathering fails on packed weights, and its reading never ends.
9. Time. `_generate_and_score_completions` is wrapped to be timed, nothing else.
10. Where a run ends and goes on. transformers trains a step more where the last checkpoint is inside an epoch (`_run_epoch`), and
   calls a training finished that something stopped (`_maybe_log_save_evaluate`). TRL saves neither a generation window nor the
   row that it has yet to log (`_save_checkpoint`, `_load_optimizer_and_scheduler`), and repeats the order of the first epoch.
When upstream changes any of them, tests fail: in tests/test_pipeline.py for FSDP2, in test_callbacks.py for time, in
test_resume.py for the last, for the others in the files of the training tests.
"""

import posttrain.models  # noqa: F401  # before the first module of this room imports PEFT: it quiets libraries
