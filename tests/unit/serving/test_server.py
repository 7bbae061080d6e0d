"""tools/serve.py over a real socket: openai's client, lm-eval's, many at once, bad requests."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from support.language_models import END, greedy, save_language_model
from support.launches import clean_environment, wait_for_line
from support.ranks import forkserver, rank_process
from support.smlp_systems import LONGEST
from tokenizers import decoders
from transformers import GenerationConfig

from megatron_smlp.data.tokenizers.bytes_and_numbers import Null
from megatron_smlp.errors import UserError
from megatron_smlp.generation.cli import build_parser
from megatron_smlp.generation.language_model import LanguageModel, load
from megatron_smlp.serving import cli
from megatron_smlp.serving.admission import Admission
from megatron_smlp.serving.app import build_app
from megatron_smlp.serving.requests import Asked, RequestError, parse
from megatron_smlp.serving.sampling import Token
from megatron_smlp.serving.work import Answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save_language_model(tmp_path_factory.mktemp("served"), "smlp_deterministic")


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return load(build_parser().parse_args(["--hf", str(folder)]))


def application(lm: LanguageModel, *, max_waiting: int = 1, **more: Any) -> Any:
    return build_app(lm, Admission(max_body_bytes=20_000, max_waiting=max_waiting, **more))


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    server = uvicorn.Server(cli.server_config(app))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:  # even if the test fails: the process would not end otherwise
            server.should_exit = True
            thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url(lm: LanguageModel) -> Iterator[str]:
    with running(application(lm, max_waiting=200)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def logprobs_of(lm: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([ids])).logits[0].float().log_softmax(dim=-1)


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["hf"]
    assert client.models.retrieve("hf").id == "hf"
    with pytest.raises(openai.NotFoundError, match="'other/model' does not exist"):
        client.models.retrieve("other/model")


def test_greedy_answers_with_log_probabilities(client: openai.OpenAI, lm: LanguageModel):
    new = greedy(lm, lm.encode("the file"), 6)
    answer = client.completions.create(
        model="hf", prompt="the file", max_tokens=6, temperature=0, logprobs=3, echo=True
    )
    [choice] = answer.choices
    assert choice.text == "the file" + lm.decode([token for token in new if token != lm.end])
    ids = [*lm.encode("the file"), *new]
    expected = logprobs_of(lm, ids)
    told = choice.logprobs
    assert told.tokens == [lm.decode([number]) for number in ids]
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    for place, number in enumerate(ids[1:], start=1):
        assert told.token_logprobs[place] == pytest.approx(
            expected[place - 1, number].item(), abs=1e-5
        )
        largest = expected[place - 1].topk(3).values.tolist()
        assert sorted(told.top_logprobs[place].values()) == pytest.approx(largest[::-1], abs=1e-5)
    assert told.text_offset[:3] == [0, 1, 2]
    assert answer.usage.prompt_tokens == len("the file")
    assert answer.usage.completion_tokens == len(new)


def test_pieces_together_are_the_whole(client: openai.OpenAI):
    """Multi-byte characters never arrive in parts; seeds repeat; n answers differ."""
    asked: dict[str, Any] = {
        "model": "hf", "prompt": "é", "max_tokens": 20, "temperature": 1.5, "top_p": 0.9,
        "seed": 7, "n": 3, "logprobs": 0, "echo": True,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    texts, offsets, reasons = [""] * 3, [[], [], []], [None] * 3
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    events = list(client.completions.create(**asked, **with_usage))
    assert events[-1].usage == whole.usage
    assert [event.usage for event in events[:-1]] == [None] * (len(events) - 1)
    for event in events:
        for piece in event.choices:
            texts[piece.index] += piece.text
            offsets[piece.index] += piece.logprobs.text_offset
            reasons[piece.index] = piece.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3
    again = client.completions.create(**{**asked, "seed": 8})
    assert [choice.text for choice in again.choices] != texts


def test_stop_texts_end_an_answer(client: openai.OpenAI, lm: LanguageModel):
    free = lm.decode(greedy(lm, lm.encode("abc"), 12))
    stop = free[4:6]
    asked: dict[str, Any] = {"model": "hf", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    [choice] = client.completions.create(**asked, stop=[stop, "absent"]).choices
    assert choice.text == free[: free.index(stop)]
    assert choice.finish_reason == "stop"
    pieces = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text


MODEL = SimpleNamespace(generation_config=GenerationConfig())


class ByteFallback:
    """ASCII characters, and bytes for all others, as Llama's tokenizers fall back to bytes.

    Its decoder shows each byte of an incomplete character as a character.
    """

    def __init__(self) -> None:
        self.names = [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in range(256)]
        self.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.decoder.decode([self.names[number] for number in ids]))


@pytest.mark.parametrize("stop", ["\u5b57", "b\u5b57"])
def test_a_stop_text_that_ends_in_single_bytes_ends_an_answer(stop: str):
    """It ends with the text's last byte, and nothing of the text is sent."""
    lm = LanguageModel(MODEL, tokenizer=ByteFallback(), end=None, name="bytes")
    assert lm.decode(list("ab\u5b57".encode()[:-1])) == "ab\ufffd\ufffd"
    answer, sent, ended = Answer(lm, list(b"prompt"), [stop]), "", []
    for byte in "ab\u5b57".encode():
        ended.append(answer.push(Token(byte, None, None)))
        sent += answer.news(ended=ended[-1])
    assert ended == [False] * 4 + [True]
    assert sent == answer.text == "ab\u5b57".removesuffix(stop)
    assert answer.finish_reason == "stop"


