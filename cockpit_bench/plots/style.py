"""How every plot looks: colours that survive colour blindness and grey printing, quiet axes, legends off the curves."""

from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito 2008, "Color universal design".
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
INK, FAINT, SHADE = "#222222", "#999999", "#ececec"
TITLE_SIZE, TEXT_SIZE, NOTE_SIZE = 11, 8, 7
FEW_DECADES = 2.0  # fewer have labels between the powers of ten
LEGEND_WIDTH = 58  # characters that fit over a pane, a key counted as six


def prepare(ax: Any, title: str, unit: str = "", *, log: bool = False) -> None:
    """Title on the left, unit at the axis, a light grid; a logarithmic axis where asked."""
    _title(ax, title, pad=6)
    if unit:
        ax.set_ylabel(unit, fontsize=TEXT_SIZE, color=INK)
    ax.tick_params(labelsize=TEXT_SIZE, colors=INK)
    ax.grid(True, color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if log:
        ax.set_yscale("log")


def log_ticks(ax: Any) -> None:
    """Labels of a logarithmic axis: powers of ten where it spans several, else as many plain numbers as have room."""
    if ax.get_yscale() != "log":
        return
    ax.yaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_ylim()
    if high < low * 10**FEW_DECADES:
        narrow = high < low * 3
        ax.yaxis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(ax: Any, *, columns: int | None = None, width: int = LEGEND_WIDTH) -> None:
    """The keys between title and axis, where no curve runs; they take as many lines as they need."""
    handles, labels = ax.get_legend_handles_labels()
    if not labels:
        return
    columns = columns or _columns(labels, width)
    ax.legend(
        handles, labels, ncols=columns, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, fontsize=TEXT_SIZE,
        borderpad=0.1, borderaxespad=0.1, handlelength=1.4, handletextpad=0.4, columnspacing=1.0, labelspacing=0.2,
    )  # fmt: skip
    lines = -(-len(labels) // columns)
    _title(ax, ax.get_title(loc="left"), pad=5 + 1.35 * TEXT_SIZE * lines)


def _title(ax: Any, title: str, pad: float) -> None:
    ax.set_title(title, loc="left", fontsize=TITLE_SIZE, color=INK, fontweight="bold", pad=pad)


def _columns(labels: list[str], width: int) -> int:
    """The most columns in which the longest keys of each still fit side by side."""
    for columns in range(len(labels), 1, -1):
        lines = -(-len(labels) // columns)
        widest = [max(len(text) for text in labels[at : at + lines]) for at in range(0, len(labels), lines)]
        if sum(widest) + 6 * len(widest) <= width:
            return len(widest)
    return 1


def nothing(ax: Any, why: str) -> None:
    """An axis that has nothing to show says why."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", fontsize=9, color=INK, wrap=True)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
