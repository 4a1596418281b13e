"""How every plot looks: colours that survive colour blindness and grey printing, quiet axes."""

from typing import Any

# Okabe and Ito 2008, "Color universal design".
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
INK, FAINT = "#222222", "#999999"


def prepare(ax: Any, title: str, unit: str = "", *, log: bool = False) -> None:
    """Title on the left, unit under it, a light grid; a logarithmic axis where asked."""
    ax.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold")
    if unit:
        ax.set_ylabel(unit, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(True, color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if log:
        ax.set_yscale("log")


def nothing(ax: Any, why: str) -> None:
    """An axis that has nothing to show says why."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=FAINT, wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
