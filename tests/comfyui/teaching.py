"""Checks of the nodes that train, measure and compare, on the shipped small world: `python teaching.py CHECKOUT ...`.

`test_teaching_comfyui.py` starts it once per ComfyUI, as `test_comfyui.py` does with `inside.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
from pathlib import Path
from typing import Any

from host import (  # first, since it readies ComfyUI to be imported
    SHIPPED,
    BASE,
    PACK,
    apply,
    error,
    load,
    lora_for,
    main,
    run,
    same,
    user_error,
    weights,
    with_lora,
)

import torch
from safetensors.torch import save_file

import comfy.model_management
import comfy.utils
import nodes

CAPTION = "a large red circle at the top left, in the bottom centre a small blue bar, on grey rows"
Interrupt = comfy.model_management.InterruptProcessingException


def as_in_a_server(check: Any) -> Any:
    """Runs a check in inference mode, as ComfyUI runs nodes: models and weights are loaded in it too."""

    def inside(b: str) -> Any:
        with torch.inference_mode():
            return check(b)

    return inside


def model(b: str, dtype: str = "fp32", student: bool = False) -> Any:
    name = f"edit_small_world_{b}"
    return load(name, dtype, f"{name}_student.safetensors" if student else "none")


def student(b: str) -> Any:
    return weights(f"edit_small_world_{b}_student")


def text(b: str, caption: str = CAPTION) -> Any:
    return nodes.CLIPTextEncode().encode(run("EDiTSmallWorldText", backbone=b), caption)[0]


def empty(b: str, height: int = 34, width: int = 36, batch: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, {"pixart_sigma": 4, "sd35_medium": 16}[b], height, width)}


def fresh(m: Any, **inputs: Any) -> Any:
    return run("EDiTInit", model=m, **{"compression": 4, "layers": "all", **inputs})


def calibrate(b: str, m: Any, w: Any, **inputs: Any) -> Any:
    defaults = {"positive": text(b), "negative": text(b, ""), "latent": empty(b), "steps": 6, "lr": 0.005, "seed": 1}
    return run("EDiTCalibrate", model=m, edit_weights=w, **{**defaults, **inputs})


def report(b: str, m: Any, w: Any, **inputs: Any) -> Any:
    defaults = {"conditioning": text(b), "latent": empty(b), "threshold": 0.1}
    return nodes.NODE_CLASS_MAPPINGS["EDiTLayerReport"].execute(model=m, edit_weights=w, **{**defaults, **inputs})


def errors(b: str, m: Any, w: Any) -> dict[str, float]:
    return module("report").attention_errors(m, w, text(b), empty(b))


def module(name: str) -> Any:
    """One of the pack's modules, as ComfyUI loaded it."""
    package = nodes.NODE_CLASS_MAPPINGS["EDiTApply"].__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.{name}")


def draw(b: str, m: Any) -> torch.Tensor:
    return nodes.common_ksampler(m, 1, 2, 3.0, "euler", "simple", text(b), text(b, ""), empty(b))[0]["samples"]


State = dict[str, tuple[torch.Tensor, bool]]


def state(m: Any) -> State:
    """The base's weights, and whether they may have gradients, which differs between versions of ComfyUI."""
    return {name: (value.clone(), value.requires_grad) for name, value in m.model.state_dict(keep_vars=True).items()}


def untouched(m: Any, before: State) -> None:
    after = state(m)
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name][0]) for name, (value, _) in before.items()), "the base's weights changed"
    assert all(flag == after[name][1] for name, (_, flag) in before.items()), "gradients stay on or off"
    for layer in m.model.modules():
        assert "forward" not in layer.__dict__, f"a replaced forward was left behind in {type(layer).__name__}"
    assert all(p.grad is None for p in m.model.parameters()), "gradients were left behind"


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


