"""Cells of the composition matrix: what is sampled, with which prompts, and where in the schedule."""

from __future__ import annotations

import re
from typing import Any

from host import BASE, apply, conditioning, error, load, logged, same, user_error, weights
from matrix_host import SIZES, agreement, cosine, draw, empty, side, stock, teacher, text
from safetensors.torch import save_file
import torch

import comfy.cldm.dit_embedder
import comfy.ops
import comfy.sample
import comfy.samplers
import nodes

OTHER = "a small green bar at the top right, on blue rows"


def check_guidance_with_unequal_prompts(b: str) -> Any:
    """Guidance 1 is the prompt alone; above it one step is exactly what two runs by hand combine to."""
    patched, prompts = apply(teacher(b), side(b)), (text(b), cut(text(b, OTHER), 5))
    alone = [draw(patched, b, 1, positive=prompt) for prompt in prompts]
    same(draw(patched, b, 1, positive=prompts[0], negative=prompts[1]), alone[0], "guidance 1")
    figures = {}
    for cfg in (1.5, 4.5):
        got = draw(patched, b, 1, cfg, *prompts)
        figures[f"guidance {cfg}, against by hand"] = error(got, alone[1] + cfg * (alone[0] - alone[1]))
    assert max(figures.values()) < 1e-4, figures
    return figures


def cut(conditioning: Any, tokens: int) -> Any:
    return [[conditioning[0][0][:, :tokens], conditioning[0][1]]]


def check_batches_of_one_to_four(b: str) -> Any:
    """Each picture of a batch is the one that its noise gives alone, with guidance too."""
    patched, figures = apply(teacher(b), side(b)), {}
    four = from_noise(patched, b, comfy.sample.prepare_noise(empty(patched, *SIZES[b], 4)["samples"], 1), cfg=3.0)
    for batch in (1, 2, 3):
        got = draw(patched, b, 1, 3.0, batch=batch)
        figures[f"{batch} against the first of 4"] = error(got, four[:batch])
    assert cosine(four[0], four[1]) < 0.9, "the pictures of a batch are all one"
    assert max(figures.values()) < 1e-4, figures
    return figures


def from_noise(model: Any, b: str, noise: torch.Tensor, cfg: float = 1.0, positive: Any = None) -> torch.Tensor:
    """One step from a given noise."""
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, 1, cfg, "euler", "normal", positive or text(b), text(b, ""), torch.zeros_like(noise),
            seed=1, disable_pbar=True,
        )  # fmt: skip


def check_image_to_image(b: str) -> Any:
    """From a picture at half the noise: the student follows the picture as the teacher does, and not at noise one."""
    base = teacher(b)
    patched, half = apply(base, side(b)), {"steps": 2, "denoise": 0.5}
    pictures = [{"samples": draw(base, b, 2, positive=text(b, caption))} for caption in (text_of(b), OTHER)]
    of, from_ = (
        (draw(base, b, latent=picture, **half), draw(patched, b, latent=picture, **half)) for picture in pictures
    )
    # At half the noise both are handed the same half of what changes. What each adds is at most as much again; if it
    # had nothing in common, the cosine would be 1/2, and most of it has.
    figures = agreement(of, from_, 0.7)
    figures["student against teacher"] = error(of[1], of[0])
    return figures


def text_of(b: str) -> str:
    return "a large blue triangle in the centre, on red columns"


def check_inpainting_mask(b: str) -> Any:
    """Outside the mask the picture is kept; inside, another prompt changes student and teacher alike."""
    base = teacher(b)
    patched = apply(base, side(b))
    picture = draw(base, b, 2)
    height, width = SIZES[b]
    mask = torch.zeros(1, height * 8, width * 8)
    mask[..., : width * 4] = 1
    masked = nodes.SetLatentNoiseMask().set_mask({"samples": picture}, mask)[0]
    drawn = [
        (draw(base, b, latent=masked, positive=prompt), draw(patched, b, latent=masked, positive=prompt))
        for prompt in (text(b), text(b, OTHER))
    ]
    half, edit = width // 2, drawn[0][1]
    figures = agreement(drawn[1], drawn[0]) | {
        "kept part against the picture": error(edit[..., half + 1 :], picture[..., half + 1 :]),
        "drawn part against the picture": error(edit[..., : half - 1], picture[..., : half - 1]),
    }
    assert figures["kept part against the picture"] < 1e-5, figures
    assert figures["drawn part against the picture"] > 1e-2, figures
    return figures


