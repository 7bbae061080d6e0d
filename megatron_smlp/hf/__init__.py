"""The models of the paper for transformers; both files are exported with the weights.

Once this package is imported, transformers' Auto classes use the classes here, and run no code from
a model's folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_smlp.hf.configuration_smlp import SMLPConfig
from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM, SMLPModel

AutoConfig.register(SMLPConfig.model_type, SMLPConfig, exist_ok=True)
AutoModel.register(SMLPConfig, SMLPModel, exist_ok=True)
AutoModelForCausalLM.register(SMLPConfig, SMLPForCausalLM, exist_ok=True)

__all__ = ["SMLPConfig", "SMLPForCausalLM", "SMLPModel"]
