"""Models of a study that were exported to models/ (or $MODELS), where there are any."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
from support.launches import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

PROSE = (
    "The old man walked slowly along the road to the village, and when he came to the church he "
    "stopped, took off his hat, and looked at the windows. There was a light in the house, but he "
    "could not see who was there. He waited for some time; then he knocked at the door."
)
PLACE = Path(os.environ.get("MODELS", REPOSITORY / "models"))
FOLDERS = sorted(path.parent for path in PLACE.glob("*/config.json"))


@pytest.mark.skipif(
    not FOLDERS, reason="no models/*/config.json: `tools/study.py export ... --save models`"
)
@pytest.mark.parametrize("folder", FOLDERS or [None], ids=lambda folder: folder and folder.name)
def test_a_released_model_reads_and_writes_english(folder: Path):
    """Its loss on plain prose is near what its card says of books, and far below a shuffle's."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer(PROSE, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        loss, at_random = (float(model(tokens, labels=tokens).loss) for tokens in (ids, shuffled))
    card = (folder / "README.md").read_text(encoding="utf-8")
    [validation] = re.findall(r"\| validation loss \| ([\d.]+)", card)
    assert loss < float(validation) + 0.5
    assert loss < at_random - 1 < math.log(model.config.vocab_size) + 2
    written = model.generate(ids[:, :8], max_new_tokens=20, do_sample=False)
    assert len(set(written[0, 8:].tolist())) > 3
    assert written[0, :8].tolist() == ids[0, :8].tolist()
