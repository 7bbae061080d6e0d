"""If a tokenizer puts a token before each text, generate, serve and evaluate do so too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.beginning import begin_texts
from support.language_models import greedy, save_language_model
from support.smlp_systems import LONGEST

from megatron_smlp.errors import UsageError
from megatron_smlp.generation import cli
from megatron_smlp.generation.language_model import LanguageModel, load
from megatron_smlp.serving.app import Work
from megatron_smlp.serving.requests import RequestError, parse

BEGIN = 7
"""Id of that token, which decodes to text."""
GREEDY = ["--temperature", "0", "--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    made = save_language_model(tmp_path_factory.mktemp("begins"), "smlp_deterministic")
    begin_texts(made, BEGIN)
    return made


def loaded(folder: Path, *argv: str) -> LanguageModel:
    return load(cli.build_parser().parse_args(["--hf", str(folder), *argv]))


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return loaded(folder)


def slow(lm: LanguageModel, ids: list[int], count: int) -> str:
    return lm.continuation(ids, greedy(lm, ids, count))


def test_a_prompt_begins_as_texts_of_the_training(
    lm: LanguageModel, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ids = lm.encode("the files")
    assert ids == [
        BEGIN,
        *loaded(folder, "--tokenizer-hf-no-include-special-tokens").encode("the files"),
    ]
    assert len(ids) == 10
    text = slow(lm, ids, 5)
    cli.main(["--hf", str(folder), *GREEDY, "--prompt", "the files"])
    assert capsys.readouterr().out == f"the files{text}\n"
    path = tmp_path / "prompts.txt"
    path.write_text("the files\n")
    cli.main(["--hf", str(folder), *GREEDY, "--prompts-file", str(path)])
    record = {"prompt": "the files", "text": text, "num_tokens": 5}
    assert json.loads(capsys.readouterr().out) == record


def test_the_token_alone_is_no_prompt(lm: LanguageModel):
    from megatron_smlp.generation.completion import encode_prompt

    with pytest.raises(UsageError, match="is empty"):
        encode_prompt(lm, "", where="it")
    with pytest.raises(UsageError, match=f"has {LONGEST} tokens"):
        encode_prompt(lm, "x" * (LONGEST - 1), where="it")
    with pytest.raises(RequestError, match="prompt is empty"):
        parse(b'{"prompt": ["a", ""]}', lm)


def answers(lm: LanguageModel, prompt: Any) -> list[dict[str, Any]]:
    fields = {"prompt": prompt, "temperature": 0, "max_tokens": 5, "logprobs": 1, "echo": True}
    return Work(lm, parse(json.dumps(fields).encode(), lm), None).run()


def test_the_server_begins_texts_and_takes_ids_as_they_are(lm: LanguageModel):
    ids = lm.encode("the files")
    text, given, bare = answers(lm, ["the files", ids, ids[1:]])
    assert text["text"] == "the files" + slow(lm, ids, 5)
    assert "".join(text["logprobs"]["tokens"][:9]) == "the files"
    assert text["logprobs"]["text_offset"][:3] == [0, 1, 2]
    assert given["text"] == lm.decode([BEGIN]) + text["text"]
    assert given["logprobs"]["token_logprobs"][1:] == text["logprobs"]["token_logprobs"]
    assert bare["text"] == "the files" + slow(lm, ids[1:], 5)
    [alone] = answers(lm, "the files")
    assert alone["text"] == text["text"]
