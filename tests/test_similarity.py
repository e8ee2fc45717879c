"""Pixel by pixel figures against torchmetrics', and the loop that every calibration shares."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from edit_core import EDiTError
from edit_core.distill.transfer import transfer
from edit_core.similarity import psnr, ssim


@pytest.mark.parametrize(("height", "width"), [(6, 6), (11, 40), (37, 52)])
@pytest.mark.parametrize("noise", [1, 20, 255])
def test_figures_are_torchmetrics(height: int, width: int, noise: int) -> None:
    a = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
    b = (a.int() + torch.randint(-noise, noise + 1, a.shape)).clamp(0, 255).byte()
    planes = [picture.permute(2, 0, 1)[None].double() / 255 for picture in (a, b)]
    assert ssim(a, b) == pytest.approx(float(structural_similarity_index_measure(*planes, data_range=1.0)), abs=1e-6)
    assert psnr(a, b) == pytest.approx(float(peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0)))
    assert psnr(a, a) == math.inf and ssim(a, a) == pytest.approx(1)


def test_pictures_smaller_than_the_window_are_named() -> None:
    picture = torch.zeros(5, 40, 3, dtype=torch.uint8)
    with pytest.raises(EDiTError, match="6 pixels or more per side, and these are 40x5"):
        ssim(picture, picture)


def test_a_teacher_that_reaches_no_attention_is_an_error() -> None:
    parameters = {"0.self.x": nn.Parameter(torch.ones(2))}
    with pytest.raises(EDiTError, match="without any of the attentions"):
        transfer(parameters, lambda tap: None, steps=1, lr=0.1, device=torch.device("cpu"), scaled=False)


def test_a_step_is_the_mean_of_all_that_the_teacher_came_by() -> None:
    weight = nn.Parameter(torch.zeros(1))
    seen: list[tuple[int, float]] = []

    def teach(tap: object) -> None:
        for key, teacher in (("0.self", 1.0), ("1.self", 2.0)):
            tap(key, lambda teacher=teacher: torch.full((1, 1), teacher), lambda: weight.expand(1, 1))  # type: ignore[operator]

    losses = transfer(
        {"0.self.x": weight}, teach, steps=3, lr=0.1, device=torch.device("cpu"), scaled=False,
        on_step=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert losses[0] == 1.0 and losses[0] > losses[1] > losses[2]
    assert seen == list(enumerate(losses))
