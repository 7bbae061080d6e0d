"""Check the bodies of /v1/completions, and word the errors that a client gets as JSON."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_smlp.generation.language_model import LanguageModel

MOST_ANSWERS = 128
"""Prompts times `n` of one request."""
MOST_LOGPROBS = 20
MOST_STOPS = 16
DEFAULT_MAX_TOKENS = 16
# Fields of the completions API that this server lacks, with the values that ask for nothing.
UNSUPPORTED = {
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
}


def error_body(message: str, kind: str, name: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI words it."""

    def sendable(text: str) -> str:
        """Replace half of a surrogate pair, which a quotation of the request may hold."""
        return text.encode(errors="backslashreplace").decode()

    name = name and sendable(name)
    return {"error": {"message": sendable(message), "type": kind, "param": name, "code": None}}


class RequestError(Exception):
    """A client's mistake: an HTTP status and a message for it."""

    def __init__(self, message: str, *, status: int = 400, name: str | None = None) -> None:
        super().__init__(message)
        self.status, self.name = status, name

    def body(self) -> dict[str, Any]:
        return error_body(str(self), "invalid_request_error", self.name)


def _limited(default: Any, low: float | None, high: float | None, description: str) -> Any:
    return Field(default, ge=low, le=high, description=description)


class CompletionRequest(BaseModel):
    """A request's fields; the description of each ends the message about a wrong value."""

    model_config = ConfigDict(strict=True, frozen=True)

    model: Any = None
    prompt: Any = None
    prompts: list[list[int]] = []
    """Token ids of `prompt`."""
    n: int = _limited(1, 1, MOST_ANSWERS, f"an integer from 1 to {MOST_ANSWERS}")
    best_of: Any = None
    max_tokens: int = _limited(DEFAULT_MAX_TOKENS, 0, 2**63, "an integer from 0")
    temperature: float = _limited(1.0, 0, 2, "a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="over 0 and at most 1")
    top_k: int = _limited(0, -1, 2**63, "an integer from -1")
    """Not in OpenAI's API, but in vLLM's; 0 and -1: all tokens."""
    repetition_penalty: float = _limited(1.0, 0.01, 100, "a number from 0.01 to 100")
    """Not in OpenAI's API, but in vLLM's."""
    seed: int | None = _limited(None, None, 2**63, "an integer")
    logprobs: int | None = _limited(None, 0, MOST_LOGPROBS, f"an integer from 0 to {MOST_LOGPROBS}")
    echo: Literal[True, False] = Field(False, description="true or false")
    stream: Literal[True, False] = Field(False, description="true or false")
    stream_options: dict[Literal["include_usage"], bool] = Field(
        {}, description='{"include_usage": true or false}'
    )
    stop: str | list[str] = Field([], description="a text or a list of texts")
    user: Any = None
    """The name of the client; it changes nothing."""

    def is_text(self, number: int) -> bool:
        """Whether a prompt came as a text, and not as token ids."""
        prompt = self.prompt[number] if isinstance(self.prompt, list) else self.prompt
        return isinstance(prompt, str)


KNOWN = set(CompletionRequest.model_fields) - {"prompts"}


def check_model(name: Any, lm: LanguageModel) -> None:
    """Raise RequestError where this server has no such model."""
    if name != lm.name:
        raise RequestError(
            f"the model {str(name)[:100]!r} does not exist; this server has {lm.name!r}",
            status=404,
            name="model",
        )


def parse(body: bytes, lm: LanguageModel) -> CompletionRequest:
    """Check a request's body.

    Raises:
        RequestError: it is not a JSON object, or a value in it is not possible.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    if values.get("model") is not None:
        check_model(values["model"], lm)
    for name in values:
        if name not in KNOWN and values[name] not in UNSUPPORTED.get(name, (None,)):
            raise RequestError(f"{name:.40} is not supported by this server", name=name[:40])
    if values.get("logprobs") is False:
        del values["logprobs"]
    if values.get("stop") in ("", []):
        del values["stop"]
    try:  # null is the default of every field
        asked = CompletionRequest.model_validate(
            {name: value for name, value in values.items() if value is not None and name in KNOWN}
        )
    except ValidationError as error:
        wrong = error.errors()[0]["loc"][0]
        allowed = CompletionRequest.model_fields[str(wrong)].description
        raise RequestError(
            f"{wrong} must be {allowed}, not {str(values[wrong])[:40]}", name=str(wrong)
        ) from error
    if asked.best_of not in (None, asked.n):
        raise RequestError("best_of is not supported by this server", name="best_of")
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if len(stops) > MOST_STOPS:
        raise RequestError(f"stop has {len(stops)} texts; at most {MOST_STOPS}", name="stop")
    prompts = _prompts(asked.prompt, lm)
    if len(prompts) * asked.n > MOST_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts times n={asked.n} are over {MOST_ANSWERS} answers",
            name="prompt",
        )
    checked = {"prompts": prompts, "max_tokens": _max_tokens(asked, prompts, lm)}
    others = {"stop": [text for text in stops if text], "top_k": max(0, asked.top_k)}
    return asked.model_copy(update={**checked, **others})


def _max_tokens(asked: CompletionRequest, prompts: list[list[int]], lm: LanguageModel) -> int:
    """Return as many as were asked for, or the default as far as it fits.

    Raises:
        RequestError: more were asked for than fit.
    """
    longest = max(map(len, prompts))
    room = lm.longest - longest
    if room < 0:
        raise RequestError(
            f"the prompt has {longest} tokens and the model's sequences end at {lm.longest}",
            name="prompt",
        )
    if "max_tokens" not in asked.model_fields_set:
        return min(DEFAULT_MAX_TOKENS, room)
    if asked.max_tokens > room:
        raise RequestError(
            f"the prompt's {longest} tokens and max_tokens={asked.max_tokens} are more than the "
            f"{lm.longest} positions of the model: ask for at most {room}",
            name="max_tokens",
        )
    return asked.max_tokens


def _prompts(prompt: Any, lm: LanguageModel) -> list[list[int]]:
    """Return the ids of a text, of texts, of token ids, or of lists of them."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            "prompt must be a text, a list of texts, or token ids, and not empty", name="prompt"
        )
    if all(type(number) is int for number in prompt):
        prompt = [prompt]
    if len(prompt) > MOST_ANSWERS:
        raise RequestError(f"{len(prompt)} prompts are over {MOST_ANSWERS}", name="prompt")
    return [_ids(part, lm) for part in prompt]


def _ids(prompt: Any, lm: LanguageModel) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = lm.encode(prompt)
        except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
            raise RequestError(f"prompt cannot be encoded: {error}", name="prompt") from error
    elif isinstance(prompt, list) and all(type(number) is int for number in prompt):
        ids = prompt
        wrong = [number for number in ids if not 0 <= number < lm.vocab_size]
        if wrong:
            raise RequestError(
                f"the token id {wrong[0]} is not in the vocabulary of {lm.vocab_size}",
                name="prompt",
            )
    else:
        raise RequestError("prompt must hold texts or lists of token ids alone", name="prompt")
    if not prompt or not ids:
        raise RequestError("prompt is empty: give some text to continue", name="prompt")
    return ids
