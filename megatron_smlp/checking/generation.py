"""`python -m megatron_smlp.checking.generation FOLDER`: generate with and without a cache.

The folder's own code runs, as it does for users who have only torch and transformers; the check
that starts this has written it.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

PROMPT, NEW = 8, 6


def main() -> None:
    """Compare the tokens; exit with an error message if they differ."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    torch.manual_seed(1)
    prompt = torch.randint(0, 250, (2, PROMPT))
    whole, stepwise = (
        model.generate(prompt, max_new_tokens=NEW, do_sample=False, use_cache=cached)
        for cached in (False, True)
    )
    if not torch.equal(whole, stepwise):
        sys.exit("error: generation differs with and without a cache")


if __name__ == "__main__":
    main()
