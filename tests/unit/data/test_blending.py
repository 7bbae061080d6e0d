"""Valid blend lists, and the errors for invalid ones."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_smlp.data.blending import Blend, Blends, blends_from_arguments, parse_blend
from megatron_smlp.errors import UsageError


def test_good_lists():
    assert parse_blend(["a.bin", "b.idx"], source="x") == Blend(["a", "b"], None)
    weighted = parse_blend(["30", "a/1", "7e1", "a/1.bin"], source="x")
    assert weighted == Blend(["a/1", "a/1"], [30.0, 70.0])


@pytest.mark.parametrize(
    ("values", "entry"),
    [
        ([], ""),
        (["0.7", "a", "b"], "entry 3"),
        (["0.7", "a", "0.3"], "0.3"),
        (["a", "0.7", "b", "0.3"], "entry 1"),
        (["0.7", "0.3", "a", "b"], "entry 2"),
        *(([weight, "a", "1", "b"], f"{weight} of 'a'") for weight in ("0", "-1", "nan", "inf")),
    ],
)
def test_bad_lists_name_the_entry(values: list[str], entry: str):
    with pytest.raises(UsageError, match=f"--data-path.*{entry}"):
        parse_blend(values, source="--data-path")


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.text("abc/", min_size=1)), min_size=1))
def test_megatron_reads_good_lists_in_the_same_way(pairs: list[tuple[float, str]]):
    from megatron.core.datasets.utils import get_blend_from_list

    for values in ([str(part) for pair in pairs for part in pair], [name for _, name in pairs]):
        prefixes, weights = get_blend_from_list(values)
        assert parse_blend(values, source="x") == (list(prefixes), weights)


def test_flags_and_files(tmp_path: Path):
    path = tmp_path / "blend.txt"
    path.write_text("0.3 a\n0.7 b\n")
    assert blends_from_arguments(Namespace(data_path=["a"])) == Blends(Blend(["a"], None))
    assert blends_from_arguments(Namespace(data_args_path=str(path))).whole == Blend(
        ["a", "b"], [0.3, 0.7]
    )
    separate = blends_from_arguments(Namespace(train_data_path=["1", "a"], valid_data_path=["b"]))
    assert separate.per_split == [Blend(["a"], [1.0]), Blend(["b"], None), None]
    assert separate.prefixes == ["a", "b"]
    body = tmp_path / "splits.json"
    body.write_text(json.dumps({"train": "1 a 2 b", "valid": ["c"], "test": None}))
    per_split = blends_from_arguments(Namespace(per_split_data_args_path=str(body)))
    assert per_split.prefixes == ["a", "b", "c"]
    assert blends_from_arguments(Namespace()) == Blends()
    for flags in (
        {"data_path": ["a"], "data_args_path": "f"},
        {"data_path": ["a"], "train_data_path": ["b"]},
        {"train_data_path": ["b"], "per_split_data_args_path": "f"},
    ):
        with pytest.raises(UsageError, match="cannot be combined"):
            blends_from_arguments(Namespace(**flags))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"train": "a"}', '{"train": "a", "valid": 3, "test": null}']
)
def test_bad_files(tmp_path: Path, text: str):
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"--per-split-data-args-path .*splits\.json"):
        blends_from_arguments(Namespace(per_split_data_args_path=str(path)))
    (tmp_path / "empty").touch()
    for name in ("none", "empty"):
        with pytest.raises(UsageError, match="--data-args-path"):
            blends_from_arguments(Namespace(data_args_path=str(tmp_path / name)))