@contextlib.contextmanager
def progress(stop_at: int = -1):
    """What a server would be told; it interrupts after so many steps."""
    seen: list[tuple[int, int, Any]] = []

    def hook(value: int, total: int, preview: Any, **_: Any) -> None:
        seen.append((value, total, preview))
        if 0 <= stop_at <= value:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(hook)
    # Newer versions leave out steps that follow fast.
    comfy.utils.PROGRESS_THROTTLE_MIN_INTERVAL = comfy.utils.PROGRESS_THROTTLE_MIN_PERCENT = 0
    try:
        yield seen
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


# --- checks: each runs for both backbones -----------------------------------------------------------------------------


@as_in_a_server
def check_calibrating_lowers_the_errors_and_leaves_the_base_bit_equal(b: str) -> Any:
    m = model(b)
    w = fresh(m)
    plain, kept, before = draw(b, m), {n: t.clone() for n, t in w.tensors.items()}, state(m)
    with progress() as seen:
        trained = calibrate(b, m, w, steps=20)
    untouched(m, before)
    same(draw(b, m), plain, "base after a calibration")
    assert all(torch.equal(t, kept[n]) for n, t in w.tensors.items()), "the weights that came in were changed"
    assert trained is not w and trained.tensors.keys() == w.tensors.keys()
    for tensor in trained.tensors.values():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad and tensor.device.type == "cpu"
    values = [value for value, _, _ in seen]
    assert values == sorted(set(values)) and values[-1] == 20 and {total for _, total, _ in seen} == {20}
    kind, picture, _ = seen[-1][2]
    assert kind == "JPEG" and picture.size == (960, 540)
    assert error(draw(b, apply(m, trained)), plain) < error(draw(b, apply(m, w)), plain)
    figures = {"before": mean(errors(b, m, w)), "after": mean(errors(b, m, trained))}
    assert figures["after"] < 0.9 * figures["before"], figures
    assert trained.training["steps"] == 20 and trained.training["recipe"] == {
        "calibrate": {"lr": 0.005, "guidance": 4.5}
    }
    run("EDiTSaveWeights", edit_weights=trained, filename_prefix=f"calibrated_{b}")
    again = weights(f"calibrated_{b}_00001_")
    assert all(torch.equal(t, again.tensors[n]) for n, t in trained.tensors.items())
    return figures


@as_in_a_server
def check_calibrating_is_repeatable_and_hears_its_inputs(b: str) -> Any:
    m = model(b)
    w = fresh(m)
    first = calibrate(b, m, w, steps=3).tensors
    again = calibrate(b, m, w, steps=3).tensors
    assert all(torch.equal(t, again[n]) for n, t in first.items())
    for other in ({"seed": 2}, {"positive": text(b, "a small blue bar")}, {"lr": 0.001}, {"negative": text(b, "red")}):
        tensors = calibrate(b, m, w, steps=3, **other).tensors
        assert any(not torch.equal(t, tensors[n]) for n, t in first.items()), other
    calibrate(b, m, w, steps=2, latent=empty(b, 36, 34, batch=2), seed=2**64 - 1)


@as_in_a_server
def check_weights_that_change_the_base_are_calibrated_as_a_whole(b: str) -> Any:
    """The shipped students have differences on the base's linears; a few steps must reach them, and do good."""
    m, w = model(b), student(b)
    plain, before = draw(b, m), state(m)
    changed = {n for n in w.tensors if n.startswith("base.")}
    assert changed
    trained = calibrate(b, m, w, steps=12, lr=0.002)
    untouched(m, before)
    same(draw(b, m), plain, "base")
    unmoved = [n for n in w.tensors if torch.equal(w.tensors[n].float(), trained.tensors[n])]
    assert not unmoved, unmoved
    figures = {"before": mean(errors(b, m, w)), "after": mean(errors(b, m, trained))}
    assert figures["after"] < figures["before"], figures
    return figures


