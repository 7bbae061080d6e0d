"""smlp-check: each row that needs no training fails for the fault that it is meant to find."""

import textwrap
from pathlib import Path

import pytest
from support.launches import REPOSITORY

from megatron_smlp import plugin_files, plugins
from megatron_smlp.checking import cli
from megatron_smlp.checking.runs import Runs
from megatron_smlp.errors import UsageError

GOOD = (REPOSITORY / "plugins" / "gated_conv.py").read_text(encoding="utf-8")
RULE = (REPOSITORY / "plugins" / "threshold.py").read_text(encoding="utf-8")
FEATURES = (REPOSITORY / "plugins" / "last_tokens.py").read_text(encoding="utf-8")
TWO = """
from megatron_smlp.plugins import TokenRouter, register

@register("two")
class Two(TokenRouter):
    experts_per_token = 2
    def choose(self, scores):
        return scores.topk(2).indices
"""
LISTENER = """
from megatron_smlp.plugins import register
from megatron_smlp.training.events import Listener

@register.listener
class Watch(Listener): ...
"""
ALONE = "if not self.training:\n            return experts, scores > self.bound\n        "


HEADS = """
from megatron_smlp.plugins import TokenMixer, normal, option, register

@register("linear_attention")
class LinearAttention(TokenMixer):
    inner = {"query": 1, "key": 1, "value": 1}
    head_dim: int = option(64, "features of a head", smallest=1)
    def build(self, width, length):
        self.scale = self.parameter(width // self.head_dim, cut=0, init=normal(1.0))
    def forward(self, *inner):
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in inner)
        mixed = (query @ key.mT).tril() @ value * self.scale()[:, None, None]
        return mixed.transpose(1, 2).flatten(2)

register.architecture("linear_attention", mixer="linear_attention")
"""
DROPPING = """
import torch
from torch.nn.functional import dropout
from megatron_smlp.plugins import TokenMixer, register

@register("dropping")
class Dropping(TokenMixer):
    inner = {"gate": 1, "value": 1}
    def forward(self, gate, value):
        sums = gate.sigmoid().cumsum(1, dtype=torch.float32)
        return dropout((sums * value).to(value.dtype), 0.1, self.training)
"""
LONG = """
import torch
from megatron_smlp.plugins import TokenMixer, normal, register

@register("long_conv")
class LongConv(TokenMixer):
    def build(self, width, length):
        self.kernel = self.parameter(length, width, cut=1, init=normal(1.0))
    def forward(self, value):
        count = value.shape[1]
        parts = (value.float(), self.kernel()[:count].float())
        left, right = (torch.fft.rfft(part, n=2 * count, dim=-2) for part in parts)
        mixed = torch.fft.irfft(left * right, n=2 * count, dim=1)[:, :count]
        return mixed.to(value.dtype)
"""


def advice(registry: plugins.Registry, tmp_path: Path, text: str) -> str:
    """Return the first advice for a file with this text; empty if all rows pass."""
    path = tmp_path / "tried.py"
    path.write_text(text, encoding="utf-8")
    plugin_files.load(str(path))
    checks = list(cli.of_classes({}))
    assert checks
    return next((row.advice for check in checks if not (row := check()).passed), "")