def test_twenty_clients_each_get_their_own_answer(url: str, lm: LanguageModel):
    prompts = [f"{number} " + "ab" * (number % 7) for number in range(20)]

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        asked = {"model": "hf", "prompt": prompts[number], "max_tokens": 3 + number % 5}
        if number % 2:
            answer = await client.completions.create(**asked, temperature=0)
            return str(answer.choices[0].text)
        events = await client.completions.create(**asked, temperature=0, stream=True)
        return "".join([event.choices[0].text async for event in events])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    answers = asyncio.run(ask_all())
    for number, prompt in enumerate(prompts):
        new = [token for token in greedy(lm, lm.encode(prompt), 3 + number % 5) if token != lm.end]
        assert answers[number] == lm.decode(new), prompt


JSON = {"Content-Type": "application/json"}
BAD: list[tuple[bytes | dict[str, Any], int, str]] = [
    *((body, 400, "the body") for body in (b"{", b"\xff", b"[1]", b"[" * 9000)),
    *(({"temperature": value}, 400, "the body") for value in (float("nan"), "\ud800")),
    (b"x" * 20_001, 413, "the body is over 20000 bytes"),
    ({}, 400, "prompt"),
    *(({"prompt": prompt}, 400, "prompt") for prompt in ("", [], ["a", ""], ["a", 3])),
    ({"prompt": [5, 9999]}, 400, "token id 9999"),
    ({"prompt": "a" * (LONGEST + 1)}, 400, "the prompt has 41 tokens"),
    ({"max_tokens": LONGEST}, 400, "ask for at most 39"),
    ({"model": "gpt-4"}, 404, "does not exist"),
    *(({name: 0.5}, 400, f"{name}: ") for name in ("top_k", "presence_penalty", "suffix", "min_p")),
    *(({name: 0}, 400, f"{name}: ") for name in ("top_p", "echo", "stop")),
    *(({name: 10**30}, 400, f"{name}: ") for name in ("n", "logprobs")),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD)
def test_bad_requests_get_json(url: str, body: bytes | dict[str, Any], status: int, message: str):
    asked = {"prompt": "a", **body} if body and isinstance(body, dict) else body
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    answer = httpx.post(f"{url}/completions", content=content, headers=JSON, timeout=60)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


FOREIGN: list[tuple[dict[str, str], int]] = [
    ({"Content-Type": "text/plain"}, 415),
    ({"Content-Type": ""}, 415),
    ({**JSON, "Host": "evil.example:8000"}, 403),
    ({**JSON, "Host": "127.0.0.1.evil.example"}, 403),
    ({**JSON, "Host": "[::1"}, 403),
    ({**JSON, "Host": "localhost:8000"}, 200),
    ({**JSON, "Host": "[::1]:8000"}, 200),
    ({"Content-Type": "application/json; charset=utf-8"}, 200),
]


