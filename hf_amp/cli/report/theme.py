"""How pictures look, and how they become SVG that lives inside a page."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from hf_amp.monitoring.visible import visible

CAUSE_MARKERS = {"SCALE": "v", "ACTIVATION": "D", "INPUT": "s", "LOSS": "^", "WEIGHTS": "X", "UNKNOWN": "o"}
"""A shape beside the colour, for those who do not see colours; in the order of legends."""


@dataclass(frozen=True)
class Theme:
    """Colours by role, as `#rrggbb`.

    The colour-blind-safe hues of causes and precisions follow Okabe and Ito, "Color Universal Design" (2008).
    """

    ink: str
    muted: str
    grid: str
    surface: str
    accent: str
    second: str
    cause_scale: str
    cause_activation: str
    cause_input: str
    cause_loss: str
    cause_weights: str
    cause_unknown: str
    half: str
    brain: str
    single: str

    def cause(self, cause: str) -> str:
        """Colour of a cause; unknown ones look like UNKNOWN."""
        return str(getattr(self, f"cause_{cause.lower()}", self.cause_unknown))

    def precision(self, name: str) -> str:
        """Colour of a precision."""
        return {"FP32": self.single, "BF16": self.brain}.get(name, self.half)


LIGHT = Theme(
    ink="#1d2733", muted="#66717e", grid="#e4e7ea", surface="#ffffff", accent="#2b6f8f", second="#8a6d3b",
    cause_scale="#c98300", cause_activation="#c2410c", cause_input="#7a4fa3", cause_loss="#b5527f",
    cause_weights="#a3182a", cause_unknown="#66717e", half="#9cc5d8", brain="#a9c9a4", single="#e9c46a",
)  # fmt: skip
DARK = Theme(
    ink="#e6e9ed", muted="#97a2ae", grid="#2c343d", surface="#1a2027", accent="#6fb7d6", second="#d0b27a",
    cause_scale="#f0b23e", cause_activation="#f58a5b", cause_input="#b794e0", cause_loss="#e28fb4",
    cause_weights="#f0707f", cause_unknown="#97a2ae", half="#2f667d", brain="#416b45", single="#8f6f1c",
)  # fmt: skip

# A picture in a page is drawn in stand-in colours, which the page's style sheet then gives their meaning.
_ROLES = [role.name for role in fields(Theme)]
IN_PAGE = Theme(**{role: f"#0101{index:02x}" for index, role in enumerate(_ROLES, start=1)})


def css_variable(role: str) -> str:
    """Name of the style-sheet variable that holds the colour of a role."""
    return "--" + role.replace("_", "-")


def style_of(theme: Theme) -> Any:
    """matplotlib's settings for a theme: thin lines, no frame, text that stays text."""
    return {
        "svg.fonttype": "none",
        "font.size": 9.5,
        "font.family": "DejaVu Sans",
        "text.color": theme.ink,
        "text.parse_math": False,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.linewidth": 0.8,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "ytick.major.size": 0,
        "lines.linewidth": 1.5,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.labelcolor": theme.muted,
        "figure.facecolor": "none",
    }


def to_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an `<svg>` element: colours from the page, names of its parts made unique by `prefix`.

    Args:
        prefix: letters and digits, different for every picture of a page.
        label: text for screen readers, escaped already.
    """
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the page's fonts, not matplotlib's, draw it
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    for role in _ROLES:
        svg = svg.replace(getattr(IN_PAGE, role), f"var({css_variable(role)})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", svg)
    svg = re.sub(r' id="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def to_png(figure: Figure, path: Path) -> None:
    """Writes the figure, 200 dots per inch, on a white ground."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, format="png", dpi=200, facecolor=LIGHT.surface)


def shortened(name: str, longest: int) -> str:
    """A name, its middle left out where it is longer than `longest`."""
    name = visible(name)
    if len(name) <= longest:
        return name
    tail = (longest - 1) * 2 // 3
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"
