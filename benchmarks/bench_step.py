"""Time the whole training step against what a user would pick instead.

`gmlp`         pretrain_smlp.py                  the gMLP of g-mlp-pytorch in a plain torch loop
`transformer`  pretrain_smlp.py                  transformers' GPT-2 with SDPA in a plain torch loop

Our time covers everything that `megatron.training` does for a step: batch, forward, backward,
clipping, Adam, learning rate, logging. The peer has a batch ready, and a fused AdamW. Same shapes
(about 10M parameters), 2,048 tokens per step, alternating steps; bf16 is Megatron's --bf16 and, for
the peers, autocast. Tokens per second are 2,048,000 / ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hosted import run, steps_in_turns
from timing import Record, paired

TOKENS_PER_STEP = 2048
VOCABULARY, WIDTH = 4096, 384
LAYERS = {"gmlp": 8, "transformer": 5}
CASES = [f"{s} {p} T={t}" for s in LAYERS for p in ("fp32", "bf16") for t in (512, 1024)]
FLAGS = f"""
    --mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --num-workers 0
    --make-vocab-size-divisible-by 128 --hidden-size {WIDTH} --ffn-hidden-size {4 * WIDTH}
    --attention-dropout 0 --hidden-dropout 0 --lr 1e-3 --clip-grad 1 --weight-decay 0.01
    --eval-iters 0 --log-interval 10 --no-resume
"""
OURS = {
    "gmlp": "--architecture gmlp --untie-embeddings-and-output-weights",
    "transformer": f"--architecture transformer --num-attention-heads {WIDTH // 64}",
}


def peer_step(model: Any, *, length: int, precision: str) -> Callable[[], None]:
    """Return a training step of a plain torch loop on random tokens."""
    import torch
    from torch.nn import functional

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    ids = torch.randint(VOCABULARY, (TOKENS_PER_STEP // length, length + 1))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(ids[:, :-1])
            logits = getattr(output, "logits", output)
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def peer_gmlp(length: int) -> Any:
    from g_mlp_pytorch import gMLP

    sizes = {"num_tokens": VOCABULARY, "dim": WIDTH, "depth": LAYERS["gmlp"], "seq_len": length}
    return gMLP(**sizes, ff_mult=4, causal=True)


def peer_gpt2(length: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=length,
        n_embd=WIDTH,
        n_layer=LAYERS["transformer"],
        n_head=WIDTH // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).train()


PEERS: dict[str, Callable[[int], Any]] = {"gmlp": peer_gmlp, "transformer": peer_gpt2}


def flags(case: str) -> str:
    """Return the command line of our side."""
    system, precision, length = case.split()
    tokens = int(length.removeprefix("T="))
    batch = TOKENS_PER_STEP // tokens
    return f"""
        {FLAGS} {OURS[system]} --num-layers {LAYERS[system]} --seq-length {tokens}
        --micro-batch-size {batch} --global-batch-size {batch}
        {"--bf16" if precision == "bf16" else ""}
    """


def measure(case: str, repeats: int) -> Record:
    system, precision, length = case.split()
    tokens = int(length.removeprefix("T="))
    ours, theirs = steps_in_turns(
        flags(case),
        lambda _: peer_step(PEERS[system](tokens), length=tokens, precision=precision),
        repeats=repeats,
    )
    return paired(case, ours, theirs)


if __name__ == "__main__":
    run(__doc__, CASES, measure)
