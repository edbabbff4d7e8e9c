"""GRPO's rollouts and rewards: what TRL calls to get completions and to pay for them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import rewards
from posttrain.config.schema import Rewards
from posttrain.config.schema import Rollouts as RolloutSettings
from posttrain.errors import UserError
from posttrain.generation import decoder
from posttrain.generation.engines import generate
from posttrain.generation.guard import EngineGuard
from posttrain.generation.loop import Completion, Sampling
from posttrain.generation.steps import release_graphs
from posttrain.models.chat import chat_ids
from posttrain.models.policy_copy import Copy, GatheredCopy, PolicyCopy
from posttrain.phases import phase
from posttrain.tasks.graders import NUMBERS, Grader

Reward = Callable[..., list[float]]


class Rollouts:
    """A `rollout_func` for GRPOTrainer: one window's completions from a copy of the policy as it is now.

    TRL passes every prompt once for each of its completions. Here a prompt is computed once and continued `num_generations`
    times. Draws depend on seed, step and process alone, so a resumed run samples what an uninterrupted one would have.
    """

    def __init__(
        self,
        copy: Copy,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        settings: RolloutSettings,
        guard: EngineGuard | None = None,
    ) -> None:
        self.copy, self.tokenizer, self.seed, self.guard = copy, tokenizer, seed, guard
        assert settings.engine != "trl", "rollouts.engine trl: TRL makes the completions itself"
        if settings.cache and not (isinstance(copy, PolicyCopy) and decoder.fits(copy.model)):
            raise UserError("rollouts.cache fp8: this model decodes in the loop, and not in seats: set it to null")
        self.engine, self.batch_size = settings.engine, settings.batch_size
        self._step, self._calls = -1, 0

    def __call__(self, prompts: list[list[dict[str, str]]], trainer: Any) -> dict[str, Any]:
        groups = [list(same) for _, same in itertools.groupby(prompts)]
        sizes = {len(group) for group in groups}
        size = sizes.pop() if len(sizes) == 1 else 1  # the border between two processes may cut a group
        ids = [chat_ids(self.tokenizer, prompt, add_generation_prompt=True) for prompt in prompts[::size]]
        sampling = Sampling(trainer.max_completion_length, trainer.temperature, trainer.top_p, size, self._next_seed(trainer))
        batch_size = max(1, (self.batch_size or len(prompts)) // size)
        if self.guard and not self.guard.done:
            self.guard(self.engine, self.copy.refresh(), self.copy.source, ids, sampling.max_new_tokens)
        started = time.perf_counter()
        with phase("fold"):
            policy = self.copy.refresh()
        generated = generate(policy, ids, sampling, self.tokenizer, batch_size, self.engine)
        if isinstance(self.copy, GatheredCopy):
            release_graphs(policy)  # they know the copy that knows them, and would keep it for a while
        flat = [completion for group in generated.completions for completion in group]
        self._report(trainer, time.perf_counter() - started, flat, generated.num_slots)
        return {
            "prompt_ids": [prompt for prompt in ids for _ in range(size)],
            "completion_ids": [completion.ids for completion in flat],
            "logprobs": [completion.logprobs for completion in flat] if flat[0].logprobs else None,
        }

    def _report(self, trainer: Any, seconds: float, completions: list[Completion], num_slots: int) -> None:
        num_tokens = sum(len(completion.ids) for completion in completions)
        trainer.report("time/rollout_seconds", seconds)
        trainer.report("rollout/tokens_per_second", num_tokens / seconds)
        if num_slots:  # prefill gives the first token of a completion
            trainer.report("rollout/useful_slots", (num_tokens - len(completions)) / num_slots)

    def _next_seed(self, trainer: Any) -> int:
        step = trainer.state.global_step
        self._calls = self._calls + 1 if step == self._step else 0
        self._step = step
        return ((self.seed * 1_000_003 + step) * 1_009 + self._calls) * 1_009 + trainer.accelerator.process_index


def reward_functions(settings: Rewards, grader: Grader = NUMBERS) -> tuple[list[Reward], list[float]]:
    """The two rewards that grade, for GRPOTrainer, which logs each, and their weights. named_rewards.py has all others."""
    format_reward = rewards.gated_format_reward if settings.gate_format else rewards.format_reward
    functions = [judged_by(grader, reward) for reward in (rewards.correctness_reward, format_reward)]
    return functions, [settings.correctness, settings.format / rewards.FORMAT_REWARD]


def judged_by(grader: Grader, reward: Reward) -> Reward:
    """The reward with the data set's grader, under the name that TRL logs it by. Numbers behind `####` need none."""
    return reward if grader is NUMBERS else functools.update_wrapper(functools.partial(reward, grader=grader), reward)
