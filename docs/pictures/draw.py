"""Draw the pictures of docs/ from the tables and presets.

    python docs/pictures/draw.py

tests/unit/test_pages.py fails if one does not match the tables.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

from flows import channel_flow, drawn, mixer_flow, plugin_flow, width_of
from svg import COLOURS, EXPERTS, bar, box, document, text

from megatron_smlp import plugin_files
from megatron_smlp.accounting.costs import Cost, ModelShape, layer_cost
from megatron_smlp.accounting.estimate import resolve
from megatron_smlp.accounting.ranks import ParallelLayout, parameters_on_rank, stage_slots
from megatron_smlp.flags.yaml_file import read_yaml, spelling
from megatron_smlp.plugins import register
from megatron_smlp.systems import LayerSlots

FOLDER = Path(__file__).parent
CONFIGS = FOLDER.parents[1] / "configs"
SYSTEMS = {
    "transformer": "Transformer",
    "llama": "Transformer, Llama's parts",
    "switch": "Switch",
    "gshard": "GShard",
    "base": "BASE",
    "hash": "HASH",
    "gmlp": "gMLP",
    "amlp": "aMLP",
    "smlp_deterministic": "sMLP, deterministic",
    "smlp_partial": "sMLP, partial prediction",
}
ALIKE = {"gshard": "switch", "base": "switch", "hash": "switch"}
"""Presets whose layers have the slots of another's."""
NAMES = {
    "attention": "self-attention",
    "spatial_gating": "spatial gating",
    "gating_and_attention": "gating and a small head",
    "feature_moe": "feature MoE",
    "mlp": "FFN",
    "token_moe": "token MoE",
    "none": "nothing",
}


def shape_of(preset: str, vocabulary: int = 4096) -> ModelShape:
    """Return the sizes of a preset, such as `cpu/gmlp`."""
    keys = read_yaml(CONFIGS / f"{preset}.yaml")
    flags = {spelling(key): value for key, value in keys.items()}
    return ModelShape.from_args(resolve(flags | {"vocab_size": vocabulary}))


def layers() -> str:
    """Draw one row per system, with a pair of cells per layer."""
    left, cell, row, top = 250, 46, 34, 54
    shapes = {name: shape_of(f"cpu/{name}") for name in SYSTEMS if name not in ALIKE}
    body = [
        text(20, 20, "A layer is two slots: a token mixer, then a channel mixer"),
        text(left, top - 14, "layers of the presets, first to last", "small"),
    ]
    for number, (name, shape) in enumerate(shapes.items()):
        y = top + number * row
        others = [SYSTEMS[other] for other, shown in ALIKE.items() if shown == name]
        title = ", ".join([SYSTEMS[name], *others])
        body.append(text(left - 14, y + 13, title, "end"))
        for index, slots in enumerate(shape.slots):
            for half, filled in enumerate((slots.mixer, slots.channel)):
                x = left + index * cell + half * 20
                colour = COLOURS.get(filled)
                body.append(bar(x, y, 19, 26, colour) if colour else box(x, y, 19, 26))
    width = left + max(len(shape.slots) for shape in shapes.values()) * cell + 10
    bottom = top + len(shapes) * row
    body += legend(width, bottom)
    return document(width, bottom + 56, "Both slots of each layer of each system", body)


def legend(width: int, top: int) -> list[str]:
    """Draw what the colours mean, in two rows."""
    body = []
    for place, (name, colour) in enumerate(COLOURS.items()):
        x, y = 20 + place % 3 * (width - 20) // 3, top + 6 + place // 3 * 24
        body += [bar(x, y, 14, 14, colour), text(x + 20, y + 7, NAMES[name], "small")]
    return body


def system(name: str) -> str:
    """Draw what is in both slots of each kind of layer of a system."""
    shape = shape_of(f"cpu/{name}")
    kinds: dict[LayerSlots, list[int]] = {}
    for number, slots in enumerate(shape.slots, 1):
        kinds.setdefault(slots, []).append(number)
    body, y, width = [], 12, 0
    for slots, numbers in kinds.items():
        body.append(text(16, y + 8, f"Layers {ranges(numbers)}"))
        y += 26
        for flow in (mixer_flow(shape, slots), channel_flow(shape, slots)):
            if flow.columns:
                shapes, height = drawn(flow, 16, y)
                body += shapes
                width = max(width, width_of(flow))
                y += height + 12
    label = f"{SYSTEMS[name]}: what is in the slots of its layers"
    return document(width + 32, y + 4, label, body)


