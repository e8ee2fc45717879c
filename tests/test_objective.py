"""How times are drawn and noise is mixed in, held against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edit_core.backbones import BACKBONES


def test_noise_follows_the_schedulers() -> None:
    from diffusers import DDPMScheduler

    latent, generators = torch.randn(3, 4, 8, 8), [torch.Generator().manual_seed(i) for i in range(3)]
    noised = BACKBONES["pixart_sigma"].objective.noise_batch(latent, generators)
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02)
    expected = scheduler.add_noise(latent, noised.noise, noised.timestep)
    assert torch.allclose(noised.latent, expected, atol=1e-5)
    flow = BACKBONES["sd35_medium"].objective.noise_batch(latent, generators, shift=3.0)
    sigma = (flow.timestep / 1000).view(-1, 1, 1, 1)
    target = BACKBONES["sd35_medium"].objective.target(latent, flow)
    assert torch.allclose(flow.latent, latent + sigma * target, atol=1e-5)


@pytest.mark.parametrize("weighting", ["logit_normal", "mode", "uniform"])
def test_times_lie_in_range_and_shift_towards_noise(weighting: Any) -> None:
    latent = torch.zeros(400, 1, 1, 1)

    def times(shift: float) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(400)]
        return BACKBONES["sd35_medium"].objective.noise_batch(latent, generators, weighting, shift).timestep / 1000

    plain, shifted = times(1.0), times(3.0)
    assert 0 <= float(plain.min()) <= float(plain.max()) <= 1
    assert 0.4 < float(plain.mean()) < 0.6
    assert float(shifted.mean()) > float(plain.mean()) + 0.1


@pytest.mark.parametrize(("weighting", "shift"), [("logit_normal", 1.0), ("logit_normal", 3.0), ("mode", 1.0)])
def test_pixarts_times_may_be_those_of_sd3_with_errors_that_count_as_a_velocitys(weighting: Any, shift: float) -> None:
    latent = torch.ones(4000, 1, 1, 1)

    def noised(backbone: str, **kwargs: Any) -> Any:
        return BACKBONES[backbone].objective.noise_batch(
            latent, [torch.Generator().manual_seed(i) for i in range(4000)], **kwargs
        )

    ours = noised("pixart_sigma", weighting=weighting, shift=shift)
    alpha = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000), 0)[ours.timestep]
    signal = alpha.sqrt() / (alpha.sqrt() + (1 - alpha).sqrt())
    path = noised("sd35_medium", weighting=weighting, shift=shift).timestep / 1000
    wanted, got = (torch.quantile(t, torch.tensor([0.1, 0.3, 0.5, 0.7])) for t in (path, 1 - signal))
    assert float((wanted - got).abs().max()) < 0.12, "some are uniform, and late"
    # An error of the noise by e is one of the velocity by e / signal.
    for of_time in (torch.ones_like, lambda sigma: sigma):
        velocity, few = float(of_time(path).mean()), float((of_time(1 - signal) * signal**2).mean()) * 0.15
        assert abs(float((ours.weight * signal**2 * of_time(1 - signal)).mean()) - velocity) < 0.05 + few
    assert torch.equal(noised("pixart_sigma").weight, torch.ones(4000))
    assert torch.equal(noised("pixart_sigma").timestep, noised("pixart_sigma", weighting="uniform").timestep)
