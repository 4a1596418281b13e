"""One thread, and no COCKPIT=off from the shell of whoever runs the tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCKPIT", raising=False)
