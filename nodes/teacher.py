"""A MODEL as a teacher: it draws as in any sampling, and each of its attentions is compared with a student's.

The student's modules are our own, for as long as a drawing lasts, and never reach the MODEL: its blocks' forwards are
replaced as an applied EDiT's are, run as they were, and are put back. What is trained is float32; the layers of the
base are only called, since their weights may be quantised, or inference tensors, which autograd cannot save.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor, nn

from ..edit_core import EDiTError, EDiTWeights
from ..edit_core.attention import softmax_attention
from ..edit_core.backbones import Base, HostCall
from ..edit_core.distill.losses import TransferTap
from ..edit_core.distill.transfer import frozen
from ..edit_core.weights.differences import PREFIX
from .patcher import KEY, compute_dtype, identify_model, replace_forward

__all__ = ["Student", "Teacher", "sample_with"]

T = TypeVar("T")

_UNIT = 64.0  # within fp8's range too


class Teacher:
    """A loaded model in the midst of a sampling.

    Args:
        guider: ComfyUI's, which knows the conditioning.
        sigmas: `(steps + 1,)`, from noise down to 0.
        latent: `(B, c, h, w)`, what noise is added to.
        options: what ComfyUI hands to every call.
    """

    def __init__(self, guider: Any, sigmas: Tensor, latent: Tensor, options: Mapping[str, Any]) -> None:
        self._guider, self._options = guider, options
        self.sigmas, self.latent = sigmas, latent

    def call(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The denoised latent of `(B, c, h, w)` at one sigma, guided as the sampling is."""
        with torch.no_grad():
            return self._guider(x, sigma * x.new_ones(len(x)), **self._options)

    def noised(self, seed: int) -> Tensor:
        """The latent at the first sigma, `(B, c, h, w)`."""
        noise = comfy.sample.prepare_noise(self.latent, seed % 2**64).to(self.latent)
        return self._guider.inner_model.model_sampling.noise_scaling(self.sigmas[0], noise, self.latent, True)

    def draw(self, seed: int) -> Iterator[None]:
        """Samples for ever, picture after picture, by Euler's method; every `next` is one step of the sampling."""
        for picture in itertools.count():
            x = self.noised(seed + picture)
            for sigma, following in itertools.pairwise(self.sigmas):
                comfy.model_management.throw_exception_if_processing_interrupted()
                x = x + (x - self.call(x, sigma)) / sigma * (following - sigma)  # (B, c, h, w)
                yield

    def make_room(self, size: int) -> None:
        """Has ComfyUI unload models that this sampling does not use, until `size` bytes are free on its device."""
        used = (self._guider.model_patcher, *self._guider.loaded_models)
        management = comfy.model_management
        kept = [loaded for loaded in management.current_loaded_models if loaded.model in used]
        management.free_memory(size, self.latent.device, keep_loaded=kept)


class _Sampler(comfy.samplers.Sampler):
    """Hands the loaded model on instead of sampling with it."""

    def __init__(self, use: Callable[[Teacher], Any]) -> None:
        self.use = use
        self.result: Any = None

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor,
        latent_image: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        self.result = self.use(Teacher(model_wrap, sigmas, latent_image, extra_args))
        return latent_image


def sample_with(
    model: Any, conds: Mapping[str, Any], cfg: float, latent: Tensor, steps: int, use: Callable[[Teacher], T]
) -> T:
    """Readies a MODEL as for a sampling, ControlNets, hooks and all, and gives what `use` makes of it.

    Args:
        model: the MODEL.
        conds: CONDITIONINGs, by `positive` and `negative`.
        cfg: of the guidance; at 1 the negative one is not used.
        latent: `(B, c, h, w)`.
        steps: of the schedule.
        use: is called once, with the model loaded and injected.
    """
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(dict(conds))
    guider.set_cfg(cfg)
    sampler = _Sampler(use)
    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, disable_pbar=True, seed=0)
    return sampler.result


