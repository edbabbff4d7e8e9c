"""Whether a model could have seen a test question: words that training and test texts share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any


def train_test_overlap(train_texts: Iterable[str], test_texts: Sequence[str], n: int = 13) -> dict[str, Any]:
    """Test texts that share a run of n words with a train text (lower case, punctuation dropped).

    13 words as in GPT-3 (arXiv 2005.14165, appendix C). A text of fewer than n words counts whole.
    """
    seen: set[tuple[str, ...]] = set().union(*(_ngrams(text, n) for text in train_texts))
    hits = [index for index, text in enumerate(test_texts) if not seen.isdisjoint(_ngrams(text, n))]
    return {"ngram": n, "k": len(hits), "n": len(test_texts), "indices": hits}


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}