@as_in_a_server
def check_gradients_are_those_of_autograd(b: str) -> Any:
    """A frozen linear's way back, which never sees the weight, against the weight."""
    frozen, g = module("teacher")._FrozenLinear, torch.Generator().manual_seed(0)
    figures = {}
    with torch.inference_mode(False), torch.enable_grad():
        weight, bias = 0.03 * torch.randn(40, 24, generator=g), torch.randn(40, generator=g)
        x, pull = torch.randn(2, 5, 24, generator=g), torch.randn(2, 5, 40, generator=g)
        expected = pull @ weight
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.02)):
            cast = weight.to(dtype), bias.to(dtype)
            own = x.detach().clone().to(dtype).requires_grad_()
            frozen.apply(own, lambda t, cast=cast: torch.nn.functional.linear(t, *cast)).backward(pull.to(dtype))
            figures[str(dtype)] = error(own.grad, expected)
            assert figures[str(dtype)] < limit, figures
    return figures


@as_in_a_server
def check_low_precision_teachers_can_be_calibrated(b: str) -> Any:
    figures: dict[str, Any] = {}
    for dtype in ("fp16", "fp8_e4m3fn"):
        m = model(b, dtype)
        w, plain, before = fresh(m), draw(b, m), state(m)
        trained = calibrate(b, m, w, steps=10)
        untouched(m, before)
        same(draw(b, m), plain, f"{dtype} base")
        figures[dtype] = mean(errors(b, m, w)), mean(errors(b, m, trained))
        assert figures[dtype][1] < 0.95 * figures[dtype][0], figures
    return figures


@as_in_a_server
def check_a_teacher_with_a_lora_stays_one(b: str) -> Any:
    m = model(b)
    w, tuned = fresh(m), with_lora(m, lora_for(m))
    plain, before = draw(b, m), draw(b, tuned)
    trained = calibrate(b, tuned, w, steps=6)
    same(draw(b, tuned), before, "the teacher with its LoRA")
    same(draw(b, m), plain, "the teacher without")
    figures = {"before": mean(errors(b, tuned, w)), "after": mean(errors(b, tuned, trained))}
    assert figures["after"] < figures["before"], figures
    return figures


@as_in_a_server
def check_interrupting_leaves_everything_as_it_was(b: str) -> Any:
    m = model(b)
    w = fresh(m)
    plain, kept, before = draw(b, m), {n: t.clone() for n, t in w.tensors.items()}, state(m)
    calls = [
        lambda: calibrate(b, m, w, steps=50),
        lambda: report(b, m, w),
        lambda: run("EDiTBenchmark", model_a=m, model_b=apply(m, w), sizes="288", repeats=9),
    ]
    for call in calls:
        with progress(stop_at=3) as seen:
            try:
                call()
            except Interrupt:
                pass
            else:
                raise AssertionError("not interrupted")
        assert sum(value >= 3 for value, _, _ in seen) == 1, "it went on after it was told to stop"
        untouched(m, before)
        same(draw(b, m), plain, "base after an interrupt")
    assert all(torch.equal(t, kept[n]) for n, t in w.tensors.items()), "the weights that came in were changed"
    assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    calibrate(b, m, w, steps=1)  # and all is ready for the next run


@as_in_a_server
def check_interrupting_stops_in_the_midst_of_a_step(b: str) -> Any:
    m = model(b)
    w, before, calls = fresh(m), state(m), []
    path = {"pixart_sigma": "blocks.1", "sd35_medium": "joint_blocks.1"}[b]
    block = comfy.utils.get_attr(m.model.diffusion_model, path)

    def stop(*_: Any) -> None:
        calls.append(1)
        comfy.model_management.interrupt_current_processing()

    handle = block.register_forward_pre_hook(stop)
    try:
        calibrate(b, m, w, steps=5)
    except Interrupt:
        pass
    else:
        raise AssertionError("not interrupted")
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == 1
    untouched(m, before)


