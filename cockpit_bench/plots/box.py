"""Rectangles of a picture in pixels, from its lower left corner."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    width: float
    height: float

    def part(self, column: int, columns: int, row: int, rows: int) -> "Box":
        """One cell of an even grid; rows count from the top."""
        width, height = self.width / columns, self.height / rows
        return Box(self.left + column * width, self.bottom + (rows - 1 - row) * height, width, height)

    def inside(self, left: float, right: float, above: float, below: float) -> "Box":
        """What is left when margins are taken off."""
        return Box(self.left + left, self.bottom + below, self.width - left - right, self.height - above - below)

    def axes(self, figure: Any) -> Any:
        """New axes that fill the rectangle, without decorations."""
        across, up = figure.get_figwidth() * figure.dpi, figure.get_figheight() * figure.dpi
        return figure.add_axes((self.left / across, self.bottom / up, self.width / across, self.height / up))