@pytest.mark.parametrize(
    "text",
    [GOOD, RULE, TWO, FEATURES, LONG, DROPPING],
    ids=["mixer", "router", "two", "features", "fft", "dropout"],
)
def test_what_is_right_passes(registry: plugins.Registry, tmp_path: Path, text: str):
    """Neither does fp32 by a keyword round in fp64, nor does dropout draw where two passes are
    compared."""
    assert not advice(registry, tmp_path, text)


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        pytest.param("normal(0.5)", "lambda values: values * 0 + 1", "leaves values unset",
                     id="init in vain"),
        pytest.param("normal(0.5)", "lambda values: values.fill_(width)", "from `width`",
                     id="init by rank"),
        pytest.param("        self.kernel =", "        self.more = self.parameter(2, cut=None, "
                     "init=normal(1.0))\n        self.kernel =", "does not read more", id="unread"),
        pytest.param("gate.sigmoid() * mixed", "mixed", "does not read gate", id="unread input"),
        pytest.param("before, 0))", "before - 1, 1))", "reads a later", id="leak"),
        pytest.param("range(self.taps))\n", "range(self.taps)) - value.mean(0)\n",
                     "other samples", id="mean over B"),
        pytest.param("cut=0", "cut=None", "cut is wrong", id="not split"),
        pytest.param("return gate.sigmoid()", "gate = gate.softmax(-1)\n        return gate",
                     "needs whole", id="over features"),
        pytest.param("        return gate", "        self.last = mixed = mixed + getattr(self, "
                     "'last', mixed).detach()\n        return gate", "earlier call", id="state"),
        pytest.param("gate.sigmoid()", "gate.sigmoid().detach()", "gradient", id="gradient"),
        pytest.param("gate.sigmoid() * mixed\n", "(gate.sigmoid() * mixed)[:, 1:]\n",
                     "forward returns", id="shape"),
        pytest.param("gate.sigmoid() * mixed\n", "gate.log() * mixed\n", "NaN", id="not finite"),
        pytest.param("return gate", "return gate.missing", "it raises", id="raises"),
        pytest.param("return gate", "value.sin_()\n        return gate", "RuntimeError: a leaf",
                     id="in place"),
        pytest.param("return gate.sigmoid() *", "return (gate * 300 + 1e4 - 1e4).sin() *",
                     "bf16", id="bf16"),
        pytest.param("late = cat", "value = value * length\n        late = cat",
                     "short sequence", id="by its length"),
        pytest.param("late[:, length:]\n", "late[:, : self.taps - 1]\n", "with a state",
                     id="another state"),
        pytest.param("late[:, length:]\n", "late[:, length:].transpose(0, 1)\n", "axis 0",
                     id="batch of a state"),
        pytest.param("late[:, length:]\n", "1\n", "keep tensors", id="number in a state"),
        pytest.param("late[:, length:]\n", "late[:, max(0, length - 9) :]\n", "grows with",
                     id="size of a state"),
    ],
)  # fmt: skip
def test_a_mixer_that_is_wrong(
    registry: plugins.Registry, tmp_path: Path, right: str, wrong: str, said: str
):
    assert right in GOOD
    assert said in advice(registry, tmp_path, GOOD.replace(right, wrong, 1))


def test_an_axis_of_a_state_that_is_as_long_as_the_batch(
    registry: plugins.Registry, tmp_path: Path
):
    text = GOOD.replace("option(4,", "option(3,")
    text = text.replace("late[:, length:]", "late[:, length:].transpose(0, 1)")
    text = text.replace('[state["late"], ', '[state["late"].transpose(0, 1), ')
    assert "axis 0 must be the batch" in advice(registry, tmp_path, text)


