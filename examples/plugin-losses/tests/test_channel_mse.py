"""The squared error in each channel's own units."""

from __future__ import annotations

import pytest
import torch

from swquant.losses import LossContext
from swquant_plugin_losses.channel_mse import ChannelMse

CONTEXT = LossContext(torch.Generator())


def test_channel_mse_divides_by_each_channels_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    target, noise = (torch.randn(2, 5, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    pred = target + 0.2 * noise
    channels = [
        float((pred[..., c] - target[..., c]).square().mean() / target[..., c].var(correction=0)) for c in range(4)
    ]
    assert ChannelMse()(pred, target, CONTEXT).item() == pytest.approx(sum(channels) / 4)
    units = torch.tensor([1.0, 1e3, 0.1, 5.0], dtype=torch.float64)
    assert ChannelMse()(pred * units, target * units, CONTEXT).item() == pytest.approx(sum(channels) / 4)
