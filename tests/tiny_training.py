"""Training runs on the tiny Llama, built by the two scripts' own functions: real trainers, real NF4, nothing mocked."""

import copy
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import grpo_train
import sft_train
from posttrain.config.schema import GrpoConfig, SftConfig
from posttrain.models.adapters import resolve_adapter
from posttrain.models.chat import load_tokenizer
from posttrain.records import Example, as_dataset, read_jsonl
from posttrain.runs.data_sets import data_entry
from posttrain.runs.directory import open_run
from posttrain.training.checkpoints import save_adapter
from posttrain.training.examples import load_examples

FORMS = ("nf4", "nf4_unpacked", "none")
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
LENGTHS = [5, 9, 1, 3, 7, 2, 9, 4]  # of completions, at most 12 tokens


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
        lora = {} if settings.get("adapter") or "lora" in settings else {"lora": LORA}
        return SftConfig(**self._common(SFT | dict(trainer), lora | settings))

    def grpo_config(self, adapter, trainer=(), **settings):
        return GrpoConfig(**self._common(GRPO | dict(trainer), {"adapter": str(adapter) if adapter else None} | settings))

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
        run.record(data=data_entry(config.data.path, "train"))
        run.track(config.tracking, config.model_dump(mode="json"))
        model = load_policy(config, tokenizer, run)
        trainer = script.make_trainer(config, run, model, tokenizer, train, dev)
        trainer.run = run
        yield trainer


def load_policy(config, tokenizer, run):
    if isinstance(config, SftConfig):
        folder = resolve_adapter(config.adapter) if config.adapter else None
        return sft_train.load_policy(config, folder, tokenizer, run)
    return grpo_train.load_policy(config, resolve_adapter(config.adapter) if config.adapter else None, tokenizer, run)


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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model


def ending_in(tokenizer, token):
    """The same tokenizer with another end token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    assert tokenizer.eos_token_id == token
    return tokenizer


def finished_sft(tiny, **settings):
    """The run directory of an SFT that has moved its adapter a good way."""
    with tiny.sft({"max_steps": 3, "learning_rate": 1e-2}, **settings) as trainer:
        trainer.train()
        save_adapter(trainer, trainer.run, trainer.processing_class, "")
        return trainer.run.folder


def in_file(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def largest_difference(one, two):
    assert one.keys() == two.keys()
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


def stir(model, seed=0, std=0.1, part="default"):
    """Move the policy away from where it is."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if part in name.split(".") and ("lora_B" in name or "trainable_tokens_delta" in name):
            parameter.data += std * torch.randn(parameter.shape, generator=generator)


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}


def plain_grpo(model, tokenizer, tiny, folder, trainer_class=GRPOTrainer, **settings):
    def nothing(completions, **_):
        return [0.0] * len(completions)

    sizes = {"max_completion_length": 8, "num_generations": 4, "per_device_train_batch_size": 4}
    args = GRPOConfig(output_dir=str(folder), bf16=True, use_cpu=True, report_to=[], **sizes, **settings)
    data = as_dataset(read_jsonl(f"{tiny.data}/train.jsonl", Example), ("prompt", "answer"))
    return trainer_class(model=model, args=args, reward_funcs=[nothing], train_dataset=data, processing_class=tokenizer)


def pay_tiny(tiny, adapter, trainer=(), reward=by_content, **settings):
    """A GRPO trainer whose completions are paid by what they hold."""
    return paid(tiny.grpo(adapter, trainer, **settings), reward)


class paid:
    def __init__(self, manager, reward):
        self.manager, self.reward = manager, reward

    def __enter__(self):
        return pay(self.manager.__enter__(), self.reward)

    def __exit__(self, *error):
        return self.manager.__exit__(*error)


class GradientsBeforeStep(TrainerCallback):
    """Copies of the gradients of every optimizer step, before clipping would scale them (it is off in these tests)."""

    def __init__(self):
        self.of = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def first_step(manager):
    with manager as trainer:
        stir(trainer.model)
        seen = GradientsBeforeStep()
        trainer.add_callback(seen)
        trainer.train()
        return trainer.state.log_history[0]["loss"], seen.of[0]


def relative(one, two):
    """Norm of the difference of two gradients, in norms of the first."""
    assert one.keys() == two.keys()
    difference, size = (
        torch.cat([t.flatten() for t in tensors]).norm() for tensors in ([one[n] - two[n] for n in one], one.values())
    )
    return float(difference / size)


def ragged(inputs, lengths):
    """The batch with completions of these lengths, padded on the right as TRL pads them."""
    inputs = dict(inputs)
    width = inputs["completion_ids"].shape[1]
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    inputs["completion_ids"] = inputs["completion_ids"].masked_fill(mask == 0, 0)
    inputs["completion_mask"], inputs["num_items_in_batch"] = mask, mask.sum()
    return inputs


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
