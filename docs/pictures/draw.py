"""Draw docs/pictures/layers.svg: the two slots of every layer of the presets, from the tables.

    python docs/pictures/draw.py

tests/unit/test_pictures.py fails where the picture is not what the tables say.
"""

from pathlib import Path

from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.accounting.estimate import resolve
from megatron_smlp.flags.yaml_file import read_yaml, spelling

ROOT = Path(__file__).parents[2]
PICTURE = Path(__file__).with_name("layers.svg")
SYSTEMS = {
    "transformer": "Transformer",
    "llama": "Transformer, Llama's parts",
    "switch": "Switch, GShard, BASE, HASH",
    "gmlp": "gMLP",
    "amlp": "aMLP",
    "smlp_deterministic": "sMLP, deterministic",
    "smlp_partial": "sMLP, partial prediction",
}
MIXERS = {
    "attention": ("self-attention", "#4c78a8"),
    "spatial_gating": ("spatial gating", "#54a24b"),
    "gating_and_attention": ("spatial gating and a small head", "#2a7f8e"),
    "feature_moe": ("experts of features", "#e45756"),
    "mlp": ("FFN", "#9d9da1"),
    "token_moe": ("experts of tokens", "#f58518"),
}
STYLE = """text { font: 14px sans-serif; fill: #1f2328 } .small { font-size: 12px }
  .line { stroke: #57606a; stroke-width: 1.5; fill: none }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .line { stroke: #8b949e } }"""
LEFT, CELL, ROW, TOP = 250, 46, 34, 54


def rows() -> dict[str, list[tuple[str, str]]]:
    """Return token mixer and channel mixer of each layer of each preset."""
    drawn = {}
    for name, title in SYSTEMS.items():
        keys = read_yaml(ROOT / "configs" / "cpu" / f"{name}.yaml")
        flags = {spelling(key): value for key, value in keys.items()}
        shape = ModelShape.from_args(resolve(flags | {"vocab_size": 4096}))
        drawn[title] = [(slots.mixer, slots.channel) for slots in shape.slots]
    return drawn


def picture() -> str:
    """Return the SVG: a row a system, in it a pair of cells a layer."""
    body, used = [], dict.fromkeys(MIXERS, False)
    table = rows()
    for number, (title, layers) in enumerate(table.items()):
        top = TOP + number * ROW
        body.append(f'<text x="{LEFT - 14}" y="{top + 18}" text-anchor="end">{title}</text>')
        for index, pair in enumerate(layers):
            for half, name in enumerate(pair):
                left = LEFT + index * CELL + half * 20
                used |= {name: True} if name in used else {}
                shape = f'x="{left}" y="{top}" width="19" height="26" rx="3"'
                fill = f'fill="{MIXERS[name][1]}"' if name in MIXERS else 'class="line"'
                body.append(f"<rect {shape} {fill}/>")
    most = max(map(len, table.values()))
    bottom = TOP + len(table) * ROW
    width = LEFT + most * CELL + 10
    legend = [name for name, is_used in used.items() if is_used]
    for place, name in enumerate(legend):
        left, top = 20 + (place % 3) * (width - 20) // 3, bottom + 14 + (place // 3) * 24
        title, colour = MIXERS[name]
        body.append(f'<rect x="{left}" y="{top}" width="14" height="14" rx="3" fill="{colour}"/>')
        body.append(f'<text class="small" x="{left + 20}" y="{top + 12}">{title}</text>')
    height = bottom + 14 + (len(legend) + 2) // 3 * 24 + 6
    head = (
        '<text x="20" y="24">A layer is two slots: a token mixer, then a channel mixer</text>',
        f'<text class="small" x="{LEFT}" y="{TOP - 8}">layers of the presets, first to last</text>',
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" '
            'aria-label="Token mixer and channel mixer of each layer of each system">',
            f"<style>{STYLE}</style>",
            *head,
            *body,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
