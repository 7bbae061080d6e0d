"""The models of the paper for transformers; both files are exported with the weights."""

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM, SMLPModel

__all__ = ["SMLPConfig", "SMLPForCausalLM", "SMLPModel"]
