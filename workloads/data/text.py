"""Text as bytes: files of the standard library, or the user's own, cut into windows to predict the next byte.

Legend: n bytes of text, N windows, T bytes per window.
"""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

VOCABULARY = 256

Bytes = NDArray[np.uint8]


def standard_library(modules: Sequence[str]) -> list[Path]:
    """Source files of these modules in the running interpreter. Raises ValueError if one is not there as one file."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [folder / f"{module}.py" for module in modules]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"expected the source files of the standard library in {folder}, got none for {', '.join(missing)}; "
            "install Python with its sources, or give files of your own: other text would be another workload"
        )
    return paths


def read_split(paths: Sequence[Path], *, held_out: float = 0.1) -> tuple[Bytes, Bytes]:
    """Training and validation bytes: the last part, a share `held_out` of each file, is for validation.

    Whole blocks are held out instead of scattered windows, because neighbouring text repeats itself and would leak.
    Files are joined in the order given. Raises ValueError if there is no text, or the share is not inside (0, 1).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"expected held_out between 0 and 1, got {held_out}; 0.1 holds out a tenth of each file")
    texts = [np.frombuffer(Path(path).read_bytes(), dtype=np.uint8) for path in paths]
    if sum(map(len, texts)) == 0:
        raise ValueError(f"expected text, got {len(texts)} files with no byte in them; give at least one that has some")
    cuts = [len(text) - round(held_out * len(text)) for text in texts]
    train_n = np.concatenate([text[:cut] for text, cut in zip(texts, cuts, strict=True)])
    valid_n = np.concatenate([text[cut:] for text, cut in zip(texts, cuts, strict=True)])
    return train_n, valid_n


def windows(text_n: Bytes, *, context: int, stride: int) -> tuple[Tensor, Tensor]:
    """(inputs_NT, targets_NT), int64: T = context bytes and the byte that follows each, a window every `stride` bytes.

    With stride = context every byte but the first is a target once, up to an incomplete last window. Raises
    ValueError if the text is shorter than one window.
    """
    if len(text_n) <= context:
        raise ValueError(
            f"expected more than {context} bytes of text for one window, got {len(text_n)}; "
            "give more text or a shorter context"
        )
    spans = torch.tensor(text_n, dtype=torch.int64).unfold(0, context + 1, stride)
    return spans[:, :-1].contiguous(), spans[:, 1:].contiguous()