@as_in_a_server
def check_report_measures_what_diffusers_does(b: str) -> Any:
    """Saves every call of the model and the errors; the outer test measures the same calls with diffusers."""
    m, w = model(b), student(b)
    plain, before, calls = draw(b, m), state(m), {}

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        found = {"x": args[0], "t": args[1], **{k: v for k, v in kwargs.items() if k in ("context", "y")}}
        number = len({name.split(".")[0] for name in calls})
        calls.update({f"{number}.{k}": v.clone().contiguous() for k, v in found.items() if torch.is_tensor(v)})

    handle = m.model.diffusion_model.register_forward_hook(hook, with_kwargs=True)
    found = errors(b, m, w)
    handle.remove()
    save_file(calls, BASE / f"{b}-report.safetensors")
    (BASE / f"{b}-report.json").write_text(json.dumps(found))
    untouched(m, before)
    same(draw(b, m), plain, "base after a report")
    return found


@as_in_a_server
def check_report_draws_a_chart_and_suggests_layers(b: str) -> Any:
    m, w = model(b), student(b)
    found = errors(b, m, w)
    worst = {
        int(k.split(".")[0]): max(v for o, v in found.items() if o.split(".")[0] == k.split(".")[0]) for k in found
    }
    assert set(worst) == set(w.sites)
    cut = sorted(worst.values())[len(worst) // 2]
    texts = {}
    for threshold, blocks in (
        (1000.0, sorted(worst)),
        (cut, sorted(k for k, v in worst.items() if v <= cut)),
        (0.0, []),
    ):
        result = report(b, m, w, threshold=threshold)
        chart, layers = result.args
        texts[threshold] = layers
        assert chart.shape == (1, 540, 960, 3) and 0 <= chart.min() < 0.5 < chart.max() <= 1
        assert w.choose(layers, module("patcher").identify_model(m)) == tuple(blocks), (layers, blocks)
        assert result.ui["text"] == (f"layers: {layers}",) and len(result.ui["images"]) == 1
        draw(b, apply(m, w, layers=layers))
    assert module("report").suggest_layers({"0.joint": 0.1, "0.self": math.nan, "1.joint": 0.1}, 0.1) == "1"
    # The errors of the small SD3.5 after 100 steps, whose block 1 spoils the picture: see the default's own comment.
    calibrated = {"0.joint": 0.1535, "0.self": 0.1756, "1.joint": 0.1293, "1.self": 0.3374, "2.joint": 0.1062}
    (default,) = (s.default for s in module("report").EDiTLayerReport.define_schema().inputs if s.id == "threshold")
    assert module("report").suggest_layers(calibrated, default) == "0, 2"
    some = report(b, m, fresh(m, layers="1"), threshold=1000.0).args[1]
    assert some == "1", "blocks without weights cannot be linear"
    return texts


@as_in_a_server
def check_apply_tells_the_page_how_many_blocks_are_linear(b: str) -> Any:
    """For the badge and the layer picker; of all such nodes in a chain, since it is the model's badge."""
    m, w = model(b), student(b)
    depth, found = module("patcher").identify_model(m).depth, {}
    one, first_two = apply_result(m, w, "0"), apply_result(m, w, "0-1")
    two, chained = apply_result(one.args[0], w, "2"), apply_result(first_two.args[0], w, "1-2")
    results = {"0": one, "0-1": first_two, "0, 2": two, "0-2": chained, "none": apply_result(m, w, "none")}
    for layers, wanted in (("0", 1), ("0-1", 2), ("0, 2", 2), ("0-2", 3), ("none", 0)):
        found[layers] = results[layers].ui["edit_blocks"]
        assert found[layers] == [wanted, depth], (layers, found)
    return json.dumps(found)


@as_in_a_server
def check_init_tells_the_page_how_many_blocks_there_are(b: str) -> Any:
    """For the layer picker, which would otherwise go on showing PixArt-Σ's number."""
    m = model(b)
    depth = module("patcher").identify_model(m).depth
    result = nodes.NODE_CLASS_MAPPINGS["EDiTInit"].execute(model=m, compression=4, layers="1")
    assert result.ui["edit_blocks"] == [1, depth]
    return depth


def apply_result(m: Any, w: Any, layers: str) -> Any:
    inputs = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0}
    return nodes.NODE_CLASS_MAPPINGS["EDiTApply"].execute(model=m, edit_weights=w, layers=layers, **inputs)


