"""Incremental generation: the cache, padding on either side, `generate`, position T."""

import pytest
import torch
from support.cover import slow_unless_in
from support.smlp_systems import LONGEST, SYSTEMS, make_ids, make_model
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from megatron_smlp.hf.modeling_smlp import SHORT_ROW, SMLPCache, linear

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = (3, 12, 7)
"""Prompt lengths of a mixed batch; partial prediction's prefix, 8, lies between them."""

pytestmark = pytest.mark.filterwarnings("ignore:.*right-padding.*")


def _padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Return the first LENGTHS tokens of each row of ids, padded on one side, and their mask."""
    width = max(LENGTHS)
    padded, mask = torch.zeros(2, len(LENGTHS), width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        padded[row, place] = ids[row, :length]
        mask[row, place] = 1
    return padded, mask


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_every_position_equals_the_full_forward(system: str):
    model = make_model(system)
    ids = make_ids(3, LONGEST)
    full = model(ids).logits
    cache, pieces = None, []
    for start, stop in [(0, 5), (5, 6), (6, 10), *((t, t + 1) for t in range(10, LONGEST))]:
        output = model(ids[:, start:stop], cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, **TOLERANCE)


SIDES = [(system, side) for side in ("left", "right") for system in SYSTEMS]


@pytest.mark.parametrize(("system", "side"), slow_unless_in(SIDES[::2], SIDES))
@torch.no_grad()
def test_prompts_of_different_lengths_equal_one_by_one(system: str, side: str):
    """With padding on either side the last column predicts the next token, then step by step."""
    model = make_model(system)
    ids = make_ids(3, 28)
    full = [model(row[None]).logits[0] for row in ids]
    padded, mask = _padded(ids, side)
    output = model(padded, attention_mask=mask, use_cache=True)
    for step in range(12):  # past the prefix of partial prediction in every row
        for row, length in enumerate(LENGTHS):
            expected = full[row][length - 1 + step]
            torch.testing.assert_close(output.logits[row, -1], expected, **TOLERANCE)
        tokens = torch.stack([ids[row, n + step] for row, n in enumerate(LENGTHS)])[:, None]
        mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        output = model(tokens, attention_mask=mask, cache=output.cache)


@torch.no_grad()
def test_the_loss_is_the_same_on_either_side_of_padding():
    model, ids = make_model("gmlp"), make_ids(3, 12)
    losses = []
    for side in ("left", "right"):
        padded, mask = _padded(ids, side)
        labels = padded.masked_fill(mask == 0, -100)
        losses.append(model(padded, attention_mask=mask, labels=labels).loss)
    torch.testing.assert_close(*losses, **TOLERANCE)


@pytest.mark.parametrize("system", ["gmlp", "amlp", "smlp_partial", "base"])
def test_beam_search_and_sampling_with_cache_equal_without(system: str):
    """Beams reorder the cache; with the same random numbers, samples are equal too."""
    model = make_model(system)
    prompts, mask = _padded(make_ids(3, 12), "left")
    for mode in ({"num_beams": 3}, {"do_sample": True, "top_k": 20, "num_return_sequences": 2}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            options = {"max_new_tokens": 8, "pad_token_id": 0, "use_cache": use_cache, **mode}
            results.append(model.generate(prompts, attention_mask=mask, **options))
        assert torch.equal(*results)


@pytest.mark.parametrize("system", ["transformer", "smlp_deterministic"])
def test_generation_stops_at_position_t_with_a_message(system: str, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    model = make_model(system)
    output = model.generate(make_ids(2, 35), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert output.shape == (2, LONGEST)
    assert "generation stops at position 40" in caplog.text
    logging.disable_propagation()


@pytest.mark.parametrize("system", ["gmlp_toeplitz", "smlp_partial_toeplitz"])
@torch.no_grad()
def test_toeplitz_models_go_on_behind_position_t(system: str):
    model = make_model(system)
    ids = make_ids(2, LONGEST + 20)
    full = model(ids).logits
    output = model(ids[:, :35], use_cache=True)
    for t in range(35, LONGEST + 20):
        output = model(ids[:, t : t + 1], cache=output.cache)
        torch.testing.assert_close(output.logits[:, 0], full[:, t], **TOLERANCE)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids[:, :35], **options)
    assert cached.shape == (2, 47)
    assert torch.equal(cached, model.generate(ids[:, :35], **options, use_cache=False))


@pytest.mark.parametrize("given", [{"max_length": 30}, {"max_new_tokens": 20}, {}])
def test_lengths_that_are_given_and_that_are_not(given: dict[str, int]):
    assert make_model("gmlp").generate(make_ids(1, 10), **given).shape == (1, 30)


def test_too_long_prompts_and_sequences_are_refused():
    model = make_model("gmlp")
    for given in ({"max_new_tokens": 1}, {}):
        with pytest.raises(ValueError, match="a prompt of 40 tokens leaves no position"):
            model.generate(make_ids(1, LONGEST), **given)
    with pytest.raises(ValueError, match="41 tokens is longer than max_position_embeddings=40"):
        model(make_ids(1, LONGEST + 1))
    cache = model(make_ids(1, LONGEST), use_cache=True).cache
    with pytest.raises(ValueError, match="41 tokens is longer"):
        model(make_ids(1, 1), cache=cache)


@pytest.mark.parametrize(
    ("system", "side", "columns"),
    [
        ("transformer", "left", LONGEST + 20),
        ("smlp_partial", "right", LONGEST + 20),
        ("minhash", "left", LONGEST),
        ("gshard", "right", LONGEST),
    ],
)
def test_padding_takes_no_position(system: str, side: str, columns: int):
    """There are T columns or more, as with padding="max_length": prompts have the same room up to T
    as alone."""
    model = make_model(system)
    ids = make_ids(3, 12)
    prompts, mask = _padded(ids, side)
    beside = (columns - 12, 0) if side == "left" else (0, columns - 12)
    wide = {"attention_mask": functional.pad(mask, beside), "pad_token_id": 0, "do_sample": False}
    padded = functional.pad(prompts, beside)
    logits = model(padded, attention_mask=wide["attention_mask"]).logits
    for row, length in enumerate(LENGTHS):
        expected = model(ids[row : row + 1, :length]).logits[0]
        real = wide["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], expected, **TOLERANCE)
    for given in ({"max_new_tokens": 50}, {}, {"max_new_tokens": 9, "use_cache": False}):
        expected = model.generate(
            prompts, attention_mask=mask, do_sample=False, pad_token_id=0, **given
        )
        new = model.generate(padded, **wide, **given)[:, columns:]
        assert torch.equal(new, expected[:, 12:])


@pytest.mark.parametrize("system", ["gmlp", "transformer"])
def test_another_kind_of_cache_is_refused(system: str):
    with pytest.raises(ValueError, match=r"this model keeps its states .* give an SMLPCache"):
        make_model(system)(make_ids(1, 3), cache=DynamicCache())


def test_a_cache_that_would_not_be_read_is_refused():
    model, ids = make_model("gmlp"), make_ids(1, 3)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="cache holds 3 tokens, which use_cache=False and"):
        model(ids, cache=cache, use_cache=False)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cache holds 3 tokens, which use_cache=False and"):
        model(ids, cache=cache)


def test_a_cache_of_the_users_is_marked_as_theirs():
    """Otherwise transformers, which on some devices steps once too often, would do so with it."""
    model = make_model("gmlp")
    cache = SMLPCache(model.config)
    model.generate(make_ids(1, 3), cache=cache, max_new_tokens=2)
    assert cache._is_user_defined


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_follows_its_own_configuration(use_cache: bool):
    model = make_model("gmlp")
    model.config.use_cache = not use_cache
    model.generation_config.use_cache = use_cache
    output = model.generate(make_ids(1, 3), max_new_tokens=2, return_dict_in_generate=True)
    assert (output.cache is not None) == use_cache


@pytest.mark.parametrize("width", [SHORT_ROW, SHORT_ROW + 1])
@pytest.mark.parametrize("has_bias", [True, False])
def test_one_row_is_multiplied_like_any_other(width: int, has_bias: bool):
    """Values and gradients, on either side of the width at which the method changes."""
    inputs = [torch.randn(7, width), *([torch.randn(7)] if has_bias else [])]
    inputs = [tensor.requires_grad_() for tensor in (torch.randn(1, 1, width), *inputs)]
    ours, plain = linear(*inputs), torch.nn.functional.linear(*inputs)
    assert ours.shape == plain.shape == (1, 1, 7)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(plain)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(plain, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_token_is_forgotten():
    """Assisted generation drops a draft model's tokens, so transformers refuses it."""
    model, ids = make_model("gmlp"), make_ids(1, 12)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="forget no token"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="a cache that can be cropped"):
        model.generate(ids, assistant_model=make_model("gmlp"), max_new_tokens=3)
