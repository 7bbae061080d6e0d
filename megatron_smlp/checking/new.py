"""`smlp-new mixer NAME`, `smlp-new router NAME`: write a starter plugin, which trains as it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_smlp.command_line import Parser
from megatron_smlp.errors import UsageError

MIXER = '''"""What it computes: a formula.

y_t = mean over s <= t of v_s,    v = x W_v;    out = y W
"""

from torch import Tensor

from megatron_smlp.plugins import TokenMixer, ones, option, register


@register("NAME")
class CLASS(TokenMixer):
    inner = {"value": 1}
    memory: float = option(1.0, "weight of the past", smallest=0.0)

    def build(self, width: int, length: int) -> None:
        self.scale = self.parameter(width, cut=0, init=ones)

    def forward(self, value: Tensor) -> Tensor:
        count = value.new_ones(value.shape[1]).cumsum(0)[:, None]
        return self.scale() * self.memory * value.cumsum(1) / count


register.architecture("NAME", mixer="NAME")
'''
ROUTER = '''"""The rule: a formula.

e = argmax s,    y = sigmoid(s_e) f_e(h)
"""

from torch import Tensor

from megatron_smlp.plugins import TokenRouter, register


@register("NAME")
class CLASS(TokenRouter):
    def choose(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=-1, keepdim=True)

    def weigh(self, scores: Tensor, chosen: Tensor) -> Tensor:
        return scores.gather(1, chosen).sigmoid()
'''
TEXTS = {"mixer": MIXER, "router": ROUTER}
TRAINED = {
    "mixer": "--config configs/cpu/transformer.yaml --architecture {name}",
    "router": "--config configs/cpu/transformer.yaml --token-router {name} --num-experts 8",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = Parser(prog="smlp-new", description="Write a starter file for a plugin.")
    parser.add_argument("kind", choices=tuple(TEXTS))
    parser.add_argument("name", metavar="NAME", help="name to register; the file is NAME.py")
    return parser


def main() -> None:
    """Write the file to the current folder, and print what comes next.

    Raises:
        UsageError: the name is not an identifier, or the file exists.
    """
    options = build_parser().parse_args()
    path = Path(f"{options.name}.py")
    if not options.name.isidentifier():
        raise UsageError(f"{options.name!r} is not a valid name: use letters, digits and _.")
    if path.exists():
        raise UsageError(f"{path} already exists: give another name, or remove it.")
    title = options.name.title().replace("_", "")
    text = TEXTS[options.kind].replace("NAME", options.name).replace("CLASS", title)
    path.write_text(text, encoding="utf-8")
    flags = TRAINED[options.kind].format(name=options.name)
    print(
        f"{path}: written. Next:\n  smlp-check {path}\n  smlp-pretrain --plugin {path} {flags} ..."
    )
