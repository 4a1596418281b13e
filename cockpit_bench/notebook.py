"""What a notebook needs in order to show a figure."""

import io
from functools import partial
from typing import Any


def shown(figure: Any) -> Any:
    """The same matplotlib Figure, which a notebook now shows as the result of a cell.

    IPython draws figures by itself only after pyplot was imported, which a figure of its own canvas never does.
    """
    figure._repr_png_ = partial(png, figure)
    return figure


def png(figure: Any) -> bytes:
    """The figure as a PNG file, at its own resolution."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=figure.dpi)
    return file.getvalue()
