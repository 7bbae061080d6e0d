"""Shapes of the pictures: SVG text that is legible on a light and on a dark page."""

STYLE = """text { font: 13px sans-serif; fill: #1f2328; dominant-baseline: central }
  .small { font-size: 11px } .middle { text-anchor: middle } .end { text-anchor: end }
  .page { fill: #ffffff } .line { stroke: #57606a; stroke-width: 1.5; fill: none }
  .box { fill: #f6f8fa; stroke: #57606a }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .page { fill: #131416 }
  .line { stroke: #8b949e } .box { fill: #21262d; stroke: #8b949e } }"""
COLOURS = {
    "attention": "#4c78a8",
    "spatial_gating": "#54a24b",
    "gating_and_attention": "#2a9d8f",
    "feature_moe": "#e45756",
    "mlp": "#9d9da1",
    "token_moe": "#f58518",
}
EXPERTS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#eeca3b", "#9d755d")


def text(x: float, y: float, label: str, kind: str = "") -> str:
    """Return a label with its middle line at y; kind: small, middle, end."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{label}</text>'


def box(x: float, y: float, width: float, height: float, colour: str = "", label: str = "") -> str:
    """Return a rounded box, tinted if it has a colour."""
    look = f'fill="{colour}" fill-opacity="0.3" stroke="{colour}"' if colour else 'class="box"'
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"'
    shown = text(x + width / 2, y + height / 2, label, "small middle") if label else ""
    return f"<rect {shape} {look}/>{shown}"


def bar(x: float, y: float, width: float, height: float, colour: str) -> str:
    """Return a filled box."""
    shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2"'
    return f'<rect {shape} fill="{colour}"/>'


def line(x: float, y: float, to_x: float, to_y: float) -> str:
    """Return a curve that leaves and arrives horizontally."""
    middle = (x + to_x) / 2
    path = f"M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {to_y:g} {to_x:g} {to_y:g}"
    return f'<path class="line" d="{path}"/>'


def document(width: float, height: float, label: str, body: list[str]) -> str:
    """Return a whole picture, with a label that says what it shows."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    page = f'<rect class="page" width="{width:g}" height="{height:g}" rx="6"/>'
    return "\n".join((head, f"<style>{STYLE}</style>", page, *body, "</svg>\n"))