def test_heads_are_checked_at_a_width_that_fits(
    registry: plugins.Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "heads.py"
    path.write_text(HEADS, encoding="utf-8")
    assert cli.main([str(path), "--quick"]) == 1
    assert (
        "8 features and up to 12 tokens: if that is why, set --head-dim" in capsys.readouterr().out
    )
    assert cli.main([str(path), "--quick", "--head-dim", "2"]) == 0
    assert list(cli._flags("linear_attention", {"head_dim": 2})) == ["--head-dim=2"]
    assert not list(cli._flags("linear_attention", {"head_dim": 64}))
    with pytest.raises(UsageError, match="--heads"):
        cli.main([str(path), "--heads", "2"])


@pytest.mark.parametrize("made", ["nn.Linear(width, 2)", "nn.Parameter(zeros(2))"])
def test_parameters_of_torchs_own(registry: plugins.Registry, tmp_path: Path, made: str):
    text = GOOD.replace("self.kernel =", f"self.more = {made}\n        self.kernel =")
    text = text.replace("from torch import", "from torch import nn, zeros,")
    assert advice(registry, tmp_path, text).endswith("which initializes and shards it.")


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        (GOOD, "self.kernel =", "self.stray = Tensor(3)\n        self.kernel ="),
        (RULE, 'self.register_buffer("bound", torch.zeros(self.num_experts))',
         "self.stray = self.bound = torch.zeros(self.num_experts)"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_no_buffer(
    registry: plugins.Registry, tmp_path: Path, text: str, right: str, wrong: str
):
    assert right in text
    said = advice(registry, tmp_path, text.replace(right, wrong))
    assert "use self.register_buffer('stray'" in said


def test_a_complex_buffer(registry: plugins.Registry, tmp_path: Path):
    text = GOOD.replace("self.kernel =", 'self.register_buffer("turns", zeros(2) * 1j)\n'
                        "        self.kernel =")  # fmt: skip
    text = text.replace("from torch import", "from torch import zeros,")
    assert "GatedConv.turns is a complex buffer" in advice(registry, tmp_path, text)


@pytest.mark.parametrize("share", [1, 10])
def test_a_cost_is_counted_again(registry: plugins.Registry, tmp_path: Path, share: int):
    text = textwrap.dedent(f"""
        import torch
        from megatron_smlp.plugins import TokenMixer, register

        @register("mean")
        class Mean(TokenMixer):
            def forward(self, value):
                return torch.tril(value.new_ones(value.shape[1], value.shape[1])) @ value

            @classmethod
            def cost(cls, *, features, length, values):
                full = 2 * length * length * features // {share}
                return full // 2, full
    """)
    said = advice(registry, tmp_path, text)
    assert ("disagrees with the FLOPs" in said) == (share == 10)


@pytest.mark.parametrize(
    ("rule", "right", "wrong", "said"),
    [
        pytest.param(RULE, ALONE, "", "depend on the rest", id="sees the batch"),
        pytest.param(TWO, "    def choose", "    def scores(self, hidden, weight):\n        return "
                     "super().scores(hidden - hidden.mean(0), weight)\n    def choose",
                     "depend on the rest", id="scores see the batch"),
        pytest.param(RULE, "may_skip = True", "may_skip = False", "may_skip", id="skips"),
        pytest.param(RULE, "torch.arange(self", "1 + torch.arange(self", "expert 4 of 4",
                     id="no expert"),
        pytest.param(RULE, "torch.arange(self", "-1 + torch.arange(self", "expert -1 of 4",
                     id="below 0"),
        pytest.param(RULE, "/ self.count", "/ self.counts", "no attribute 'counts'", id="update"),
        pytest.param(TWO, "    def choose", "    def loss(self, scores, chosen):\n        return "
                     "scores.mean(0)\n    def choose", "give a finite number", id="loss"),
        pytest.param(TWO, "    def choose", "    def loss(self, scores, chosen):\n        return "
                     "scores.detach().mean()\n    def choose", "with gradient",
                     id="loss without gradient"),
        pytest.param(RULE, "gather(1, chosen)", "gather(1, chosen)[:, :1]", "weigh returns",
                     id="shape"),
        pytest.param(TWO, "per_token = 2", "per_token = 1", "set experts_per_token = 2",
                     id="count"),
    ],
)  # fmt: skip
def test_a_router_that_is_wrong(
    registry: plugins.Registry, tmp_path: Path, rule: str, right: str, wrong: str, said: str
):
    assert right in rule
    assert said in advice(registry, tmp_path, rule.replace(right, wrong, 1))


def test_a_failed_runs_error_is_that_of_the_rank_that_failed(tmp_path: Path):
    lines = [
        "[rank0]: ValueError: no such thing",
        "[rank1]: RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1",
    ]
    run = Runs("mine", plugins=[], model=[], folder=tmp_path)
    for given, said in ((lines, lines[0]), (lines[1:], lines[1])):
        assert run._command(["-c", f"raise SystemExit({chr(10).join(given)!r})"]) == said


def test_a_file_without_a_part_of_a_model_has_nothing_to_check(
    registry: plugins.Registry, tmp_path: Path
):
    path = tmp_path / "watch.py"
    path.write_text(LISTENER, encoding="utf-8")
    with pytest.raises(UsageError, match=r"watch\.py registers no mixer, .* nothing to check"):
        cli.main([str(path), "--quick"])


def test_a_channel_mixer_alone_is_told_how_it_can_be_trained(
    registry: plugins.Registry, tmp_path: Path
):
    path = tmp_path / "squares.py"
    path.write_text(
        "from megatron_smlp.plugins import ChannelMixer, register\n@register('squares')\n"
        "class Squares(ChannelMixer):\n"
        "    def forward(self, value):\n        return value * value\n"
    )
    with pytest.raises(UsageError, match='mixer="attention", channel="squares"'):
        cli.main([str(path)])


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        pytest.param("average[..., None] * slope", "average[..., None].mean(0) * slope",
                     "scores returns", id="shape"),
        pytest.param("return average", "average = average - average.mean(1, keepdim=True)\n"
                     "        return average", "other samples or chunks", id="sees the chunks"),
        pytest.param("slope + start", "slope.detach() + start.detach()", "weigh", id="gradient"),
        pytest.param("count - 1, -1, -1", "count, -1, -1", "it raises", id="raises"),
    ],
)  # fmt: skip
def test_a_feature_router_that_is_wrong(
    registry: plugins.Registry, tmp_path: Path, right: str, wrong: str, said: str
):
    assert right in FEATURES
    assert said in advice(registry, tmp_path, FEATURES.replace(right, wrong, 1))
