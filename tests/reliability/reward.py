"""A reward that the random words of an untrained model get apart, so that GRPO learns something without an SFT run before it."""


def tokens(completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]
