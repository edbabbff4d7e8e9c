"""Training runs on the tiny Llama, built by the two scripts' own functions: real trainers, real NF4, nothing mocked."""

from contextlib import contextmanager

import grpo_train
import sft_train
from posttrain.config.schema import GrpoConfig, SftConfig
from posttrain.models.chat import load_tokenizer
from posttrain.runs.directory import open_run
from posttrain.training.examples import load_examples

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "alpha": 8, "target_modules": LINEAR}
QUIET = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch", "dataloader_pin_memory": False}
SFT = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "max_length": 512}
GRPO = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 12,
    "learning_rate": 1e-3,
    "temperature": 0.8,
}


class Tiny:
    """Configs and trainers over one model folder and one data folder."""

    def __init__(self, model, data, folder):
        self.model, self.data, self.folder = str(model), str(data), folder
        self.num_runs = 0

    def _common(self, trainer, settings):
        self.num_runs += 1
        common = {
            "run_dir": str(self.folder / f"run{self.num_runs}"),
            "model": {"name_or_path": self.model},
            "data": {"path": self.data, "num_dev": 0},
            "seed": 0,
        }
        return common | settings | {"trainer": QUIET | trainer}

    def sft_config(self, trainer=(), **settings):
        lora = {} if settings.get("adapter") else {"lora": LORA}
        return SftConfig(**self._common(SFT | dict(trainer), lora | settings))

    def grpo_config(self, adapter, trainer=(), **settings):
        return GrpoConfig(**self._common(GRPO | dict(trainer), {"adapter": str(adapter)} | settings))

    def sft(self, trainer=(), **settings):
        return opened(self.sft_config(trainer, **settings))

    def grpo(self, adapter, trainer=(), **settings):
        return opened(self.grpo_config(adapter, trainer, **settings))


@contextmanager
def opened(config, resume=False):
    """The trainer of a config, in its run directory; `trainer.run` is the run."""
    stage, script = ("sft", sft_train) if isinstance(config, SftConfig) else ("grpo", grpo_train)
    tokenizer = load_tokenizer(config.model)
    train, dev = load_examples(config)
    with open_run(config, stage, config.run_dir, resume) as run:
        model = load_policy(config, tokenizer, run)
        trainer = script.make_trainer(config, run, model, tokenizer, train, dev)
        trainer.run = run
        yield trainer


def load_policy(config, tokenizer, run):
    from posttrain.models.adapters import resolve_adapter

    if isinstance(config, SftConfig):
        folder = resolve_adapter(config.adapter) if config.adapter else None
        return sft_train.load_policy(config, folder, tokenizer, run)
    return grpo_train.load_policy(config, resolve_adapter(config.adapter), tokenizer, run)


def adapter_tensors(model, name="default"):
    """Copies of an adapter's tensors, by name."""
    parts = f".{name}"
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(parts) or f"{parts}." in n}


def pay(trainer, reward):
    """Let `reward(completion_ids) -> list` decide alone: the real ones pay a random model nothing."""

    def only(completion_ids, **_):
        return reward(completion_ids)

    def nothing(completion_ids, **_):
        return [0.0] * len(completion_ids)

    trainer.reward_funcs[:] = [only, nothing]
    trainer.reward_func_names[:] = ["only", "nothing"]
    return trainer


def by_content(completion_ids):
    """Some reward that differs within a group, from what was sampled."""
    return [float(sum(ids) % 3) for ids in completion_ids]


def scored(trainer):
    """One generation batch with its advantages, as the learner receives it before it is shuffled and cut up."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def liven(model):
    """Larger weights: the random Llama then says something else at every token, where it would repeat its last one."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model
