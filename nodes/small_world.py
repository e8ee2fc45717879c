"""The small world in ComfyUI: its files in the model folders, its models in the detection, its text as a CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.sd1_clip import ClipTokenWeightEncoder, escape_important, token_weights, unescape_important
from comfy.supported_models_base import ClipTarget
from comfy_api.latest import io

from ..edit_core.backbones import Base
from ..edit_core.world.files import FOLDERS
from ..edit_core.world.teachers import HEAD_WIDTH, HEADS, MAX_TOKENS, position_table
from ..edit_core.world.text import TOKENS, WIDTH, WorldText
from .common import CATEGORY, check_values, plain_state, refusal

CHANNELS = {backbone: heads * HEAD_WIDTH[backbone] for backbone, heads in HEADS.items()}


def register_small_world() -> None:
    """Adds the shipped files to ComfyUI's lists, behind the user's own, and the small models to its detection."""
    for kind, folder in FOLDERS.items():
        folder_paths.add_model_folder_path(kind, str(folder))
    comfy.supported_models.models[:0] = [SmallPixArtSigma, SmallSD35]  # the first that matches is taken


def _has(state: Mapping[str, torch.Tensor] | None, name: str, *shape: int) -> bool:
    """Whether a model has a tensor of this name, behind any prefix, and of this shape."""
    return any(key.endswith(name) and tuple(value.shape) == shape for key, value in (state or {}).items())


class SmallPixArtSigma(comfy.supported_models.PixArtSigma):
    """The small PixArt-Σ; ComfyUI's detection takes every PixArt for 1152 channels, 16 heads and T5-XXL's captions."""

    @classmethod
    def matches(cls, unet_config: dict[str, Any], state_dict: Any = None, **kwargs: Any) -> bool:
        caption = ("y_embedder.y_proj.fc1.weight", CHANNELS["pixart_sigma"], WIDTH)
        return super().matches(unet_config, state_dict, **kwargs) and _has(state_dict, *caption)

    def __init__(self, unet_config: dict[str, Any]) -> None:
        small = {
            "hidden_size": CHANNELS["pixart_sigma"],
            "num_heads": HEADS["pixart_sigma"],
            "caption_channels": WIDTH,
        }
        super().__init__({**unet_config, **small})


class SmallSD35(comfy.supported_models.SD3):
    """The small SD3.5, whose file lacks the table of positions; ComfyUI would make up other positions instead."""

    sampling_settings = {"shift": 1.0}  # noqa: RUF012 - as ComfyUI's own models have it

    @classmethod
    def matches(cls, unet_config: dict[str, Any], state_dict: Any = None, **kwargs: Any) -> bool:
        prompt = ("context_embedder.weight", CHANNELS["sd35_medium"], WIDTH)
        return super().matches(unet_config, state_dict, **kwargs) and _has(state_dict, *prompt)

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__({**unet_config, "num_patches": MAX_TOKENS**2, "pos_embed_max_size": MAX_TOKENS})

    def process_unet_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**state_dict, "pos_embed": position_table()}


def is_small_teacher(base: Base) -> bool:
    """Whether a file is the small PixArt-Σ under diffusers' names, for :func:`load_small_teacher`."""
    return (base.backbone.name, base.host, base.dim) == ("pixart_sigma", "diffusers", CHANNELS["pixart_sigma"])


def load_small_teacher(path: str, depth: int, model_options: dict[str, Any], prefix: str = "", **kwargs: Any) -> Any:
    """`comfy.sd.load_diffusion_model` for the small PixArt-Σ: ComfyUI joins linears as if they were 1152 wide.

    Args:
        path: the file.
        depth: how many blocks it has.
        model_options: as ComfyUI's function takes them.
        prefix: of the names of its tensors.
        kwargs: what ComfyUI asks of the factories that make independent copies for several GPUs.
    """
    state = plain_state(path, prefix)
    names = comfy.utils.pixart_to_diffusers({"depth": depth, "hidden_size": CHANNELS["pixart_sigma"]})
    joined: dict[str, list[torch.Tensor]] = {}
    for name, target in names.items():  # queries come before keys, and keys before values
        if name in state:
            joined.setdefault(target if isinstance(target, str) else target[0], []).append(state[name])
    fused = {name: torch.cat(parts) for name, parts in joined.items()}
    model = comfy.sd.load_diffusion_model_state_dict(fused, model_options=model_options, **kwargs)
    model.cached_patcher_init = (load_small_teacher, (path, depth, model_options, prefix))
    return model


class SmallWorldTokenizer:
    """Words and their weights.

    Args:
        padded: whether texts are padded to the length that all had in the training.
    """

    def __init__(self, padded: bool, **_: Any) -> None:
        self.text, self.padded = WorldText(), padded

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, Any]:
        pairs = [(self.text.ids["<s>"], 1.0)]
        for part, weight in token_weights(escape_important(text), 1.0):
            pairs += [(token, weight) for token in self.text.tokens(unescape_important(part))[1:]]
        if self.padded:
            pairs += [(self.text.ids["<pad>"], 1.0)] * (TOKENS - len(pairs))
        return {"small_world": [pairs[:TOKENS]]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class SmallWorldEncoder(torch.nn.Module, ClipTokenWeightEncoder):
    """:class:`WorldText` as ComfyUI asks text encoders; it has neither weights nor layers."""

    disable_offload = True  # ComfyUI's loading piece by piece is for weights

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.text = WorldText()
        self.names = {number: word for word, number in self.text.ids.items()}
        self.special_tokens = {"start": self.text.ids["<s>"], "pad": self.text.ids["<pad>"]}
        self.dtypes: set[torch.dtype] = set()

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """There are no layers to stop at."""

    def reset_clip_options(self) -> None:
        """Likewise."""

    def encode(self, tokens: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        special = self.special_tokens.values()
        texts = [" ".join(self.names[token] for token in tokens_ if token not in special) for tokens_ in tokens]
        encoded = self.text.encode_prompts(texts)
        return encoded["prompt_embeds"][:, : len(tokens[0])], encoded["pooled"]  # (B, T, WIDTH), (B, POOLED)

    def encode_token_weights(self, token_weight_pairs: dict[str, Any]) -> Any:
        return super().encode_token_weights(token_weight_pairs["small_world"])


class EDiTSmallWorldText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EDiTSmallWorldText",
            display_name="EDiT: Small World Text Encoder",
            category=CATEGORY,
            description="The text encoder of the small models that come with the pack. It knows their few words.",
            inputs=[
                io.Combo.Input(
                    "backbone",
                    options=list(HEADS),
                    tooltip="Which of the small models the text is for: PixArt-Σ's is as long as its words, SD3.5's "
                    "is always of the same length.",
                ),
            ],
            outputs=[io.Clip.Output(display_name="CLIP", tooltip="For CLIP Text Encode.")],
        )

    @classmethod
    def validate_inputs(cls, backbone: str | None = None) -> bool | str:
        return refusal(lambda: check_values(cls, backbone=backbone))

    @classmethod
    def execute(cls, backbone: str) -> io.NodeOutput:
        check_values(cls, backbone=backbone)
        # ComfyUI's PixArt takes no mask, and SD3.5 was trained without one.
        tokenizer = partial(SmallWorldTokenizer, backbone == "sd35_medium")
        return io.NodeOutput(comfy.sd.CLIP(ClipTarget(tokenizer, SmallWorldEncoder)))
