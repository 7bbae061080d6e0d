"""The nine systems as flags of pretrain_smlp.py, small, on data that needs no file."""

EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall"
ATTENTION = "--architecture transformer --num-attention-heads 4"
SMLP = f"--architecture smlp --num-dense-layers 2 --num-feature-experts 4 {EXPERTS}"
SYSTEMS = {
    "transformer": ATTENTION,
    "gshard": f"{ATTENTION} --token-router gshard {EXPERTS}",
    "switch": f"{ATTENTION} --token-router switch {EXPERTS} --moe-train-capacity-factor 1.25",
    "base": f"{ATTENTION} --token-router base {EXPERTS}",
    "hash": f"{ATTENTION} --token-router hash {EXPERTS}",
    "gmlp": "--architecture gmlp",
    "amlp": "--architecture amlp --tiny-attention-width 16",
    "smlp_deterministic": f"{SMLP} --feature-router deterministic --token-router base",
    "smlp_partial": f"{SMLP} --feature-router partial --token-router base",
}
MODEL = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --num-layers 4 --hidden-size 64
    --ffn-hidden-size 256 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2
    --num-workers 0 --lr 1e-3 --log-interval 1 --eval-iters 0 --strict-accounting
"""
"""Flags without sequence length, batch size and number of steps."""