@pytest.mark.parametrize(("headers", "status"), FOREIGN)
def test_what_a_web_page_could_send_is_refused(url: str, headers: dict[str, str], status: int):
    body = json.dumps({"prompt": "a", "max_tokens": 1, "stop": "longer than 16 letters"}).encode()
    answer = httpx.post(f"{url}/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == status
    assert (status == 200) == ("choices" in answer.json())
    asks_first = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    leave = httpx.options(f"{url}/completions", headers={**headers, **asks_first}, timeout=60)
    for told in (answer, leave):
        assert "access-control-allow-origin" not in told.headers
    if status == 403:
        assert httpx.get(f"{url}/models", headers=headers, timeout=60).status_code == 403


def test_a_fault_of_the_server_is_json(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr("megatron_smlp.serving.work.answer", fails)
    with running(application(lm)) as address:
        for streams, status in ((False, 500), (True, 200)):
            asked = {"prompt": "a", "stream": streams}
            answer = httpx.post(f"{address}/completions", json=asked, timeout=60)
            assert answer.status_code == status
            first = answer.text.splitlines()[0].removeprefix("data: ")
            assert json.loads(first)["error"]["type"] == "server_error"


def test_a_key_and_more_names(lm: LanguageModel):
    from fastapi.testclient import TestClient

    app = application(lm, hosts=["Model.example"], api_key="secret")
    with TestClient(app, base_url="http://Model.example") as client:
        for key in ("Bearer wrong", "Bearer \u00e9", "secret", "Bearer secret", "bearer secret"):
            status = client.get("/v1/models", headers={"Authorization": key.encode()}).status_code
            assert status == (200 if key.lower() == "bearer secret" else 401)
        assert client.get("/v1/models").status_code == 401
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401
    options = cli.build_parser().parse_args(["--hf", "x", "--allowed-hosts", "a", "*"])
    admission = Admission(hosts=options.allowed_hosts, max_body_bytes=1, max_waiting=1)
    admission.check({"host": "any.example"}, has_body=False)


def test_the_coldest_temperatures_and_one_choice_are_greedy(
    client: openai.OpenAI, lm: LanguageModel
):
    expected = lm.decode([token for token in greedy(lm, lm.encode("abc"), 6) if token != lm.end])
    asked: dict[str, Any] = {"model": "hf", "prompt": "abc", "max_tokens": 6}
    for temperature in (1e-39, 1e-300, 1e-29):
        [choice] = client.completions.create(**asked, temperature=temperature).choices
        assert choice.text == expected
    extra = {"top_k": 1}
    [choice] = client.completions.create(**asked, temperature=2, extra_body=extra).choices
    assert choice.text == expected


def test_a_repetition_penalty_is_transformers_own(client: openai.OpenAI, lm: LanguageModel):
    """It does not change the log-probabilities."""
    ids = torch.tensor([lm.encode("abab")])
    new = lm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        repetition_penalty=3.0,
        eos_token_id=lm.end,
        pad_token_id=lm.end,
    )[0, ids.shape[1] :].tolist()
    [choice] = client.completions.create(
        model="hf", prompt="abab", max_tokens=8, temperature=0, logprobs=0,
        extra_body={"repetition_penalty": 3.0},
    ).choices  # fmt: skip
    assert new != greedy(lm, lm.encode("abab"), 8)
    assert choice.text == lm.decode([token for token in new if token != lm.end])
    expected = logprobs_of(lm, [*ids[0].tolist(), *new])[ids.shape[1] - 1 : -1]
    rows = expected[range(len(new)), new].tolist()
    assert choice.logprobs.token_logprobs == pytest.approx(rows, abs=1e-4)


def test_lm_eval_scores_as_the_model_does(url: str, lm: LanguageModel, folder: Path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asker = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model="hf",
        tokenizer_backend="huggingface",
        tokenizer=str(folder),
        max_length=LONGEST,
        batch_size=2,
        max_retries=1,
    )
    pairs = [("The man", " fell."), ("x" * 60, " it is"), ("He", END)]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for (context, option), (score, is_greedy) in zip(
        pairs, asker.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        new = lm.encode(option)
        ids = [*lm.encode(context), *new][-(LONGEST - 1) :]
        rows = logprobs_of(lm, ids)[-len(new) - 1 : -1]
        assert score == pytest.approx(float(rows[range(len(new)), new].sum()), abs=1e-4)
        assert is_greedy == (rows.argmax(dim=-1).tolist() == new)


@pytest.mark.parametrize("streams", [True, False])
def test_no_more_than_may_wait_get_in_at_once(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, streams: bool
):
    """All requests of a burst arrive before the first is parsed; bad requests free their place."""
    count, max_waiting = 5, 2
    num_parsing, opened = 0, threading.Event()

    def slow(body: bytes, lm: LanguageModel) -> Asked:
        nonlocal num_parsing
        num_parsing += 1
        opened.wait(60)
        return parse(body, lm)

    monkeypatch.setattr("megatron_smlp.serving.app.parse", slow)
    asked = {"prompt": "a", "max_tokens": 1, "temperature": 0, "stream": streams}

    async def burst(where: str) -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [asyncio.create_task(client.post(where, json=asked)) for _ in range(count)]
            while num_parsing + sum(task.done() for task in tasks) < count:
                await asyncio.sleep(0.01)
            opened.set()
            return [answer.status_code for answer in await asyncio.gather(*tasks)]

    with running(application(lm, max_waiting=max_waiting)) as address:
        where = f"{address}/completions"
        assert httpx.get(where, timeout=60).status_code == 405
        statuses = asyncio.run(burst(where))
        assert sorted(statuses) == [200] * max_waiting + [429] * (count - max_waiting)
        for _ in range(max_waiting + 1):
            assert httpx.post(where, json={}, timeout=60).status_code == 400
        assert httpx.post(where, json=asked, timeout=60).status_code == 200


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_place(lm: LanguageModel, streams: bool):
    """There is one place: it is taken, then free long before the answers would be ready."""
    num_answers, num_tokens, calls = 100, LONGEST - 1, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    asked = {"prompt": ["a"] * num_answers, "max_tokens": num_tokens, "stream": streams}
    short = {"prompt": "a", "max_tokens": 1, "temperature": 0}
    hook = lm.model.register_forward_pre_hook(count)
    with running(application(lm, max_waiting=1)) as address:
        where = f"{address}/completions"

        async def go_away() -> int:
            """Leave while being answered; return the status that another client gets meanwhile."""
            async with httpx.AsyncClient(timeout=60) as client:
                asking = asyncio.create_task(client.post(where, json=asked))
                while not calls:
                    assert not asking.done()
                    await asyncio.sleep(0.01)
                status = (await client.post(where, json=short)).status_code
                asking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asking
                return status

        assert asyncio.run(go_away()) == 429
        deadline = time.monotonic() + 20
        while httpx.post(where, json=short, timeout=60).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    hook.remove()
    assert 0 < calls < num_answers * num_tokens / 2


@pytest.mark.parametrize(
    "flags", ["--port 99999", "--host 203.0.113.1", "--api-key=", "--max-waiting 0"]
)
def test_bad_flags_are_refused(folder: Path, flags: str):
    with pytest.raises(UserError, match=flags.split()[0].strip("=")):
        cli.main(["--hf", str(folder), *flags.split()])


def test_its_flags_are_heeded_and_ctrl_c_ends_it_cleanly(folder: Path, tmp_path: Path):
    argv = ["--hf", str(folder), "--port", "0", "--api-key", "k", "--model-name", "m"]
    work = (cli.main, ([*argv, "--max-body-bytes", "500"],))
    log = tmp_path / "log"
    server = rank_process(forkserver(), *work, log=log, environment=clean_environment())
    server.start()
    try:
        url = wait_for_line("serving 'm' at http://127.0.0.1:", log, server).split()[3]
        assert httpx.get(f"{url}/models", timeout=60).status_code == 401
        with httpx.Client(headers={"Authorization": "Bearer k"}, timeout=60) as client:
            assert [model["id"] for model in client.get(f"{url}/models").json()["data"]] == ["m"]
            for length, status in ((500, 400), (501, 413)):
                answer = client.post(f"{url}/completions", content=b"x" * length, headers=JSON)
                assert answer.status_code == status
            asked = {"prompt": ["a"] * 100, "max_tokens": LONGEST - 1, "stream": True}
            with client.stream("POST", f"{url}/completions", json=asked) as events:
                lines = events.iter_lines()
                assert next(lines).startswith("data: ")
                for _ in range(2):
                    os.kill(server.pid, signal.SIGINT)
                    time.sleep(0.5)
        server.join(60)
    finally:
        server.kill()
    assert server.exitcode == 0
    said = log.read_text(encoding="utf-8").splitlines()
    assert said[0].startswith("serving ")
    assert said[2:] == [], "but its address, and that a task is cancelled"


def test_a_prompt_without_ids_is_the_clients_fault(lm: LanguageModel):
    numbers = replace(lm, tokenizer=Null(100, 99))
    with pytest.raises(RequestError, match="not a list of numbers"):
        parse(b'{"prompt": "hello"}', numbers)
