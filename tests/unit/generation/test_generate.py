"""tools/generate.py: all three kinds of prompts, both kinds of models, position T, bad input."""

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.conversions import run
from support.in_process import pretrained
from support.language_models import save_language_model
from support.smlp_systems import LONGEST

from megatron_smlp.conversion import convert
from megatron_smlp.errors import UserError
from megatron_smlp.generation import cli
from megatron_smlp.generation.completion import complete
from megatron_smlp.generation.language_model import LanguageModel, load
from megatron_smlp.serving.sampling import Token
from megatron_smlp.serving.work import Answer

TRAINED = (
    "--architecture smlp --num-dense-layers 1 --num-layers 3 --feature-router deterministic "
    "--num-feature-experts 2 --num-experts 4 --token-router base --bf16"
)
GREEDY = ["--temperature", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save_language_model(tmp_path_factory.mktemp("model"), "smlp_partial")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("trained")
    with pretrained(f"{TRAINED} --save {made}"):
        return made


def lines(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    cli.main(argv)
    return capsys.readouterr().out.splitlines()


def test_a_checkpoint_says_what_its_export_says(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(convert.torch_dist_to_hf, trained, tmp_path / "hf")
    numbers = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]
    models = (["--checkpoint", str(trained)], ["--hf", str(tmp_path / "hf"), *numbers])
    ours, theirs = (load(cli.build_parser().parse_args(m)).model.state_dict() for m in models)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name: ours[name].dtype for name in ours} == {n: t.dtype for n, t in theirs.items()}
    argv = ["--prompt", "5 17 3", "--max-new-tokens", "6", *GREEDY]
    [said] = lines([*models[0], *argv], capsys)
    assert lines([*models[1], *argv], capsys) == [said]
    tokens = [int(word) for word in said.split()]
    assert tokens[:3] == [5, 17, 3]
    assert len(tokens) == 9
    assert max(tokens) <= 100  # never the padding of the vocabulary
    (tmp_path / "prompts").write_text("05 17\n")  # its ids stand for "5 17"
    [said] = lines([*models[0], "--prompts-file", str(tmp_path / "prompts"), *GREEDY], capsys)
    assert json.loads(said)["prompt"] == "05 17"


def test_a_file_of_prompts_equals_one_by_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Prompts differ in length; the last reaches position T and stops no other. A byte order mark,
    which some editors write, is not part of the first."""
    prompts = ["a", "the files are", "", "nine words ", "x" * (LONGEST - 3)]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8-sig")
    model = ["--hf", str(folder), "--max-new-tokens", "9", *GREEDY]
    records = [json.loads(line) for line in lines([*model, "--prompts-file", str(path)], capsys)]
    given = [prompt for prompt in prompts if prompt]
    assert [record["prompt"] for record in records] == given
    for record, prompt in zip(records, given, strict=True):
        cli.main([*model, "--prompt", prompt])
        assert capsys.readouterr().out == record["prompt"] + record["text"] + "\n"
    assert records[-1]["num_tokens"] == 3
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in given))
    again = [json.loads(line) for line in lines([*model, "--prompts-file", str(path)], capsys)]
    assert again == records


def test_every_end_that_the_folder_names_ends_a_text_and_nothing_else_of_it_counts(
    folder: Path, tmp_path: Path
):
    def loaded(folder: Path) -> LanguageModel:
        return load(cli.build_parser().parse_args(["--hf", str(folder)]))

    lm = loaded(folder)
    greedy = argparse.Namespace(max_new_tokens=12, temperature=0, num_beams=1, num_samples=1)
    prompt = lm.encode("the files")
    ids = torch.tensor([prompt])
    options = {"eos_token_id": None, "suppress_tokens": lm.padding_ids, "do_sample": False}
    new = lm.model.generate(ids, max_new_tokens=12, **options)[0, len(prompt) :].tolist()
    end = new[5]
    other = shutil.copytree(folder, tmp_path / "other")
    settings = {"eos_token_id": [lm.end, end], "repetition_penalty": 5.0, "min_new_tokens": 11}
    (other / "generation_config.json").write_text(json.dumps(settings))
    (completion,) = complete(loaded(other), [prompt], greedy)
    assert completion.text == lm.continuation(prompt, new[: new.index(end)])
    answer = Answer(loaded(other), prompt, [])
    assert [answer.push(Token(number, None, None)) for number in (new[0], end)] == [False, True]


def test_it_stops_at_position_t_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]):
    prompt = "y" * (LONGEST - 4)
    model = ["--hf", str(folder), *GREEDY, "--prompt", prompt]
    cli.main([*model, "--max-new-tokens", "4"])
    enough = capsys.readouterr()
    cli.main([*model, "--max-new-tokens", "50"])
    stopped = capsys.readouterr()
    assert enough.out == stopped.out
    assert enough.err == ""
    assert f"stopped at position {LONGEST}" in stopped.err
    assert "after 4 new tokens" in stopped.err


def test_a_seed_repeats_and_samples_differ(folder: Path, capsys: pytest.CaptureFixture[str]):
    model = ["--hf", str(folder), "--prompt", "a b", "--num-samples", "3", "--temperature", "2"]
    texts = []
    for seed in ("1", "1", "2"):
        cli.main([*model, "--seed", seed, "--top-p", "0.95", "--top-k", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert [text[:3] for text in texts[0].splitlines()] == ["a b"] * 3
    assert len(set(texts[0].splitlines())) > 1


def test_beams_are_as_many_as_were_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--hf", str(folder), "--max-new-tokens", "6", "--prompt", "the file"]
    found = lines([*argv, "--num-beams", "3", "--num-samples", "2"], capsys)
    assert len(found) == 2
    assert found[0] not in lines([*argv, *GREEDY], capsys)


def test_lines_of_a_pipe_are_a_conversation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\n{'z' * LONGEST}\nb\n"))
    cli.main(["--hf", str(folder), "--max-new-tokens", "1", *GREEDY])
    said = capsys.readouterr()
    assert "the prompt has 40 tokens; the model's limit is 40" in said.err
    assert said.out.startswith("a")
    assert "\nb" in said.out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--checkpoint"),
        ("--hf {0} --checkpoint {0}", "--checkpoint"),
        ("--hf {0} --trust-remote-code", "--trust-remote-code"),
        ("--hf /absent --prompt a", "--hf /absent"),
        ("--checkpoint {1} --prompt a", "holds no checkpoint"),
        ("--hf {1} --prompt a", "config.json"),
        ("--hf {0} --prompt=", "--prompt"),
        ("--hf {0} --prompt a --prompts-file {1}/bad.jsonl", "--prompts-file"),
        ("--hf {0} --prompt a --temperature 0 --num-samples 2", "--num-samples 2"),
        ("--hf {0} --prompt a --num-beams 2 --num-samples 3", "--num-beams 2"),
        ("--hf {0} --prompts-file {1}/half.jsonl", "half.jsonl, line 1"),
        ("--hf {0} --prompts-file {1}/blank.txt", "blank.txt"),
        ("--hf {0} --prompts-file {1}/bad.jsonl", "bad.jsonl, line 2"),
        ("--hf {0} --prompts-file /absent", "--prompts-file /absent"),
        ("--hf {0} --prompt a --top-p 0", "--top-p 0.0"),
        ("--hf {0} --prompt a --temperature nan", "--temperature nan"),
        ("--hf {0} --prompt a --max-new-tokens 0", "--max-new-tokens 0"),
        ("--hf {0} --prompt a --device xpu", "--device xpu cannot be used"),
        ("--hf {0} --prompt a --tokenizer-model {1}", "--tokenizer-model"),
        ("--hf {0} --prompt a --tokenizer-type ByteLevelTokenizer", "do not belong together"),
        ("--hf {0} --prompt a --tokenizer-type NullTokenizer --vocab-size 9", "do not belong"),
    ],
)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, flags: str, named: str):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud83d"}\n')
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(UserError, match=named) as caught:
        cli.main(flags.format(folder, tmp_path).split())
    assert "\n" not in str(caught.value)
