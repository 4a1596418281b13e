"""One thread, no COCKPIT=off from the shell of whoever runs the tests, and no third party's instruments."""

import pytest


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCKPIT", raising=False)
