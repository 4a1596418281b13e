"""Which parameters are read, and when the model is walked for them."""

import torch
from torch import nn

from instruments.layout import Layout, remembered_layout


def test_the_model_is_walked_again_only_when_something_changed(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    walks = []
    real = Layout.of.__func__  # type: ignore[attr-defined]

    def counting(cls, *args):  # type: ignore[no-untyped-def]
        walks.append(1)
        return real(cls, *args)

    monkeypatch.setattr(Layout, "of", classmethod(counting))
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer, plans = torch.optim.SGD(model.parameters(), lr=0.1), {}
    for _ in range(3):
        layout = remembered_layout(plans, model, None, [optimizer])
    assert len(walks) == 1
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    model[0].requires_grad_(False)
    assert remembered_layout(plans, model, None, [optimizer]).names == ("1.weight", "1.bias")
    model[0].requires_grad_(True)
    assert len(remembered_layout(plans, model, None, [optimizer]).names) == 4
    model.append(nn.Linear(2, 2, bias=False))
    optimizer.add_param_group({"params": model[2].parameters()})
    assert remembered_layout(plans, model, None, [optimizer]).names[-1] == "2.weight"
    assert len(walks) == 4