def check_area_conditioning(b: str) -> Any:
    """A prompt for an area: one step there is a draw of the area alone, and with a prompt for the rest it follows."""
    base = teacher(b)
    patched = apply(base, side(b))
    noise = comfy.sample.prepare_noise(empty(base, 36, 42)["samples"], 1)
    where = {"width": 36 * 8, "height": 30 * 8, "x": 6 * 8, "y": 4 * 8, "strength": 1.0}
    area = nodes.ConditioningSetArea().append(text(b, OTHER), **where)[0]
    inside = from_noise(patched, b, noise, positive=area)[..., 4:34, 6:42]
    alone = from_noise(patched, b, noise[..., 4:34, 6:42], positive=text(b, OTHER))
    both = nodes.ConditioningCombine().combine(text(b), area)[0]
    plain = from_noise(base, b, noise), from_noise(patched, b, noise)
    figures = agreement(
        (from_noise(base, b, noise, positive=both), from_noise(patched, b, noise, positive=both)), plain
    )
    figures["area against alone"] = error(inside, alone)
    assert figures["area against alone"] < 1e-5, figures
    return figures


def check_an_area_too_small_for_the_model(b: str) -> Any:
    """PixArt-Σ in ComfyUI cannot draw a mean side of 256 pixels or less, areas too: the message says so."""
    patched = apply(teacher(b), side(b))
    area = nodes.ConditioningSetArea().append(text(b), 16 * 8, 16 * 8, 0, 0, 1.0)[0]
    if b == "pixart_sigma":
        said = user_error("cannot draw 128x128 pixels", draw, patched, b, 1, positive=area)
        return {"said": said}
    drawn = draw(patched, b, 1, positive=area)
    assert torch.isfinite(drawn).all()
    return {"drawn, relative to the whole": error(drawn, draw(patched, b, 1))}


def check_percent_ranges_and_dense_lists(b: str) -> Any:
    """The linear layers run in the steps and the blocks asked for and in no others, also under a sampling shift."""
    base, w = teacher(b), side(b)
    blocks, steps, figures = sorted(w.sites), 4, {}

    def count(model: Any) -> dict[int, int]:
        calls = dict.fromkeys(blocks, 0)
        for held in model.get_additional_models_with_key("edit"):
            for block, sites in held.model.items():
                module = next(iter(sites.values()))
                module.register_forward_hook(lambda *_, block=int(block): calls.update({block: calls[block] + 1}))
        draw(model, b, steps)
        return calls

    def expected(model: Any, start: float, end: float) -> int:
        sampling = model.get_model_object("model_sampling")
        high, low = sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)
        sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULERS[b], steps)[:-1]
        return sum(low <= float(s) <= high for s in sigmas)

    def shifted(model: Any) -> Any:
        if b == "pixart_sigma":
            return stock("ModelSamplingDiscrete", "nodes_model_advanced.py", model=model, sampling="eps", zsnr=True)
        return stock("ModelSamplingSD3", "nodes_model_advanced.py", model=model, shift=3.0)

    for make in (lambda model: model, shifted):
        for start, end in ((0.0, 1.0), (0.0, 0.3), (0.3, 0.7), (0.7, 1.0), (0.5, 0.5)):
            model = make(apply(base, w, start_percent=start, end_percent=end))
            want = steps if (start, end) == (0.0, 1.0) else expected(model, start, end)
            got = count(model)
            assert set(got.values()) == {want}, (start, end, got, want)
            figures[f"{start:g}-{end:g}{' shifted' if make is shifted else ''}, steps of {steps}"] = want
    for layers, on in (("0", {0}), (f"1-{blocks[-1]}", set(blocks[1:])), (f"0, {blocks[-1]}", {0, blocks[-1]})):
        got = count(apply(base, w, layers=layers))
        assert got == {block: steps * (block in on) for block in blocks}, (layers, got)
        figures[f'layers "{layers}", calls'] = sum(got.values())
    whole = apply(apply(base, w, end_percent=0.4), w, start_percent=0.4, layers="0")
    got = count(whole)
    assert got[0] >= steps and 0 < got[1] < steps, got
    same(draw(base, b, 1), draw(teacher(b), b, 1), "the base afterwards")
    return figures


SCHEDULERS = {"pixart_sigma": "sgm_uniform", "sd35_medium": "normal"}


def check_easy_cache(b: str) -> Any:
    """ComfyUI's PixArt-Σ and SD3.5 do not call EasyCache: neither teacher nor student skip a step."""
    return cached(b, "EasyCache", reaches=False)


def check_lazy_cache(b: str) -> Any:
    """LazyCache skips steps of the student as of the teacher."""
    return cached(b, "LazyCache", reaches=True)