@as_in_a_server
def check_report_tells_the_page_every_blocks_worst_error(b: str) -> Any:
    """For the colours of the layer pickers; null for a block that has no weights, or whose error is not finite."""
    m = model(b)
    w, depth = fresh(m, layers="1"), module("patcher").identify_model(m).depth
    told = report(b, m, w).ui["block_errors"]
    measured = errors(b, m, w)
    assert told == [max(measured.values()) if block == 1 else None for block in range(depth)], (told, measured)
    of = module("report").block_errors
    assert of({"0.joint": 0.1, "0.self": 0.3, "1.joint": math.inf, "2.self": math.nan}, 4) == [0.3, None, None, None]
    return json.dumps(told, allow_nan=False)


@as_in_a_server
def check_benchmark_names_both_and_every_size(b: str) -> Any:
    m = model(b)
    patched = apply(m, student(b))
    plain, edit = draw(b, m), draw(b, patched)
    with progress() as seen:
        result = nodes.NODE_CLASS_MAPPINGS["EDiTBenchmark"].execute(
            model_a=m, model_b=patched, sizes=" 320,288,  320", repeats=2
        )
    chart, table = result.args
    assert chart.shape == (1, 540, 960, 3) and chart.std() > 0.05
    assert "| model a, s per call | model b, s per call |" in table.replace("  ", " ")
    assert table.index("| 288² | 324 |") < table.index("| 320² | 400 |") and table.count("×") == 2
    assert seen[-1][:2] == (12, 12), "two sizes, three turns, two models"
    same(draw(b, m), plain, "model a")
    same(draw(b, patched), edit, "model b")
    assert result.ui["text"] == (table,)
    return table


@as_in_a_server
def check_benchmark_takes_widths_from_the_layers(b: str) -> Any:
    """A GGUF base's state has packed weights in it, here the bytes of the prompt's embedder, as of one in bfloat16."""
    m = model(b)
    name = {"pixart_sigma": "y_embedder.y_proj.fc1", "sd35_medium": "context_embedder"}[b]
    layer = m.get_model_object(f"diffusion_model.{name}")
    packed = lambda _, state, prefix, *__: state.update(  # noqa: E731
        {f"{prefix}weight": state[f"{prefix}weight"].view(torch.uint8)}
    )
    handle = layer.register_state_dict_post_hook(packed)
    try:
        ((prompt, extra),), _ = module("benchmark").random_inputs(m, module("patcher").identify_model(m).backbone, 288)
    finally:
        handle.remove()
    assert prompt.shape[-1] == layer.in_features
    return {name: list(value.shape) for name, value in {"prompt": prompt, **extra}.items()}


@as_in_a_server
def check_compare_gives_the_functions_figures(b: str) -> Any:
    g = torch.Generator().manual_seed(0)
    a = (torch.rand(2, 40, 50, 3, generator=g) * 255).round() / 255
    other = ((a + 0.1 * torch.rand(a.shape, generator=g)).clamp(0, 1) * 255).round() / 255
    result = nodes.NODE_CLASS_MAPPINGS["EDiTCompare"].execute(image_a=a, image_b=other, gain=2.0)
    difference, psnr, ssim, said = result.args
    same(difference, ((a - other).abs() * 2).clamp(0, 1), "difference")
    save_file({"a": (a * 255).byte(), "b": (other * 255).round().byte()}, BASE / f"{b}-compare.safetensors")
    (BASE / f"{b}-compare.json").write_text(json.dumps({"psnr": psnr, "ssim": ssim}))
    assert said == f"PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" and result.ui["text"] == (said,)
    assert [len(result.ui[k]) for k in ("images", "a_images", "b_images")] == [4, 2, 2]
    for shown in result.ui["images"]:
        assert shown["type"] == "temp" and shown["filename"].endswith(".png")
    equal = nodes.NODE_CLASS_MAPPINGS["EDiTCompare"].execute(image_a=a, image_b=a, gain=4.0).args
    assert equal[0].max() == 0 and equal[1] == math.inf and abs(equal[2] - 1) < 1e-9
    with_alpha = torch.cat([a, torch.rand(2, 40, 50, 1, generator=g)], -1)
    again = nodes.NODE_CLASS_MAPPINGS["EDiTCompare"].execute(image_a=with_alpha, image_b=with_alpha, gain=4.0).args
    assert again[0].shape == a.shape
    said = [
        user_error("of one size", run, "EDiTCompare", image_a=a, image_b=a[:, :30], gain=4.0),
        user_error("of one size", run, "EDiTCompare", image_a=a, image_b=a[:1], gain=4.0),
        user_error("6 pixels or more", run, "EDiTCompare", image_a=a[:, :5], image_b=a[:, :5], gain=4.0),
    ]
    assert not any("\n" in line for line in said)
    return said


