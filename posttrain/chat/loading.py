"""A policy in memory, and the token ids that it gets for a question: both are checked as evaluate.py checks them."""

from __future__ import annotations

from typing import Any, NamedTuple

from posttrain.chat.policies import Policy
from posttrain.config.schema import Generation
from posttrain.errors import UserError
from posttrain.records import Example
from posttrain.runs.manifest import refuse_unfinished_model

OTHER_ENGINE = "evaluate.py with engine=continuous_batching answers through transformers' own code"


class Loaded(NamedTuple):
    policy: Policy
    tokenizer: Any
    model: Any  # the plain model that generates, with the adapter folded in


def load(policy: Policy, question: str, generation: Generation) -> Loaded:
    """Open a policy, and check it as evaluate.py does before its first token."""
    from posttrain.generation.guard import EngineGuard
    from posttrain.models import adapter_checks, adapters
    from posttrain.models.chat import load_tokenizer
    from posttrain.models.checkpoint import check_base, weights_hash
    from posttrain.models.policy import open_policy
    from posttrain.models.policy_copy import PolicyCopy
    from posttrain.models.template_check import check_same_template

    tokenizer = load_tokenizer(policy.model)
    base = check_base(policy.model, policy.quantization, tokenizer)
    if policy.weights and weights_hash(policy.model) != policy.weights:
        raise UserError(f"{policy.model.name_or_path} is not the base that {policy.label} was trained on: name that with --base")
    refuse_unfinished_model(policy.model.name_or_path)
    folder = adapters.resolve_adapter(policy.adapter) if policy.adapter else None
    if folder:
        adapter_checks.check_start(folder, policy.model, policy.quantization, base, tokenizer, train=False, stores=False)
        check_same_template(tokenizer, folder, [asked(policy, question)])
    prompt = prompt_ids(policy, tokenizer, question, generation, base)
    trained, _ = open_policy(policy.model, policy.quantization, tokenizer, folder, trainable=False)
    model = PolicyCopy(trained).model
    EngineGuard(OTHER_ENGINE, lambda **found: None)("transformers", model, trained, [prompt], generation.max_new_tokens)
    return Loaded(policy, tokenizer, model)


def asked(policy: Policy, question: str, gold: str | None = None) -> Example:
    """The question as a row of the policy's data set. The answers of a question without a gold are read by grading any."""
    read = (answer for answer in ("0", *getattr(policy.grader, "options", ())) if policy.grader.canonical(answer) is not None)
    return Example("asked", "test", question, policy.prompt.ask(question), [], gold or next(read), 0)


def prompt_ids(policy: Policy, tokenizer: Any, question: str, generation: Generation, base: Any) -> list[int]:
    """The token ids that evaluation would feed.

    Raises:
        UserError: the question would end its own turn, or leaves no room for an answer.
    """
    from posttrain.models.chat import chat_ids
    from posttrain.models.checkpoint import check_context
    from posttrain.tasks.examples import special_tokens

    if found := sorted(token for token in special_tokens(tokenizer) if token in question):
        raise UserError(f"the question holds {found[0]}, which the tokenizer reads as a special token: leave it out")
    ids = chat_ids(tokenizer, policy.prompt.ask(question), add_generation_prompt=True)
    check_context(base, len(ids), generation.max_new_tokens, "--max-new-tokens")
    return ids
