"""diffusers' own hooks and helpers beside EDiT: writes the table of docs/neighbours.md; a minute or two on one core.

Small random transformers take three steps: plain, with a neighbour, with EDiT, and with both. A cell says what came of
it and holds no opinion: it works if both show in the result, and else the words of whoever refused are in it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "neighbours.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import diffusers
from diffusers import hooks
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from support import models

from edit_core import EDiTConfig, apply_edit
from edit_core.errors import EDiTError

KINDS = ("a student", "piecewise")
TITLES = {"pixart_sigma": "PixArt-Σ", "sd35_medium": "SD3.5-Medium"}
TIMES = (900, 600, 300)
CLOSE = 1e-4  # relative: rounding, of sums in another order
Act = Callable[[Any], Any]


@dataclass(frozen=True)
class Neighbour:
    """One of diffusers' parts, or a package's.

    Args:
        name: as people call it.
        act: does it to a transformer; may give a transformer to use instead, a function that draws, or arguments for
            every call of the transformer.
        close: what it may change in the picture, where it is to change nothing; None where it is to change it.
        first: whether it comes before EDiT.
        only: the backbone that has it.
        needs: a package.
    """

    name: str
    act: Act
    close: float | None = None
    first: bool = False
    only: str = ""
    needs: str = ""


class Clock:
    """The time of the step under way, which step caches ask for."""

    time = 0


def make(backbone: str) -> Any:
    # widths in multiples of 32, which quantised layers want
    return models.pixart(head_dim=16, blocks=3) if backbone == "pixart_sigma" else models.sd35()


@torch.no_grad()
def draw(model: Any, more: dict[str, Any]) -> Tensor:
    """Three steps of a picture of 256 tokens."""
    generator = torch.Generator().manual_seed(0)
    condition = {"encoder_hidden_states": torch.randn(2, 7, 64, generator=generator)}
    if model.config.in_channels == 4:
        condition["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}  # type: ignore[assignment]
    else:
        condition["pooled_projections"] = torch.randn(2, 32, generator=generator)
    latent = torch.randn(2, model.config.in_channels, 32, 32, generator=generator)
    for time in TIMES:
        Clock.time = time
        timestep = torch.tensor([time] * 2)
        latent = (
            latent
            - 0.3 * model(hidden_states=latent, timestep=timestep, **condition, **more).sample[:, : latent.shape[1]]
        )
    return latent


# --- what they do ---


def seeded(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return call()


def pyramid(model: Any) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: Clock.time,
    )  # fmt: skip
    hooks.apply_pyramid_attention_broadcast(model, config)


def faster(model: Any) -> None:
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 850),
        spatial_attention_block_identifiers=("transformer_blocks",), tensor_format="BCHW", is_guidance_distilled=True,
        current_timestep_callback=lambda: Clock.time,
    )  # fmt: skip
    hooks.apply_faster_cache(model, config)


def magnitude(model: Any) -> None:
    config = hooks.MagCacheConfig(
        threshold=9.0, num_inference_steps=len(TIMES), retention_ratio=0.1, mag_ratios=torch.ones(len(TIMES))
    )
    hooks.apply_mag_cache(model, config)


def taylor(model: Any) -> None:
    config = hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)
    hooks.apply_taylorseer_cache(model, config)


def skip(*blocks: int, **choices: Any) -> Act:
    config = lambda: hooks.LayerSkipConfig(list(blocks), "transformer_blocks", **choices)  # noqa: E731
    return lambda model: hooks.apply_layer_skip(model, config())


def guidance(model: Any) -> Callable[[], Tensor]:
    from test_hosts import pag_pipeline

    return pag_pipeline("pixart_sigma" if model.config.in_channels == 4 else "sd35_medium", model)


def refuse(model: Any) -> None:
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()


def cast(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload(model: Any) -> None:
    cpu = torch.device("cpu")
    hooks.apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def sequential(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))


def adapter(model: Any) -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    seeded(
        lambda: (
            model.add_adapter(config) if hasattr(model, "add_adapter") else peft.inject_adapter_in_model(config, model)
        )
    )


def picture_prompt(model: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(192, 24, 64, timesteps_emb_dim=192))
    return {"joint_attention_kwargs": {"ip_hidden_states": torch.randn(2, 5, 24), "temb": torch.randn(2, 192)}}


def control(model: Any) -> dict[str, Any]:
    net = seeded(lambda: diffusers.SD3ControlNetModel.from_transformer(model, 2, num_extra_conditioning_channels=0))
    models.randomise(net, 4)
    generator = torch.Generator().manual_seed(1)
    given = {"hidden_states": torch.randn(2, 16, 32, 32, generator=generator), "timestep": torch.tensor([600] * 2)}
    given["encoder_hidden_states"] = torch.randn(2, 7, 64, generator=generator)
    given["pooled_projections"] = torch.randn(2, 32, generator=generator)
    with torch.no_grad():
        states = net(controlnet_cond=given["hidden_states"], return_dict=False, **given)[0]
    return {"block_controlnet_hidden_states": list(states)}


def reloaded(config: Callable[[], Any]) -> Act:
    """The transformer anew from a folder, quantised on the way."""

    def act(model: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder, quantization_config=config(), torch_dtype=torch.float32).eval()

    return act


def torchao_config() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())


def gguf_layers(model: Any) -> None:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for block in model.transformer_blocks:
        for path, linear in list(block.named_modules()):
            if type(linear) is not torch.nn.Linear:
                continue
            other = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
            kind = gguf.GGMLQuantizationType.Q8_0
            rows = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
            other.weight, other.bias = GGUFParameter(rows, quant_type=kind), linear.bias
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, other)


def threshold(model: Any) -> None:
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=9.0))


def in_context(act: Act) -> Act:
    """In a context of caches, which neither these transformers nor their pipelines open by themselves."""

    def within(model: Any) -> Callable[[], Tensor]:
        act(model)
        hooks.hooks._set_cache_context(model, hooks.hooks.CacheContext("cond"))
        return lambda: draw(model, {})

    return within


def compiled(model: Any) -> None:
    model.compile(backend="eager", fullgraph=True)


def blocks_compiled(model: Any) -> None:
    for block in model.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)


NEIGHBOURS = (
    Neighbour("FirstBlockCache", threshold),
    Neighbour("FirstBlockCache in a context of its own", in_context(threshold)),
    Neighbour("FasterCache", faster),
    Neighbour("Pyramid Attention Broadcast", pyramid),
    Neighbour("MagCache", magnitude),
    Neighbour("TaylorSeer", taylor),
    Neighbour("TaylorSeer in a context of its own", in_context(taylor)),
    Neighbour("layer skip, one block", skip(1)),
    Neighbour("layer skip, two blocks side by side", skip(0, 1)),
    Neighbour("layer skip, attention", skip(1, skip_ff=False)),
    Neighbour("layer skip, feed-forward", skip(1, skip_attention=False)),
    Neighbour("layer skip, scores", skip(1, skip_attention=False, skip_attention_scores=True, skip_ff=False)),
    Neighbour("skip layer guidance (`skip_layers`)", lambda model: {"skip_layers": [1]}, only="sd35_medium"),
    Neighbour("perturbed attention guidance", guidance),
    Neighbour("`fuse_qkv_projections()`, then EDiT", lambda model: model.fuse_qkv_projections(), CLOSE, first=True),
    Neighbour("`fuse_qkv_projections()` after EDiT", lambda model: model.fuse_qkv_projections(), CLOSE),
    Neighbour("fused and unfused again", refuse, CLOSE),
    Neighbour("layerwise casting, then EDiT", cast, 0.2, first=True),
    Neighbour("layerwise casting after EDiT", cast, 0.2),
    Neighbour("group offloading, then EDiT", offload, CLOSE, first=True),
    Neighbour("group offloading after EDiT", offload, CLOSE),
    Neighbour("sequential offloading, then EDiT", sequential, CLOSE, first=True),
    Neighbour("sequential offloading after EDiT", sequential, CLOSE),
    Neighbour("`set_attention_backend()`", lambda model: model.set_attention_backend("_native_math"), CLOSE),
    Neighbour(
        "`compile_repeated_blocks()`",
        lambda model: model.compile_repeated_blocks(backend="eager", fullgraph=True),
        CLOSE,
    ),
    Neighbour("`transformer.compile()`, then EDiT", compiled, CLOSE, first=True),
    Neighbour("`transformer.compile()` after EDiT", compiled, CLOSE),
    Neighbour("each block compiled, then EDiT", blocks_compiled, CLOSE, first=True),
    Neighbour("each block compiled after EDiT", blocks_compiled, CLOSE),
    Neighbour("PEFT's LoRA, then EDiT", adapter, first=True, needs="peft"),
    Neighbour("PEFT's LoRA after EDiT", adapter, needs="peft"),
    Neighbour("GGUF layers", gguf_layers, 0.2, first=True, needs="gguf"),
    Neighbour("quanto, int8", reloaded(lambda: diffusers.QuantoConfig("int8")), 0.2, first=True, needs="optimum"),
    Neighbour("torchao, int8", reloaded(torchao_config), 0.2, first=True, needs="torchao"),
    Neighbour("IP-Adapter, then EDiT", picture_prompt, first=True, only="sd35_medium"),
    Neighbour("IP-Adapter after EDiT", picture_prompt, only="sd35_medium"),
    Neighbour("ControlNet", control, only="sd35_medium"),
)


# --- what comes of it ---


@dataclass(frozen=True)
class Outcome:
    picture: Tensor | None
    error: str
    """In one line; nothing where there is a picture."""
    ours: bool
    """Whether EDiT refused."""
    said: tuple[str, ...]
    """What EDiT warned of."""


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    ear, logger = _Ear(), logging.getLogger("edit_core")
    logger.addHandler(ear)
    logger.propagate = False
    try:
        yield ear.heard
    finally:
        logger.removeHandler(ear)
        logger.propagate = True


def outcome(backbone: str, neighbour: Neighbour | None, kind: str | None) -> Outcome:
    """What a neighbour and a kind of EDiT, or none of them, make of the picture."""
    model, more = make(backbone), {}
    plan = EDiTConfig.preset("piecewise") if kind == "piecewise" else models.trained_like(model)
    paint: Callable[[], Tensor] | None = None

    def act() -> None:
        nonlocal model, more, paint
        found = None if neighbour is None else neighbour.act(model)
        if isinstance(found, dict):
            more = found
        elif isinstance(found, torch.nn.Module):
            model = found
        elif found is not None:
            paint = found

    with listening() as heard:
        try:
            if neighbour is not None and neighbour.first:
                act()
            if kind is not None:
                apply_edit(model, plan)
            if neighbour is None or not neighbour.first:
                act()
            picture = draw(model, more) if paint is None else paint()
        except Exception as error:
            line = " ".join(str(error).split()) or type(error).__name__
            return Outcome(None, f"{type(error).__name__}: {line}"[:160], isinstance(error, EDiTError), tuple(heard))
    if not torch.isfinite(picture).all():
        return Outcome(None, "a picture that is not finite", False, tuple(heard))
    return Outcome(picture, "", False, tuple(heard))


def apart(a: Outcome, b: Outcome) -> float:
    assert a.picture is not None and b.picture is not None
    return models.relative_error(a.picture, b.picture) if a.picture.shape == b.picture.shape else float("inf")


def quote(text: str) -> str:
    return "`" + text.replace("|", "/").replace("`", "'") + "`"


def cell_alone(neighbour: Neighbour, plain: Outcome, alone: Outcome) -> str:
    """What the neighbour does without EDiT."""
    if alone.picture is None:
        return f"fails: {quote(alone.error)}"
    if plain.picture is not None and plain.picture.shape != alone.picture.shape:
        return "works"  # a pipeline's picture
    change = apart(alone, plain)
    if neighbour.close is None or (neighbour.needs and not change):
        return "works" if change > CLOSE else "has no effect"
    return "works" if change <= neighbour.close else f"another picture ({change:.2g} apart)"


def cell(neighbour: Neighbour, plain: Outcome, alone: Outcome, edit: Outcome, both: Outcome) -> str:
    """What comes of both; what nobody said is in bold."""
    if both.picture is None:
        if both.ours:
            return f"EDiT: {quote(both.error.partition(': ')[2])}"
        # Where diffusers names a processor's class, it is that of EDiT's.
        alike = alone.error == both.error.replace(
            "edit_core.hosts.processors.EDiT", "diffusers.models.attention_processor."
        )
        return "fails alike" if alike else f"**fails**: {quote(both.error)}"
    said = "; ".join(quote(text) for text in both.said)
    if alone.picture is not None and apart(both, alone) == 0:
        return f"the host's own attention: {said}" if said else "**EDiT off without a word**"
    if said:
        return said
    if alone.picture is None:
        return "works, unlike without EDiT"
    if alone.picture.shape != edit.picture.shape:  # type: ignore[union-attr]
        return "works"
    change = apart(both, edit)
    if neighbour.close is not None:
        return "works" if change <= neighbour.close else f"**another picture ({change:.2g} apart)**"
    if change > CLOSE:
        return "works"
    return "has no effect" if apart(alone, plain) <= CLOSE else "**ignored without a word**"


def rows(neighbours: tuple[Neighbour, ...] = NEIGHBOURS) -> Iterator[tuple[str, list[str]]]:
    """Each neighbour's name and cells."""
    plains = {backbone: outcome(backbone, None, None) for backbone in TITLES}
    edits = {(backbone, kind): outcome(backbone, None, kind) for backbone in TITLES for kind in KINDS}
    for neighbour in neighbours:
        cells: list[str] = []
        for backbone in TITLES:
            if neighbour.only not in ("", backbone):
                cells += ["diffusers has none", *("–" for _ in KINDS)]
                continue
            if neighbour.needs and importlib.util.find_spec(neighbour.needs) is None:
                cells += [f"not run: {neighbour.needs} is not installed", *("–" for _ in KINDS)]
                continue
            torch.compiler.reset()
            alone = outcome(backbone, neighbour, None)
            cells.append(cell_alone(neighbour, plains[backbone], alone))
            for kind in KINDS:
                both = outcome(backbone, neighbour, kind)
                cells.append(cell(neighbour, plains[backbone], alone, edits[backbone, kind], both))
        yield neighbour.name, cells