def ranges(numbers: list[int]) -> str:
    """Return `1-3, 5`."""
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def chunks() -> str:
    """Draw which spatial expert mixes which chunk of features, for both ways to route."""
    experts = shape_of("cpu/smlp_partial").options.num_feature_experts
    fraction = shape_of("cpu/smlp_partial").options.prefix_fraction
    chosen = [(3 * chunk * chunk + chunk + 2) % experts for chunk in range(experts)]
    cell, top, height = 30, 78, 170
    body = [text(16, 18, "A chunk of the features goes to a spatial expert M, a T x T matrix")]
    halves = (
        ("deterministic: chunk i to expert i", 1.0),
        ("partial prediction, an example", fraction),
    )
    for half, (title, prefix) in enumerate(halves):
        left = 74 + half * (experts * cell + 84)
        body.append(text(left, top - 32, title))
        body.append(text(left, top - 13, f"{experts} chunks of the features", "small"))
        for chunk in range(experts):
            parts = [(chunk, top, height * prefix)]
            if prefix < 1:
                parts.append((chosen[chunk], top + height * prefix, height * (1 - prefix)))
            for expert, y, tall in parts:
                label, colour = f"M{expert + 1}", EXPERTS[expert % len(EXPERTS)]
                body.append(box(left + chunk * cell, y, cell - 2, tall - 2, colour, label))
        if prefix == 1:
            body.append(text(left - 8, top + height / 2, "T tokens", "small end"))
        else:
            body.append(text(left - 8, top + height * prefix / 2, "prefix", "small end"))
            body.append(text(left - 8, top + height * (1 + prefix) / 2, "suffix", "small end"))
            note = f"the first {fraction:.0%} choose the experts of the rest"
            body.append(text(left, top + height + 14, note, "small"))
    width = 74 + 2 * experts * cell + 84 + 16
    return document(width, top + height + 30, "Spatial experts of chunks of features", body)


LAYOUTS = {
    "tensor parallel, TP 2": {"tensor": 2, "expert_tensor": 2},
    "expert parallel, EP 2": {"expert": 2, "data": 2},
    "pipeline parallel, PP 2": {"pipeline": 2},
}
PRESET = "paper/regular/smlp_deterministic"


STEP, TALL = 15, 30


def ranks() -> str:
    """Draw how much of each slot of each layer a rank holds, under the ways to split a model."""
    shape = shape_of(PRESET, 50257)
    left, y = 80, 60
    body = [text(16, 18, f"What of configs/{PRESET}.yaml each of two ranks holds")]
    body.append(text(left, y - 18, f"{len(shape.slots)} layers, each of two slots", "small"))
    for title, sizes in LAYOUTS.items():
        body.append(text(16, y + 8, title))
        y += 22
        for rank in range(2):
            shapes, share = of_rank(shape, ParallelLayout(**sizes), rank, left, y)
            body += [text(left - 10, y + TALL / 2, f"rank {rank}", "small end"), *shapes]
            end = left + len(shape.slots) * STEP + 8
            body.append(text(end, y + TALL / 2, f"{share:.0%} of the layers", "small"))
            y += TALL + 8
        y += 8
    width = left + len(shape.slots) * STEP + 110
    return document(
        width, y + 52, "What each rank holds under TP, EP and PP", body + legend(width, y - 4)
    )


def of_rank(
    shape: ModelShape, layout: ParallelLayout, rank: int, left: int, top: int
) -> tuple[list[str], float]:
    """Draw every slot, filled to the share that a rank holds; return its share of the total."""
    body, held, total = [], 0, 0
    stages = range(layout.pipeline)
    layers = [(stage, slots) for stage in stages for slots in stage_slots(shape, layout, stage)]
    for place, (stage, slots) in enumerate(layers):
        is_here = layout.pipeline == 1 or stage == rank
        for half, (name, cost) in enumerate(halves_of(shape, slots)):
            share = sum(parameters_on_rank(cost, layout)) * is_here
            held, total = held + share, total + cost.parameters
            x, filled = left + place * STEP + half * 7, TALL * share / cost.parameters
            body.append(f'<rect class="box" x="{x}" y="{top}" width="6" height="{TALL}"/>')
            if share:
                body.append(bar(x, top + TALL - filled, 6, filled, COLOURS[name]))
    return body, held / total


def halves_of(shape: ModelShape, slots: LayerSlots) -> list[tuple[str, Cost]]:
    """Return the fillings of a layer's slots that have parameters, with what they cost."""
    alone = layer_cost(shape, replace(slots, channel="none"))
    both = layer_cost(shape, slots)
    channel = Cost(
        sharded=both.sharded - alone.sharded,
        replicated=both.replicated - alone.replicated,
        experts=both.experts - alone.experts,
    )
    return [(slots.mixer, alone)] + [(slots.channel, channel)] * bool(channel.parameters)


def plugin(name: str) -> str:
    """Draw what surrounds the class of a file of plugins/."""
    take_back = plugin_files.snapshot()
    plugin_files.load(str(FOLDER.parents[1] / "plugins" / f"{name}.py"))
    flow = plugin_flow({**register.token_mixers, **register.token_routers}[name])
    take_back()
    body, height = drawn(flow, 20, 20)
    return document(width_of(flow) + 40, height + 30, flow.title, body)


def pictures() -> dict[str, str]:
    """Return every picture, by file name."""
    drawings = {"layers": layers(), "chunks": chunks(), "ranks": ranks()}
    drawings |= {name: system(name) for name in SYSTEMS}
    drawings |= {name: plugin(name) for name in ("gated_conv", "threshold")}
    return {f"{name}.svg": it for name, it in drawings.items()}


if __name__ == "__main__":
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")
