"""What a client may ask of /v1/completions, checked, and the errors it gets as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_smlp.generation.language_model import LanguageModel

MOST_ANSWERS = 128
"""Prompts times `n` of one request."""
MOST_LOGPROBS = 20
MOST_STOPS = 16
DEFAULT_MAX_TOKENS = 16
# What the completions API has and this server does not, with the values that ask for nothing.
UNSUPPORTED = {
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}
# Two of these are in vLLM's server and not in OpenAI's; one says who asks, and changes nothing.
KNOWN = frozenset({
    "model", "prompt", "n", "best_of", "max_tokens", "temperature", "top_p", "top_k",
    "repetition_penalty", "seed", "logprobs", "echo", "stream", "stop", "user",
})  # fmt: skip


class RequestError(Exception):
    """A client's mistake: an HTTP status and a message for it."""

    def __init__(self, message: str, *, status: int = 400, name: str | None = None) -> None:
        super().__init__(message)
        self.status, self.name = status, name

    def body(self) -> dict[str, Any]:
        """As OpenAI words it."""
        kind = "invalid_request_error"
        error = {"message": _text(str(self)), "type": kind, "param": None, "code": None}
        if self.name is not None:
            error["param"] = _text(self.name)
        return {"error": error}


def _text(quoted: str) -> str:
    """What is quoted of a request may hold half of a surrogate pair, which cannot be sent."""
    return quoted.encode(errors="backslashreplace").decode()


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    prompts: list[list[int]]
    max_tokens: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    """0: all."""
    repetition_penalty: float
    seed: int | None
    logprobs: int | None
    echo: bool
    stream: bool
    stop: list[str]


def parse(body: bytes, lm: LanguageModel) -> CompletionRequest:
    """Check a request's body.

    Raises:
        RequestError: it is no JSON object, or a value in it is not possible.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    _check_model(values, lm)
    for name in values:
        if name not in KNOWN and values[name] not in UNSUPPORTED.get(name, (None,)):
            raise RequestError(f"{name:.40} is not supported by this server", name=name[:40])
    n = _integer(values, "n", 1, low=1, high=MOST_ANSWERS)
    if values.get("best_of") not in (None, n):
        raise RequestError("best_of is not supported by this server", name="best_of")
    prompts = _prompts(values.get("prompt"), lm)
    if len(prompts) * n > MOST_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts times n={n} are over {MOST_ANSWERS} answers", name="prompt"
        )
    logprobs = values.get("logprobs")
    return CompletionRequest(
        prompts=prompts,
        max_tokens=_max_tokens(values, prompts, lm),
        n=n,
        temperature=_number(values, "temperature", 1.0, low=0.0, high=2.0),
        top_p=_top_p(values),
        top_k=max(0, _integer(values, "top_k", 0, low=-1)),
        repetition_penalty=_number(values, "repetition_penalty", 1.0, low=0.01, high=100.0),
        seed=None if values.get("seed") is None else _integer(values, "seed", 0),
        logprobs=None
        if logprobs is None or logprobs is False
        else _integer(values, "logprobs", 0, low=0, high=MOST_LOGPROBS),
        echo=_flag(values, "echo"),
        stream=_flag(values, "stream"),
        stop=_stops(values.get("stop")),
    )


def _check_model(values: dict[str, Any], lm: LanguageModel) -> None:
    name = values.get("model")
    if name is not None and name != lm.name:
        raise RequestError(
            f"the model {str(name)[:100]!r} does not exist; this server has {lm.name!r}",
            status=404,
            name="model",
        )


def _max_tokens(values: dict[str, Any], prompts: list[list[int]], lm: LanguageModel) -> int:
    """As many as asked for, or what fits; asking for more than fits is refused."""
    longest = max(map(len, prompts))
    room = lm.longest - longest
    if room < 0:
        raise RequestError(
            f"the prompt has {longest} tokens and the model's sequences end at {lm.longest}",
            name="prompt",
        )
    if values.get("max_tokens") is None:
        return min(DEFAULT_MAX_TOKENS, room)
    asked = _integer(values, "max_tokens", 0, low=0)
    if asked > room:
        raise RequestError(
            f"the prompt's {longest} tokens and max_tokens={asked} are more than the {lm.longest} "
            f"positions of the model: ask for at most {room}",
            name="max_tokens",
        )
    return asked


def _prompts(prompt: Any, lm: LanguageModel) -> list[list[int]]:
    """A text, texts, token ids, or lists of them."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            "prompt must be a text, a list of texts, or token ids, and not empty", name="prompt"
        )
    if all(_is_integer(number) for number in prompt):
        prompt = [prompt]
    if len(prompt) > MOST_ANSWERS:
        raise RequestError(f"{len(prompt)} prompts are over {MOST_ANSWERS}", name="prompt")
    return [_ids(one, lm) for one in prompt]


def _ids(prompt: Any, lm: LanguageModel) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = lm.encode(prompt)
        except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
            raise RequestError(f"prompt cannot be encoded: {error}", name="prompt") from error
    elif isinstance(prompt, list) and all(_is_integer(number) for number in prompt):
        ids = prompt
        wrong = [number for number in ids if not 0 <= number < lm.vocab_size]
        if wrong:
            raise RequestError(
                f"the token id {wrong[0]} is not in the vocabulary of {lm.vocab_size}",
                name="prompt",
            )
    else:
        raise RequestError("prompt must hold texts or lists of token ids alone", name="prompt")
    if not ids:
        raise RequestError("prompt is empty: give some text to continue", name="prompt")
    return ids


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(
    values: dict[str, Any], name: str, default: int, *, low: int | None = None, high: int = 2**63
) -> int:
    value = values.get(name)
    if value is None:
        return default
    if not _is_integer(value) or value > high or (low is not None and value < low):
        limits = "an integer" if low is None else f"an integer from {low}"
        limits += f" to {high}" if high < 2**63 else ""
        raise RequestError(f"{name} must be {limits}, not {str(value)[:40]}", name=name)
    return int(value)


def _number(values: dict[str, Any], name: str, default: float, *, low: float, high: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise RequestError(
            f"{name} must be a number from {low:g} to {high:g}, not {str(value)[:40]}", name=name
        )
    return float(value)


def _top_p(values: dict[str, Any]) -> float:
    top_p = _number(values, "top_p", 1.0, low=0.0, high=1.0)
    if top_p == 0:
        raise RequestError("top_p must be over 0", name="top_p")
    return top_p


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if value not in (None, True, False):
        raise RequestError(f"{name} must be true or false", name=name)
    return bool(value)


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
        raise RequestError("stop must be a text or a list of texts", name="stop")
    if len(stops) > MOST_STOPS:
        raise RequestError(f"stop has {len(stops)} texts; at most {MOST_STOPS}", name="stop")
    return [text for text in stops if text]
