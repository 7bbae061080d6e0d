"""Of transformer_engine.pytorch.ops: nothing, Megatron names them when it uses them."""
