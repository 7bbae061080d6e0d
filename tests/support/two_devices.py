"""The Hugging Face model over two GPUs, with fake tensors: no values, but a device."""

from __future__ import annotations

import torch
from accelerate import hooks
from support.smlp_systems import make_config
from torch import nn
from torch._subclasses import FakeTensorMode

from megatron_smlp.hf.modeling_smlp import SMLPForCausalLM, _add

SYSTEMS = ("transformer", "gmlp", "gmlp_toeplitz", "amlp", "mixer")


def on_two_devices(model: SMLPForCausalLM) -> None:
    """Place it as device_map="auto": layers from the second on and the final norm on cuda:1."""
    second = [*model.model.layers[1:], model.model.final_norm]
    for owner in (owner for module in second for owner in module.modules()):
        for name, weight in owner.named_parameters(recurse=False):
            setattr(owner, name, nn.Parameter(weight.to("cuda:1")))
    for module in [*model.model.children(), *model.model.layers, model.lm_head]:
        if module is not model.model.layers:
            device = "cuda:1" if module in second else "cuda:0"
            hook = hooks.AlignDevicesHook(execution_device=device)
            hook.init_hook = lambda module: module  # which would place the weights
            hooks.add_hook_to_module(module, hook)
    whole = hooks.AlignDevicesHook(execution_device="cuda:0", io_same_device=True)
    hooks.add_hook_to_module(model, whole)


def check(system: str) -> None:
    """Compute, cache and train: an operation across both devices raises an error."""
    with FakeTensorMode(), torch.device("cuda:0"):
        model = SMLPForCausalLM(make_config(system))
        on_two_devices(model)
        ids = torch.zeros(4, 8, dtype=torch.int64)
        output = model(ids, labels=ids, use_cache=True)
        assert output.loss.device == output.logits.device == torch.device("cuda:0")
        output.cache.lengths = torch.full((4,), 8)  # as for prompts of unlike lengths
        output.cache.reorder_cache(torch.zeros(4, dtype=torch.int64))
        output.cache.lengths = None
        assert model(ids[:, :1], cache=output.cache).logits.device == torch.device("cuda:0")
        losses = [torch.zeros((), device=f"cuda:{number}") for number in range(2)]
        assert _add(*losses).device == torch.device("cuda:0")  # the balance losses of layers


if __name__ == "__main__":
    for name in SYSTEMS:
        check(name)