class Student:
    """A student beside the attentions of a MODEL that goes on as the teacher.

    Args:
        model: the teacher.
        weights: the student's; not changed.
        latent: a LATENT, what noise is added to. An empty one for another model is made to fit, as KSampler does.

    Raises:
        EDiTError: EDiT is applied to the model, the weights do not fit it, or it cannot draw this latent.
    """

    def __init__(self, model: Any, weights: EDiTWeights, latent: Mapping[str, Any]) -> None:
        self.base = identify_model(model)
        if model.get_injections(KEY):
            raise EDiTError("EDiT is applied to this model already; connect the model from before EDiTApply")
        self.latent = comfy.sample.fix_empty_latent_channels(model, latent["samples"])  # (B, c, h, w)
        channels = model.get_model_object("latent_format").latent_channels
        if self.latent.ndim != 4 or self.latent.shape[1] != channels:
            raise EDiTError(
                f"{self.base.backbone.title} draws latents of {channels} channels, and this one is "
                f"{'x'.join(map(str, self.latent.shape))}; connect an empty latent"
            )
        self.blocks = weights.choose("all", self.base)
        self.model, self.weights, self.dtype = model, weights, compute_dtype(model)
        self.grid = self.base.backbone.comfy_grid(*self.latent.shape[-2:])
        self.tap: TransferTap | None = None
        """Is given every attention's outputs, the teacher's and the student's on the same inputs; None for neither."""

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[dict[str, nn.Parameter]]:
        """Puts the student beside the loaded model; gives its parameters, float32, by their names in a weights file."""
        sides, state = self.weights.build(self.blocks, device=device, dtype=torch.float32)
        sides.load_state_dict(state)
        differences = self.weights.build_differences(self.blocks, device, torch.float32)
        changes = {
            f"{PREFIX}{path}.{name}": parameter
            for path, module in differences.items()
            for name, parameter in module.named_parameters()
        }
        diffusion_model = self.model.get_model_object("diffusion_model")
        with ExitStack() as stack:
            stack.enter_context(frozen(diffusion_model))
            for number in self.blocks:
                block = _Block(self.base, number, diffusion_model, sides[str(number)], differences)
                forward = partial(self._forward, block, block.module.forward, device)
                stack.callback(replace_forward(block.module, forward))
            yield {**dict(sides.named_parameters()), **changes}

    def _forward(
        self, block: _Block, original: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any
    ) -> Any:
        comfy.model_management.throw_exception_if_processing_interrupted()
        backbone, tap = self.base.backbone, self.tap
        # Another pack may have put tokens beside the picture's.
        if tap is None or backbone.comfy_image_tokens(*args, **kwargs) != math.prod(self.grid):
            return original(*args, **kwargs)
        with block.heard(follow=False) as teacher:
            output = original(*args, **kwargs)
        autocast = torch.autocast(device.type, self.dtype, self.dtype != torch.float32)
        with block.heard(follow=True) as student, torch.set_grad_enabled(tap.backward is not None), autocast:
            backbone.comfy_forward(block.module, block.sides, HostCall(self.grid, _softmax), *args, **kwargs)
        for site, paths in block.outputs.items():
            tap(f"{block.number}.{site}", partial(_rows, teacher, paths), partial(_rows, student, paths))
        return output