def cached(b: str, node: str, reaches: bool) -> dict[str, float]:
    base, w = teacher(b), side(b)
    inputs = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 1.0, "verbose": False}

    def make(model: Any) -> Any:
        return stock(node, "nodes_easycache.py", model=model, **inputs)

    how, figures = {"steps": 8}, {}
    patched = apply(base, w)
    for name, plain, quick in (("teacher", base, make(base)), ("student", patched, make(patched))):
        without = draw(plain, b, **how)
        with logged() as lines:
            got = draw(quick, b, **how)
        skipped = [int(match[1]) for line in lines if (match := re.search(r"skipped (\d+)/", line))]
        figures[f"steps of 8 skipped, {name}"] = sum(skipped)
        figures[f"difference, {name}"] = error(got, without)
        same(draw(plain, b, **how), without, f"{name} afterwards")
        if reaches:
            assert sum(skipped) > 0 and figures[f"difference, {name}"] > 0, figures
            # As alike in strength as agreement() asks; the direction is of a picture that fell apart.
            assert 1 / 5 < figures[f"difference, {name}"] / figures["difference, teacher"] < 5, figures
        else:
            assert not sum(skipped) and figures[f"difference, {name}"] == 0, figures
    same(draw(apply(make(base), w), b, **how), draw(make(patched), b, **how), f"{node} before and after EDiT")
    return figures


def check_odd_and_long_sizes(b: str) -> Any:
    """Sizes that are not square, and for SD3.5 odd ones, which it pads: the student stays near the teacher."""
    base = teacher(b)
    patched, trained = apply(base, side(b)), (40, 40)
    figures = {"as trained": error(draw(patched, b, 1, size=trained), draw(base, b, 1, size=trained))}
    for size in ((34, 36), (36, 34), (12, 54), (54, 12), (33, 39)):
        if b == "pixart_sigma" and size == (33, 39):
            user_error("multiples of 16", sample_world, patched, b, size)
            continue
        drawn = draw(patched, b, 1, size=size)
        assert drawn.shape[-2:] == size
        figures[f"{size[0]}x{size[1]}, student against teacher"] = error(drawn, draw(base, b, 1, size=size))
    # The worst of four or five is within half as much again of what the training left, and far from unrelated, at 1.
    assert max(figures.values()) < min(1.5 * figures["as trained"], 0.6), figures
    return figures


def sample_world(model: Any, b: str, size: tuple[int, int]) -> torch.Tensor:
    return draw(model, b, 1, size=size)


def check_controlnet(b: str) -> Any:
    """A ControlNet of SD3.5 through ComfyUI's loader and nodes changes the student as it changes the teacher."""
    if b != "sd35_medium":
        return {"not for this model": "ComfyUI has no ControlNet for PixArt-Σ"}
    # With random models, since a ControlNet takes the real width of the pooled text, which the small world lacks.
    folder = BASE / "models/controlnet"
    folder.mkdir(exist_ok=True)
    save_file(random_controlnet(), folder / "random.safetensors")
    control = nodes.ControlNetLoader().load_controlnet("random.safetensors")[0]
    vae = nodes.VAELoader().load_vae(f"edit_small_world_{b}_vae.safetensors")[0]
    image = torch.rand(1, SIZES[b][0] * 8, SIZES[b][1] * 8, 3, generator=torch.Generator().manual_seed(3))
    positive, negative = conditioning(7, 2), conditioning(5, 3)
    with torch.inference_mode():
        held, _ = nodes.ControlNetApplyAdvanced().apply_controlnet(
            positive, negative, control, image, 1.0, 0.0, 1.0, vae
        )  # fmt: skip
    base = load(b, "fp32")
    patched = apply(base, weights(b))
    plain = [draw(model, b, 2, positive=positive, negative=negative) for model in (base, patched)]
    of = [draw(model, b, 2, positive=held, negative=negative) for model in (base, patched)]
    figures = agreement((of[0], of[1]), (plain[0], plain[1]))
    same(draw(base, b, 2, positive=positive, negative=negative), plain[0], "the base afterwards")
    same(draw(patched, b, 2, positive=positive, negative=negative), plain[1], "the student afterwards")
    return figures


def random_controlnet() -> dict[str, torch.Tensor]:
    """Stability's format for SD3.5: a block that sees only the picture, for every block of the tiny base."""
    net = comfy.cldm.dit_embedder.ControlNetEmbedder(
        img_size=None, patch_size=2, in_chans=16, attention_head_dim=64, num_attention_heads=3, adm_in_channels=2048,
        num_layers=3, main_model_double=3, double_y_emb=False, device=None, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    g = torch.Generator().manual_seed(4)
    return {name: 0.05 * torch.randn(t.shape, generator=g) for name, t in net.state_dict().items()}
