"""The codec as an `AutoencoderTiny`, which diffusers and ComfyUI load (ours).

The encoder is the linear code exactly. A decoder made of repeated pixels and 3x3 convolutions cannot be its inverse, so
it is learnt: narrow, to be quick, and stored as what it is in a network of 64 channels. Drawn edges become sharp again.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distill.encoders import CELL
from .codec import CHANNELS, basis

__all__ = ["SCALE", "Decoder", "comfyui_state", "from_comfyui", "tiny"]

SCALE = 4.0
"""Latents are divided by this in the file: the decoder's first layer, `3 tanh(x / 3)`, is nearly linear there."""

_FULL = 64
_WIDTHS, _BLOCKS = (48, 32, 24, 16), (2, 2, 1, 1)  # from cells to pixels
_DEPTHS = (3, 3, 3, 1)  # blocks of an AutoencoderTiny's decoder
_COMFYUI = {"pixart_sigma": (0.13025, 0.0), "sd35_medium": (1.5305, 0.0609)}  # scale and shift of its latent formats


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv[1](F.relu(self.conv[0](x))))
        return F.relu(x + self.conv[2](y))


class Decoder(nn.Module):
    """A narrow AutoencoderTiny decoder: latents `(B, c, h, w)` to pictures `(B, 3, 8h, 8w)` in 0-1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, _WIDTHS[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(_Block(width) for _ in range(count)) for width, count in zip(_WIDTHS, _BLOCKS, strict=True)
        )
        self.grow = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(_WIDTHS))
        self.last = nn.Conv2d(_WIDTHS[-1], 3, 3, padding=1)
        bias: Any = self.last.bias
        nn.init.constant_(bias, 0.45)  # of the mean picture

    def forward(self, latent: Tensor) -> Tensor:
        x = F.relu(self.first(torch.tanh(latent / SCALE / 3) * 3))
        for i, stage in enumerate(self.stages):
            blocks: Any = stage
            for block in blocks:
                x = block(x)
            if i < len(self.grow):
                x = self.grow[i](F.interpolate(x, scale_factor=2.0))
        return self.last(x)


def tiny(backbone: str, decoder: Decoder) -> Any:
    """A diffusers `AutoencoderTiny` with scaling factor SCALE."""
    from diffusers import AutoencoderTiny

    vae: Any = AutoencoderTiny(latent_channels=CHANNELS[backbone], scaling_factor=SCALE)
    for parameter in vae.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        _set_encoder(vae.encoder.layers, backbone)
        _set_decoder(vae.decoder.layers, decoder)
    return vae.eval().requires_grad_(False)


def comfyui_state(backbone: str, vae: Any) -> dict[str, Tensor]:
    """The file that ComfyUI's Load VAE takes."""
    scale, shift = _COMFYUI[backbone]
    state = {"vae_scale": torch.tensor(scale / SCALE), "vae_shift": torch.tensor(shift)}
    for key, value in vae.state_dict().items():
        side, _, index, rest = key.split(".", 3)
        # ComfyUI counts the decoder's clamp as a layer.
        state[f"taesd_{side}.{int(index) + (side == 'decoder')}.{rest}"] = value.contiguous()
    return state


def from_comfyui(state: dict[str, Tensor]) -> Any:
    """The `AutoencoderTiny` of such a file, in float32."""
    from diffusers import AutoencoderTiny

    own = {}
    for key, value in state.items():
        if key not in ("vae_scale", "vae_shift"):
            side, index, rest = key.removeprefix("taesd_").split(".", 2)
            own[f"{side}.layers.{int(index) - (side == 'decoder')}.{rest}"] = value
    channels = own["decoder.layers.0.weight"].shape[1]
    vae: Any = AutoencoderTiny(latent_channels=channels, scaling_factor=SCALE)
    vae.load_state_dict(own)
    return vae.eval().requires_grad_(False)


def _set_encoder(layers: Any, backbone: str) -> None:
    """Pixels move to channels in three halvings, where the last one takes the code's products.

    All values are positive until there, so the ReLUs in between do nothing; positive and negative parts go separately
    through the last ones. Blocks whose convolutions are zero are the identity.
    """
    code = basis(backbone)
    for channel in range(3):
        layers[0].weight[channel, channel, 1, 1] = 1
    for layer, channels in ((layers[2], 3), (layers[6], 12)):
        for source in range(channels):
            for down in (0, 1):
                for across in (0, 1):
                    layer.weight[4 * source + 2 * down + across, source, 1 + down, 1 + across] = 1
    count = CHANNELS[backbone]
    products = code.analysis.view(count, 3, CELL, CELL)
    for colour in range(3):
        for y in range(CELL):
            for x in range(CELL):
                first = 4 * colour + 2 * (y % 2) + x % 2
                source = 4 * first + 2 * (y // 2 % 2) + x // 2 % 2
                weight = products[:, colour, y, x]
                layers[10].weight[:count, source, 1 + y // 4, 1 + x // 4] = weight
                layers[10].weight[count : 2 * count, source, 1 + y // 4, 1 + x // 4] = -weight
    for channel in range(count):
        layers[14].weight[channel, channel, 1, 1] = 1 / SCALE
        layers[14].weight[channel, count + channel, 1, 1] = -1 / SCALE
    layers[14].bias.copy_(-(products.sum((2, 3)) @ code.mean.flatten()) / SCALE)


def _set_decoder(layers: Any, decoder: Decoder) -> None:
    def put(target: Any, source: Any) -> None:
        out, into = source.weight.shape[:2]
        target.weight[:out, :into] = source.weight
        if source.bias is not None:
            target.bias[:out] = source.bias

    put(layers[0], decoder.first)
    index = 2
    for i, (stage, depth) in enumerate(zip(decoder.stages, _DEPTHS, strict=True)):
        blocks: Any = stage
        for k, block in enumerate(blocks):
            for place in range(3):
                put(layers[index + k].conv[2 * place], block.conv[place])
        index += depth
        if i < len(decoder.grow):
            put(layers[index + 1], decoder.grow[i])
            index += 2
    put(layers[index], decoder.last)
