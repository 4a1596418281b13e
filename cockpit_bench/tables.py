"""Tables as text and as HTML, for terminals and notebooks. Imports nothing."""

import html
from collections.abc import Sequence

Row = Sequence[str]


def text_table(rows: Sequence[Row]) -> list[str]:
    """One line a row: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def html_table(rows: Sequence[Row]) -> str:
    """The same as HTML, the first row being its head; every cell is escaped."""
    head, *body = ["".join(_cell(cell, index, row is rows[0]) for index, cell in enumerate(row)) for row in rows]
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(text: str, index: int, head: bool) -> str:
    tag, side = "th" if head else "td", "left" if index == 0 else "right"
    return f'<{tag} style="text-align:{side}">{html.escape(text)}</{tag}>'


def duration(seconds: float) -> str:
    """Seconds with a unit that keeps the number readable; a dash where they are not known."""
    if seconds != seconds:
        return "-"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def share(part: float, whole: float) -> str:
    """`part` as a percentage of `whole`; a dash where that is no number."""
    if not whole > 0 or part != part:
        return "-"
    return f"{part / whole:.1%}"
