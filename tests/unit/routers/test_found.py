"""Modules that are looked up once per model."""

import gc
import weakref

from torch import nn

from megatron_smlp.routers.found import found


def test_each_model_is_walked_once_and_can_be_freed():
    class Model(nn.Module):
        walks = 0

        def modules(self):
            self.walks += 1
            return super().modules()

    model = Model()
    model.inner = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    # As DDP's hooks do: a parameter of what is found refers to the model.
    model.inner[0].weight.register_hook(lambda _, whole=model: whole)
    assert found([model, model], nn.Linear) == [model.inner[0], model.inner[2]] * 2
    assert model.walks == 1
    assert found([model], nn.GELU) == [model.inner[1]]
    assert "_found" not in dict(model.state_dict())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