HEAD = """\
# diffusers' other parts beside EDiT

Written by `python tools/neighbours.py`: small transformers with random weights, three steps each, on a CPU. *Alone* is
diffusers without EDiT. Under *a student* and *piecewise* it *works* where both show in the picture (what is only to
save time or memory leaves the picture as it is); *fails alike* is the same error as alone; words in `this type` are
what you are told, by whoever refuses. A picture that is *the host's own attention* is right, and no faster than without
EDiT. **Bold** would be a fault of EDiT's.
"""
TAIL = """\
What is worth knowing of them, EDiT or not, in diffusers 0.42.1:

- A step cache keeps its state from one picture to the next.
  `HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks(recurse=True)` between pictures that you
  want to compare.
- FirstBlockCache and TaylorSeer want a `cache_context`, which these two transformers and their pipelines do not have;
  the rows *in a context of its own* set one by hand. TaylorSeer's default looks for names that PixArt does not have.
- Layer skip by hooks exchanges image and prompt in SD3.5 where it leaves out a whole block; two blocks side by side
  change them back. `skip_layers`, which the pipeline's skip layer guidance uses, is right.
- Layer skip does not know SD3's attention processors. Beside EDiT its error names `EDiTJointAttnProcessor2_0`, and
  without EDiT `JointAttnProcessor2_0`.
- `fuse_qkv_projections()` leaves out SD3.5's norms of queries and keys, and its `attn2` fails. Adapters have no effect
  while projections are fused.
- Perturbed attention guidance puts its own processors into its blocks, and EDiT's back after each picture.
- `set_attention_backend()` is taken by both models and changes nothing in them: there is one softmax attention to
  compare with, PyTorch's.
- Compiling was tried with the `eager` backend and `fullgraph=True`: everything is one graph.
"""


def versions() -> str:
    from importlib import metadata

    found = []
    for name in ("diffusers", "torch", "accelerate", "peft", "gguf", "optimum-quanto", "torchao"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def page(neighbours: tuple[Neighbour, ...] = NEIGHBOURS) -> str:
    found = list(rows(neighbours))
    text = [HEAD, f"Run with {versions()}.\n"]
    for number, title in enumerate(TITLES.values()):
        text += [f"## {title}\n", "| | alone | " + " | ".join(KINDS) + " |", "|---|---|" + "---|" * len(KINDS)]
        width = 1 + len(KINDS)
        text += ["| " + " | ".join((name, *cells[number * width :][:width])) + " |" for name, cells in found]
        text.append("")
    return "\n".join([*text, TAIL])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="to the terminal, not into the docs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    with contextlib.redirect_stderr(io.StringIO()):
        text = page()
    if options.print:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")
        print(PAGE)
    return int("**" in text.replace("**Bold**", ""))


if __name__ == "__main__":
    sys.exit(main())
