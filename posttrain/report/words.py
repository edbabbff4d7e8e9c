"""What a chart or a column shows, for who points at it: sentences of docs/metrics.md and docs/evaluation.md."""

CHARTS = {
    "Loss": "SFT: mean negative log-likelihood of the completion's tokens, end token included, over all tokens of the optimizer"
    " step. GRPO: the value of the surrogate",
    "Rewards": "the mean rises and dev/accuracy does not: reward hacking, or the train questions are learnt by heart",
    "Dev accuracy": "right answers, read leniently, of all dev questions",
    "Dev accuracy over time": "against the minutes of its steps, without those of measuring",
    "KL to the reference policy": "mean of exp(d) - d - 1, d = log r - log p",
    "Completion length, tokens": "tokens, end token included",
    "Cut-off completions": "completions whose last token is neither the end nor the pad token",
    "Entropy, nats per token": "mean entropy of the next-token distribution at the completion's tokens, in nats",
    "Groups with equal rewards": "groups whose weighted rewards are all equal (within 1e-6), of all groups",
    "Reward spread within groups": "of the weighted sum",
    "Adapter weights moved by a step": "trainable entries that the last logged step changed at all, of all trainable entries",
    "Gradient norm": "2-norm of the gradient of all trained weights, before it is clipped to max_grad_norm",
    "Learning rate": "of the step just done",
    "Accuracy": "right by any extraction method: correct / completions",
    "Accuracy by solution steps": "lenient accuracy by lines of the gold solution",
    "pass@k": "mean over questions of 1 - C(k_all - c, k) / C(k_all, k)",
    "maj@k": "the canonical value with most votes among the first k samples is right",
}

COLUMNS = {
    "Lenient": "right by any extraction method: correct / completions",
    "Strict": "right and read from ####",
    "Cut off": "completions that ended at max_new_tokens",
    "Format": "the last line is #### <number>, the only marker of the text",
    "Tokens": "total of generated tokens, stop token included",
    "Difference": "mean of (second - first) over questions",
    "McNemar p": "exact McNemar, min(1, 2 P(X ≤ min))",
    "Sign-flip p": "exact sign-flip test on the per-question means",
    "Only first": "questions that only one of the two solves",
    "Only second": "questions that only one of the two solves",
    "p (Holm)": "the p-value adjusted for all pairs of the table",
    "Detectable": "smallest paired difference found with 80 % power",
    "Train loss": CHARTS["Loss"],
    "Dev loss": "the same over the dev rows",
    "Reward": CHARTS["Rewards"],
    "Dev accuracy": CHARTS["Dev accuracy"],
    "Cut-off share": CHARTS["Cut-off completions"],
    "Length": CHARTS["Completion length, tokens"],
    "Seconds a step": "seconds of an optimizer step: sampling, rewards and learning",
}


def of_column(header: str) -> str:
    """Nothing for a column that says itself, as `n`."""
    if header.startswith(("pass@", "maj@")):
        return CHARTS[f"{header.partition('@')[0]}@k"]
    return COLUMNS.get(header, "")
