"""What happens in a slot, as columns of boxes from left to right."""

from __future__ import annotations

from dataclasses import dataclass, field

from svg import COLOURS, box, line, text

from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.plugins import TokenRouter, projections_of
from megatron_smlp.systems import LayerSlots

BOX, GAP, TALL, STEP = 84, 24, 24, 32
PASS, DOTS = "", "..."


@dataclass(frozen=True)
class Flow:
    """Columns of labels; PASS is a line through a column, DOTS stand for what is left out."""

    title: str
    colour: str
    columns: list[list[str]] = field(default_factory=list)
    lines: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    """By column: which of its rows leads to which row of the next; a column left out connects each
    row to its own, or all to all."""


def mixer_flow(shape: ModelShape, slots: LayerSlots) -> Flow:
    """Return the flow of a layer's token mixer."""
    if slots.mixer == "attention":
        heads = f"{slots.heads} heads"
        columns = [["x W"], ["q", "k", "v"], ["softmax(q k') v"], ["W"]]
        return Flow(f"token mixer: self-attention, {heads}", COLOURS[slots.mixer], columns)
    inputs, gate, mixed, lines = ["GELU(x U)"], ["v = LN(u2)"], ["g = M v + b"], {}
    title = "spatial gating"
    if slots.mixer == "gating_and_attention":
        gate, mixed = [*gate, "q, k, v"], [*mixed, "a = attention"]
        title = "spatial gating and one small attention head"
        inputs, lines = [*inputs, "x W_qkv"], {0: [(0, 0), (0, 1), (1, 2)]}
    elif slots.mixer == "feature_moe":
        last = slots.heads
        gate = ["chunk 1", "chunk 2", "chunk 3", DOTS, f"chunk {last}"]
        mixed = ["M1", "M2", "M3", DOTS, f"M{last}"]
        title = "feature MoE, chunk i to expert i"
        if shape.options.feature_router == "partial":
            title = "feature MoE, experts chosen by the prefix (an example)"
            lines = {1: [(0, 0), (1, 3), (2, 1), (3, 3), (5, 5)]}
    product = "u1 * (g + a)" if "a = attention" in mixed else "u1 * g"
    columns = [inputs, ["u1", *gate], [PASS, *mixed], [product], ["V"]]
    return Flow(f"token mixer: {title}", COLOURS[slots.mixer], columns, lines)


def channel_flow(shape: ModelShape, slots: LayerSlots) -> Flow:
    """Return the flow of a layer's channel mixer, without columns if it has none."""
    if slots.channel == "none":
        return Flow("", "")
    if slots.channel == "mlp":
        columns = [["SwiGLU(x W1)" if shape.gated_mlp else "GELU(x W1)"], ["W2"]]
        return Flow("channel mixer: FFN", COLOURS["mlp"], columns)
    router, experts = shape.options.token_router, shape.num_experts
    columns = [[f"router: {router}"], ["FFN 1", "FFN 2", DOTS, f"FFN {experts}"], ["weighed sum"]]
    title = f"channel mixer: token MoE, {shape.moe_router_topk} of {experts} experts a token"
    return Flow(title, COLOURS["token_moe"], columns)


def plugin_flow(kind: type) -> Flow:
    """Return what a host does around the class of a plugin."""
    colour = COLOURS["token_moe"]
    if issubclass(kind, TokenRouter):
        columns = [["s = h W"], ["choose(s)"], ["FFN 1", "FFN 2", DOTS], ["weigh(s)"], ["sum"]]
        return Flow(f"token MoE: choose and weigh are {kind.__name__}'s", colour, columns)
    columns = [["LN"], list(projections_of(kind)), ["forward"], ["linear_out"]]
    return Flow(f"token mixer: forward is {kind.__name__}'s", colour, columns)


def width_of(flow: Flow) -> int:
    """Return the width of what `drawn` draws."""
    return max(len(flow.columns) * (BOX + GAP) + 20, 7 * len(flow.title))


def drawn(flow: Flow, left: float, top: float) -> tuple[list[str], float]:
    """Return the shapes of a flow, and its height."""
    rows = max(map(len, flow.columns))
    body = [text(left, top + 6, flow.title, "small")]
    top += 20

    def middle(column: int, row: int) -> float:
        return top + (rows - len(flow.columns[column])) * STEP / 2 + row * STEP + TALL / 2

    for number, labels in enumerate(flow.columns):
        x = left + GAP + number * (BOX + GAP)
        after = flow.columns[number + 1] if number + 1 < len(flow.columns) else None
        for row, label in enumerate(labels):
            y = middle(number, row)
            if label == DOTS:
                body.append(text(x + BOX / 2, y, DOTS, "middle"))
            elif label == PASS:
                body.append(line(x, y, x + BOX, y))
            else:
                body.append(box(x, y - TALL / 2, BOX, TALL, flow.colour, label))
        pairs = flow.lines.get(number)
        if after and pairs is None:
            alike = len(labels) == len(after)
            everything = [(a, b) for a in range(len(labels)) for b in range(len(after))]
            pairs = [(a, b) for a, b in everything if not alike or a == b]
        for a, b in pairs or ():
            if after and DOTS not in (labels[a], after[b]):
                ends = (x + BOX, middle(number, a), x + BOX + GAP, middle(number + 1, b))
                body.append(line(*ends))
    start = top + rows * STEP / 2 - (STEP - TALL) / 2
    body += [line(left, start, left + GAP, middle(0, row)) for row in range(len(flow.columns[0]))]
    end = left + len(flow.columns) * (BOX + GAP)
    body.append(line(end, middle(-1, 0), end + 20, middle(-1, 0)))
    return body, rows * STEP + 20
