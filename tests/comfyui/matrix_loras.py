"""Cells of the composition matrix: LoRAs on the base, in every order, and switched by the schedule."""

from __future__ import annotations

from typing import Any

from host import BASE, apply, error, lora_for, merged, same, with_lora
from matrix_host import AGREE, agreement, composes, cosine, draw, side, stock, teacher, text
from safetensors.torch import save_file

HOOKS = "nodes_hooks.py"


def second(lora: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.flip(0) for name, tensor in lora.items()}


def check_lora(b: str) -> Any:
    """A LoRA before or after EDiT does to the student what it does to the teacher, and equals one merged by hand."""
    lora = lora_for(teacher(b))
    figures = composes(b, lambda model: with_lora(model, lora))
    by_hand = draw(apply(merged(teacher(b), lora), side(b)), b)
    figures["against merged by hand"] = error(draw(with_lora(apply(teacher(b), side(b)), lora), b), by_hand)
    assert figures["against merged by hand"] < 1e-4, figures
    return figures


def check_two_loras(b: str) -> Any:
    """Two LoRAs, around EDiT and both behind it, give one picture, which is neither LoRA's alone."""
    base, w = teacher(b), side(b)
    one = lora_for(base)
    two = second(one)
    figures = composes(b, lambda model: with_lora(with_lora(model, one), two))
    behind = draw(with_lora(with_lora(apply(base, w), one), two), b)
    around = draw(with_lora(apply(with_lora(base, two), w), one), b)
    figures["around against behind"] = error(around, behind)
    assert figures["around against behind"] < 1e-4, figures
    for lora in (one, two):
        assert error(draw(with_lora(apply(base, w), lora), b), behind) > 1e-3
    return figures


def hooked(name: str, *keyframes: tuple[float, float]) -> Any:
    """A LoRA file as a hook; keyframes are (strength, from which percent on)."""
    hooks = stock("CreateHookLoraModelOnly", HOOKS, lora_name=name, strength_model=1.0)
    frames = None
    for strength, start in keyframes:
        frames = stock("CreateHookKeyframe", HOOKS, strength_mult=strength, start_percent=start, prev_hook_kf=frames)
    return stock("SetHookKeyframes", HOOKS, hooks=hooks, hook_kf=frames)


def check_lora_with_schedule_hooks(b: str) -> Any:
    """A LoRA that hooks switch on half way: as in the teacher; always on it is the LoRA, always off nothing."""
    base, w = teacher(b), side(b)
    patched, lora = apply(base, w), lora_for(base)
    folder = BASE / "models/loras"
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in lora.items()}, folder / f"{b}.safetensors")

    def with_hooks(*keyframes: tuple[float, float]) -> Any:
        hooks = hooked(f"{b}.safetensors", *keyframes)
        return stock(
            "ConditioningSetProperties", HOOKS, cond_NEW=text(b), strength=1.0, set_cond_area="default", hooks=hooks
        )

    how = {"steps": 4}
    plain = draw(base, b, **how), draw(patched, b, **how)
    late = with_hooks((0.0, 0.0), (1.0, 0.5))
    switched = draw(base, b, positive=late, **how), draw(patched, b, positive=late, **how)
    figures = agreement(switched, plain)
    whole = draw(with_lora(patched, lora), b, **how)
    figures["always on, against the LoRA"] = error(draw(patched, b, positive=with_hooks((1.0, 0.0)), **how), whole)
    figures["always off, against none"] = error(draw(patched, b, positive=with_hooks((0.0, 0.0)), **how), plain[1])
    figures["half way, against the LoRA"] = error(switched[1], whole)
    assert figures["always on, against the LoRA"] < 1e-4 and figures["always off, against none"] < 1e-6, figures
    assert figures["half way, against the LoRA"] > 1e-3, figures
    same(draw(patched, b, **how), plain[1], "the student afterwards")
    same(draw(base, b, **how), plain[0], "the base afterwards")
    return figures


def kept(b: str, lora: Any, wanted: Any, models: tuple[Any, Any], kind: str) -> dict[str, float]:
    """What rounded weights leave of a LoRA's change: its cosine with the wanted one, of a teacher and of its student.

    Args:
        wanted: of teacher and student in float32, what they draw with the LoRA and without.
    """
    found = []
    for (tuned, plain), model in zip(wanted, models, strict=True):
        found.append(cosine(draw(with_lora(model, lora), b) - draw(model, b), tuned - plain))
    figures = {f"{kind}, a LoRA on the teacher": found[0], f"{kind}, a LoRA on the student": found[1]}
    # A cosine c says that rounding's noise is 1/c² - 1 of the change squared. A teacher without the LoRA is not rounded
    # anew, a student is, with its differences: twice the noise, and a little for that it is another function.
    assert found[1] > (1 + 2 * (found[0] ** -2 - 1)) ** -0.5 - 0.05, figures
    assert found[1] > AGREE, figures
    return figures


def check_lora_on_low_precision_bases(b: str) -> Any:
    """A LoRA on float16, bfloat16 and float8 bases changes the student as it changes a float32 one; the cosine of both
    changes, and the teacher's. Float8's rounding of the sum of both is as large as the LoRA."""
    figures = {}
    lora = lora_for(teacher(b), {"pixart_sigma": 0.05, "sd35_medium": 0.1}[b])
    full = teacher(b), apply(teacher(b), side(b))
    wanted = [(draw(with_lora(model, lora), b), draw(model, b)) for model in full]
    for dtype in ("fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2"):
        base = teacher(b, dtype)
        before = draw(base, b)
        figures |= kept(b, lora, wanted, (base, apply(base, side(b))), dtype)
        same(draw(base, b), before, f"{dtype} base afterwards")
    return figures
