"""Blend lists that are right, and what is said about those that are not."""

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smlp.data.blending import Blend, Blends, blends_from_arguments, parse_blend
from megatron_smlp.errors import DataError


@pytest.mark.parametrize(
    ("words", "prefixes", "weights"),
    [
        (["a"], ("a",), None),
        (["a", "b"], ("a", "b"), None),
        (["a", "b", "c"], ("a", "b", "c"), None),
        (["1", "a"], ("a",), (1.0,)),
        (["0.7", "a", "3e-1", "b"], ("a", "b"), (0.7, 0.3)),
        (["30", "a/1", "70", "a/1"], ("a/1", "a/1"), (30.0, 70.0)),
        (["a.bin", "b.idx"], ("a", "b"), None),
        (["1", "a.bin"], ("a",), (1.0,)),
    ],
)
def test_good_lists(
    words: list[str], prefixes: tuple[str, ...], weights: tuple[float, ...] | None
) -> None:
    assert parse_blend(words, source="--data-path") == Blend(prefixes, weights)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "is empty"),
        (["0.7", "a", "b"], "entry 3 of 3, 'b', should be a weight"),
        (["0.7", "a", "0.3"], "ends with the weight 0.3: a prefix is missing"),
        (["a", "0.7", "b", "0.3"], "entry 1 of 4, 'a', should be a weight"),
        (["0.7", "0.3", "a", "b"], "entry 2 of 4, '0.3', should be a prefix"),
        (["a", "0.3", "b"], "entry 1 of 3, 'a', should be a weight"),
        (["0.5", "a", "b", "c"], "entry 3 of 4, 'b', should be a weight"),
        (["0", "a", "1", "b"], "the weight 0 of 'a' is not above 0"),
        (["-1", "a"], "the weight -1 of 'a' is not above 0"),
        (["nan", "a"], "the weight nan of 'a' is not above 0"),
        (["inf", "a"], "the weight inf of 'a' is not above 0"),
        (["1"], "ends with the weight 1"),
    ],
)
def test_bad_lists_name_the_entry(words: list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_blend(words, source="--data-path")
    assert str(caught.value).startswith("--data-path")
    assert message in str(caught.value)


def test_a_dataset_may_have_a_number_for_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024.idx").touch()
    assert parse_blend(["0.5", "2024", "0.5", "b"], source="x").prefixes == ("2024", "b")


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.text("abc/", min_size=1)), min_size=1))
def test_megatron_reads_good_lists_in_the_same_way(pairs: list[tuple[float, str]]) -> None:
    from megatron.core.datasets.utils import get_blend_from_list

    for words in ([str(part) for pair in pairs for part in pair], [name for _, name in pairs]):
        prefixes, weights = get_blend_from_list(words)
        ours = parse_blend(words, source="x").as_megatron()
        assert ours == (list(prefixes), weights)


def _args(**flags: object) -> argparse.Namespace:
    return argparse.Namespace(**flags)


def test_flags_and_files(tmp_path: Path) -> None:
    words = tmp_path / "blend.txt"
    words.write_text("0.3 a\n0.7 b\n")
    assert blends_from_arguments(_args(data_path=["a"])) == Blends(Blend(("a",), None))
    assert blends_from_arguments(_args(data_args_path=str(words))).whole == Blend(
        ("a", "b"), (0.3, 0.7)
    )
    separate = blends_from_arguments(_args(train_data_path=["1", "a"], valid_data_path=["b"]))
    assert separate.per_split == (Blend(("a",), (1.0,)), Blend(("b",), None), None)
    assert separate.prefixes == ["a", "b"]
    body = tmp_path / "splits.json"
    body.write_text(json.dumps({"train": "1 a 2 b", "valid": ["c"], "test": None}))
    per_split = blends_from_arguments(_args(per_split_data_args_path=str(body)))
    assert per_split.prefixes == ["a", "b", "c"]
    assert blends_from_arguments(_args()) == Blends()


def test_flags_that_exclude_one_another(tmp_path: Path) -> None:
    for flags in (
        {"data_path": ["a"], "data_args_path": "f"},
        {"data_path": ["a"], "train_data_path": ["b"]},
        {"train_data_path": ["b"], "per_split_data_args_path": "f"},
    ):
        with pytest.raises(DataError, match="exclude one another"):
            blends_from_arguments(_args(**flags))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold the keys train, valid, test; it has list"),
        ('{"train": "a"}', "it has train"),
        ('{"train": "0.5 a b", "valid": "c", "test": null}', "entry 3 of 3"),
        ('{"train": "a", "valid": 3, "test": null}', "valid: 3 is neither a list"),
        ('{"train": {"a": 1}, "valid": null, "test": null}', "train: .* is neither a list"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        blends_from_arguments(_args(per_split_data_args_path=str(path)))
    with pytest.raises(DataError, match="is not readable"):
        blends_from_arguments(_args(data_args_path=str(tmp_path / "none")))
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="is empty"):
        blends_from_arguments(_args(data_args_path=str(tmp_path / "empty")))