@as_in_a_server
def check_bad_input_is_one_sentence(b: str) -> Any:
    m = model(b)
    w, other = fresh(m), SHIPPED[1 - SHIPPED.index(b)]
    plain = draw(b, m)
    wrong_latent = {"samples": torch.ones(1, 7, 34, 36)}
    said = []
    for call in (calibrate, report):
        said += [
            user_error("but the model is", call, b, m, student(other)),
            user_error("before EDiTApply", call, b, apply(m, w), w),
            user_error("connect an empty latent", call, b, m, w, latent=wrong_latent),
        ]
        if b == "pixart_sigma":
            said.append(user_error("over 256", call, b, m, w, latent=empty(b, 16, 16)))
    call(b, m, w, latent=empty(other))  # an empty one for another model is made to fit, as KSampler does
    said.append(user_error("lr: 1e+30 is not between 1e-06 and 1.0", calibrate, b, m, w, lr=1e30, steps=9))
    benchmark = {"model_a": m, "model_b": m, "repeats": 1}
    check = nodes.NODE_CLASS_MAPPINGS["EDiTBenchmark"].validate_inputs
    assert check(sizes="512, 1024") is True and check(sizes=None) is True
    for sizes in (
        "",
        "512;1024",
        "500",
        "-512",
        "0",
        "100000",
        "512,",
        "²",
        ", ".join(str(16 * i) for i in range(1, 30)),
    ):
        line = user_error("sizes", run, "EDiTBenchmark", sizes=sizes, **benchmark)
        assert check(sizes=sizes) == line
        said.append(line)
    if b == "pixart_sigma":
        said.append(user_error("over 256", run, "EDiTBenchmark", sizes="64", **benchmark))
    same(draw(b, m), plain, "base after the errors")
    assert not any("\n" in line for line in said)
    return said


def check_every_node_is_explained(b: str) -> Any:
    """Tooltips on all inputs and outputs, and a help page where ComfyUI looks for one, which names them."""
    ours = {name: node for name, node in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("EDiT")}
    folders = [folder for folder in nodes.EXTENSION_WEB_DIRS.values() if Path(folder) == PACK / "web"]
    assert len(ours) == 10 and len(folders) == 1, (sorted(ours), nodes.EXTENSION_WEB_DIRS)
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (PACK / "web" / "docs").glob("*.md")}
    assert pages.keys() == ours.keys()
    for name, node in ours.items():
        schema = node.GET_SCHEMA()
        assert pages[name].startswith(f"# {schema.display_name}\n"), name
        assert schema.description and schema.category == "EDiT"
        for socket in (*schema.inputs, *schema.outputs):
            assert socket.tooltip, (name, socket)
        for socket in schema.inputs:
            assert f"| `{socket.id}` |" in pages[name], (name, socket.id)
        for socket in schema.outputs:
            assert f"`{socket.display_name}`" in pages[name], (name, socket.display_name)
    return sorted(ours)


main({**globals()})  # a copy, since a warning adds to the names
