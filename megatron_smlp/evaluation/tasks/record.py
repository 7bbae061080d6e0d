"""ReCoRD's prompt and metrics, as lm-evaluation-harness 0.4 has them.

Its own module needs `transformers.data.metrics`, which transformers 5 no longer has, so prompt and
metrics are reimplemented here: the passage, its highlights as a list, and as options the query with
each entity in place of `@placeholder`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Document = dict[str, Any]


def process_docs(dataset: Any) -> Any:
    """Keep each entity and answer once, in alphabetical order."""

    def process(doc: Document) -> Document:
        lists = {name: sorted(set(doc[name])) for name in ("entities", "answers")}
        return {"passage": doc["passage"], "query": doc["query"], **lists}

    return dataset.map(process)


def context(doc: Document) -> str:
    text, *highlights = doc["passage"].strip().split("\n@highlight\n")
    return f"{text}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def option(query: str, entity: str) -> str:
    return f"  - {query}".replace("@placeholder", entity)


def target(doc: Document) -> str:
    return option(doc["query"], doc["answers"][0])


def options(doc: Document) -> list[str]:
    return [option(doc["query"], entity) for entity in doc["entities"]]


def process_results(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Score the likeliest entity against the answer that matches it best."""
    scores = [loglikelihood for loglikelihood, _ in results]
    prediction = doc["entities"][scores.index(max(scores))]
    metrics: dict[str, Callable[[str, str], float]] = {"f1": token_f1, "em": exact_match}
    return {
        name: max(metric(prediction, answer) for answer in doc["answers"])
        for name, metric in metrics.items()
    }


def normalised(text: str) -> str:
    """Normalize as SQuAD does: lower case, no punctuation, no articles, single spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalised(prediction) == normalised(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Return F1 over common words, the harmonic mean of precision and recall, as SQuAD does."""
    ours, theirs = normalised(prediction).split(), normalised(answer).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
