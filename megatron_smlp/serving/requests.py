"""Validate bodies of /v1/completions, and format the errors that clients get as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from megatron_smlp.data.tokenizers.spec import UnencodableTextError
from megatron_smlp.generation.language_model import LanguageModel

MOST_ANSWERS = 128
"""Limit on the answers to one prompt, which are generated together."""
MOST_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16


def error_body(message: str, kind: str, name: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's format."""
    return {"error": {"message": message, "type": kind, "param": name, "code": None}}


class RequestError(Exception):
    """A client's mistake: an HTTP status and a message for it."""

    def __init__(self, message: str, *, status: int = 400, name: str | None = None) -> None:
        super().__init__(message)
        self.status, self.name = status, name

    def body(self) -> dict[str, Any]:
        return error_body(str(self), "invalid_request_error", self.name)


class CompletionRequest(BaseModel):
    """A request's fields; null stands for a field's default."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str | None = None
    prompt: str | list[int] | list[str | list[int]]
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    """Not in OpenAI's API, but in vLLM's; 0 and -1: all tokens."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Not in OpenAI's API, but in vLLM's."""
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    seed: int | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] = {}
    stop: str | list[str] = []
    user: Any = None
    """The client's name, which has no effect."""


class Asked(CompletionRequest):
    """A request that the model can answer."""

    prompt: list[str | list[int]]
    prompts: list[list[int]]
    """Token ids of each prompt."""
    max_tokens: int
    stop: list[str]


def check_model(name: str, lm: LanguageModel) -> None:
    """Raise RequestError if this server has no such model."""
    if name != lm.name:
        raise RequestError(
            f"the model {name[:100]!r} does not exist; this server has {lm.name!r}",
            status=404,
            name="model",
        )


def parse(body: bytes, lm: LanguageModel) -> Asked:
    """Check a request's body.

    Raises:
        RequestError: it is not a JSON object, or a value in it is invalid.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if value is not None}
    try:
        given = CompletionRequest.model_validate(values)
    except ValidationError as error:
        wrong = error.errors()[-1]  # for a union, that of its last member
        name = str(wrong["loc"][0]) if wrong["loc"] else None
        raise RequestError(f"{name or 'the body'}: {wrong['msg']}", name=name) from error
    if given.model is not None:
        check_model(given.model, lm)
    stops = [given.stop] if isinstance(given.stop, str) else given.stop
    prompt = _several(given.prompt)
    prompts = _ids(prompt, lm)
    return Asked.model_construct(
        **given.model_dump(exclude={"prompt", "max_tokens", "stop", "top_k"}),
        prompt=prompt,
        prompts=prompts,
        max_tokens=_max_tokens(given.max_tokens, prompts, lm),
        stop=[text for text in stops if text],
        top_k=max(0, given.top_k),
    )


def _several(prompt: str | list[int] | list[str | list[int]]) -> list[str | list[int]]:
    """Return a list of prompts, wrapping a single one."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [part for part in prompt if isinstance(part, int)]
    return [ids] if ids else [part for part in prompt if not isinstance(part, int)]


def _ids(prompts: list[str | list[int]], lm: LanguageModel) -> list[list[int]]:
    try:
        rows = [lm.encode(part) if isinstance(part, str) else part for part in prompts]
    except UnencodableTextError as error:
        raise RequestError(f"prompt cannot be encoded: {error}", name="prompt") from error
    if not rows or not all(prompts) or not all(rows):
        raise RequestError("prompt is empty: give some text to continue", name="prompt")
    for number in (number for row in rows for number in row):
        if not 0 <= number < lm.vocab_size:
            raise RequestError(
                f"token id {number} is outside the vocabulary of {lm.vocab_size}", name="prompt"
            )
    return rows


def _max_tokens(asked: int | None, prompts: list[list[int]], lm: LanguageModel) -> int:
    """Return the requested number of new tokens, or as much of the default as fits.

    Raises:
        RequestError: more were asked for than fit.
    """
    longest = max(map(len, prompts))
    room = lm.longest - longest
    if room < 0:
        raise RequestError(
            f"the prompt has {longest} tokens; the model's limit is {lm.longest}",
            name="prompt",
        )
    if asked is not None and asked > room:
        raise RequestError(
            f"the prompt's {longest} tokens and max_tokens={asked} exceed the model's "
            f"{lm.longest} positions: ask for at most {room}",
            name="max_tokens",
        )
    return min(DEFAULT_MAX_TOKENS, room) if asked is None else asked