class _Block:
    """One block's attentions: their own linears and norms, and the student's modules.

    Args:
        base: what the model is.
        number: of the block.
        diffusion_model: ComfyUI's.
        sides: the student's modules of this block, by site.
        differences: the student's, by diffusers path.
    """

    def __init__(
        self, base: Base, number: int, diffusion_model: nn.Module, sides: Any, differences: Mapping[str, nn.Module]
    ) -> None:
        self.number, self.sides = number, sides
        self.module = comfy.utils.get_attr(diffusion_model, base.backbone.comfy_path(number))
        linears = base.linears(number)
        self.outputs = {
            site: [x.diffusers for x in base.backbone.linears(number, site) if x.part is None and x in linears]
            for site in base.sites[number]
        }
        """By site, the diffusers paths of its output projections: the image's, and for a joint one the prompt's."""
        self._linears: list[tuple[nn.Module, str | None, dict[int | None, nn.Module]]] = []
        for path in dict.fromkeys(linear.comfy for linear in linears):
            own = [linear for linear in linears if linear.comfy == path]
            output = own[0].diffusers if own[0].part is None else None
            changes = {x.part: differences[x.diffusers] for x in own if x.diffusers in differences}
            self._linears.append((comfy.utils.get_attr(diffusion_model, path), output, changes))
        attentions = dict.fromkeys(linear.comfy.rpartition(".")[0] for linear in linears)
        own_linears = [layer for layer, _, _ in self._linears]
        self._norms = [
            (layer, copy.deepcopy(layer))
            for path in attentions
            for layer in comfy.utils.get_attr(diffusion_model, path).children()
            if layer not in own_linears and any(True for _ in layer.parameters())
        ]
        """With copies, since a gradient goes through them; they have a few numbers each."""

    @contextmanager
    def heard(self, follow: bool) -> Iterator[dict[str, Tensor]]:
        """Collects what the output projections give, `(B, N, C)` by diffusers path, while this lasts.

        Args:
            follow: whether the linears have the student's differences, and gradients a way back.
        """
        rows: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for layer, output, changes in self._linears:
                if follow:
                    forward: Callable[..., Tensor] = partial(_follow, layer.forward, output, changes, rows)
                elif output is not None:
                    forward = partial(_note, layer.forward, output, rows)
                else:
                    continue
                stack.callback(replace_forward(layer, forward))
            for layer, own in self._norms if follow else ():
                stack.callback(replace_forward(layer, own.forward))
            yield rows


def _note(forward: Callable[[Tensor], Tensor], output: str, rows: dict[str, Tensor], x: Tensor) -> Tensor:
    rows[output] = forward(x)
    return rows[output]


def _follow(
    forward: Callable[[Tensor], Tensor],
    output: str | None,
    changes: Mapping[int | None, nn.Module],
    rows: dict[str, Tensor],
    x: Tensor,
) -> Tensor:
    """A linear of the student's, `(B, N, C)` -> `(B, N, C)`, or thrice as wide for a fused one."""
    y: Tensor = _FrozenLinear.apply(x, forward)  # type: ignore[no-untyped-call] # PyTorch's
    if None in changes:
        y = y + changes[None](x)
    elif changes:
        thirds = y.chunk(3, -1)
        y = torch.cat([t + changes[i](x) if i in changes else t for i, t in enumerate(thirds)], -1)
    if output is None:
        return y
    rows[output] = y
    return y.detach()  # what comes after the attention is neither compared nor trained


class _FrozenLinear(torch.autograd.Function):
    """A linear that can only be called, in the middle of a graph: its weight is what it makes of unit vectors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
        y = linear(x)
        ctx.linear, ctx.width, ctx.dtypes = linear, x.shape[-1], (x.dtype, y.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        into, out = ctx.dtypes
        # Large units, so that little is rounded off where the bias is taken away again; a power of two is exact.
        units = _UNIT * torch.eye(ctx.width, dtype=out, device=grads[0].device)
        weight = (ctx.linear(units[None])[0] - ctx.linear(torch.zeros_like(units[None, :1]))[0]) / _UNIT  # (C, C)
        return (grads[0] @ weight.to(grads[0].dtype).T).to(into), None


def _rows(found: Mapping[str, Tensor], paths: list[str]) -> tuple[Tensor, ...]:
    return tuple(found[path] for path in paths)


def _softmax(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
    """In place of ComfyUI's attention, which may have no backward."""
    return softmax_attention(q, k, v, heads)
