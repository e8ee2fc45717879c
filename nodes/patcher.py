"""EDiT on a ComfyUI MODEL: replaced forwards through an injection, side weights in a patcher of their own.

An injection is built from the patcher that it is handed, so it follows deep copies; base modules are never swapped,
so LoRA keys, memory accounting and saving stay as they were. Differences on the base's linears, where weights hold
some, are weight patches as a LoRA's are.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import PatcherInjection, WrappersMP

from ..edit_core import EDiTConfig, EDiTWeights
from ..edit_core.attention import SideAttention
from ..edit_core.backbones import Backbone, Base, HostCall, identify_module, plain_name, unwrapped
from ..edit_core.hosts.dense import DenseLog, dense_reason
from ..edit_core.layers import format_layers
from ..edit_core.weights import weights_for

__all__ = ["KEY", "apply_to_model", "base_tensor", "compute_dtype", "identify_model", "replace_forward"]

logger = logging.getLogger(__name__)

KEY = "edit"


@dataclass(frozen=True)
class Application:
    """One use of EDiTApply: which blocks, and when."""

    backbone: Backbone
    blocks: tuple[int, ...]
    start_percent: float
    end_percent: float
    min_tokens: int
    changed: frozenset[str]
    """Diffusers paths of the base's linears that it patched."""
    bare: torch.nn.ModuleDict | None = None
    """Its side modules where they hold no tensors; else they are an additional model of the patcher's."""

    def in_range(self, sampling: Any, options: Mapping[str, Any]) -> bool:
        """Whether a call of the model lies between its two points of the schedule."""
        if (self.start_percent, self.end_percent) == (0.0, 1.0):
            return True
        # Of 0 a flow model says 1.0, and its first sigma may be rounded to a little more.
        start = math.inf if self.start_percent == 0.0 else float(sampling.percent_to_sigma(self.start_percent))
        return float(sampling.percent_to_sigma(self.end_percent)) <= float(options["sigmas"].max()) <= start


@dataclass
class Call:
    """One call of a base model."""

    host: HostCall
    active: tuple[bool, ...]
    """Per application, whether the call is one for it."""
    ran: bool = False
    """Whether a replaced forward has been called. Set and not counted, since compiled graphs guard what they read."""

    def wanted(self, applications: tuple[Application, ...]) -> bool:
        """Whether any block is to be linear in it."""
        return any(on and each.blocks for on, each in zip(self.active, applications, strict=True))


class Placed(NamedTuple):
    """A replaced forward."""

    path: str
    """Of the block's module, below `diffusion_model`."""
    module: torch.nn.Module
    forward: Callable[..., Any]


class UnderWay(threading.local):
    """The call of a base model that is under way in the current thread."""

    call: Call | None = None


@dataclass
class Running:
    """An injection at work in one base model: what to undo, and the calls that are under way."""

    injection: EDiTInjection
    placed: list[Placed] = field(default_factory=list)
    restore: list[Callable[[], None]] = field(default_factory=list)
    under_way: UnderWay = field(default_factory=UnderWay)


# Keyed by the BaseModel, since the replaced forwards and the wrapper meet in nothing else; PixArt passes no options.
_RUNNING: weakref.WeakKeyDictionary[Any, Running] = weakref.WeakKeyDictionary()

# The blocks that an injection found last, while no other pack held their places: kept for who injects within a call.
_BLOCKS: weakref.WeakKeyDictionary[Any, dict[str, torch.nn.Module]] = weakref.WeakKeyDictionary()
_CALLS: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""How many calls of a base model are under way, in any thread."""


class EDiTInjection(PatcherInjection):
    """Replaces the forwards of the applications' blocks; those with side weights use one additional model each."""

    def __init__(self, applications: tuple[Application, ...]) -> None:
        super().__init__(self._inject, self._eject)
        self.applications = applications
        self.log = DenseLog(logging.INFO)
        self.ran = False
        """Whether any of its forwards has ever been called in a call that was for it."""
        self.watch = False
        """Whether the next call is to be watched for who has the blocks."""

    def _inject(self, patcher: Any, again: bool = False) -> None:
        """Args: again: whether this is within a call, where another pack may hold the places of the blocks."""
        self._eject(patcher)
        known = _BLOCKS.setdefault(patcher.model, {})
        if not again and not _CALLS.get(patcher.model):
            known.clear()
        diffusion_model = patcher.get_model_object("diffusion_model")
        held = iter(patcher.get_additional_models_with_key(KEY))
        sides: list[Any] = [next(held).model if each.bare is None else each.bare for each in self.applications]
        running = _RUNNING[patcher.model] = Running(self)
        backbone = self.applications[0].backbone
        for block in sorted({block for application in self.applications for block in application.blocks}):
            path = backbone.comfy_path(block)
            if path not in known:
                known[path] = unwrapped(comfy.utils.get_attr(diffusion_model, path))
            module = known[path]
            candidates = [
                (i, side[str(block)])
                for i, (application, side) in enumerate(zip(self.applications, sides, strict=True))
                if block in application.blocks
            ]
            forward = self._forward(module, candidates[::-1], running, backbone)
            running.placed.append(Placed(path, module, forward))
            running.restore.append(replace_forward(module, forward))

    def take_up(self, patcher: Any) -> None:
        """Injects anew within a call."""
        self._inject(patcher, again=True)

    def _eject(self, patcher: Any) -> None:
        running = _RUNNING.pop(patcher.model, None)
        for restore in running.restore if running else ():
            restore()

    def _forward(
        self,
        module: Any,
        candidates: list[tuple[int, dict[str, SideAttention]]],
        running: Running,
        backbone: Backbone,
    ) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = running.under_way.call
            if call is not None:
                call.ran = True
            # The application that came last has the first word; begin_call said why one is not active.
            sides = next((sides for i, sides in candidates if call is None or call.active[i]), None)
            if sides is None:
                return original(*args, **kwargs)
            grid = None if call is None else call.host.grid
            unknown = backbone.comfy_unknown(args, kwargs)
            reason = dense_reason(grid, backbone.comfy_image_tokens(*args, **kwargs), unknown=unknown)
            self.log.note(reason)
            if call is None or reason is not None:
                return original(*args, **kwargs)
            return backbone.comfy_forward(module, sides, call.host, *args, **kwargs)

        return forward

    def begin_call(self, model: Any, latent: torch.Tensor, options: dict[str, Any]) -> Call:
        """Decides, once per call of the model, which applications it is for."""
        grid = self.applications[0].backbone.comfy_grid(*latent.shape[-2:])
        active = []
        for application in self.applications:
            reason = dense_reason(grid, math.prod(grid), min_tokens=application.min_tokens)
            # Reading sigma waits for the device, so it is only done where the answer depends on it.
            if reason is None and not application.in_range(model.model_sampling, options):
                window = (application.start_percent, application.end_percent)
                reason = dense_reason(grid, math.prod(grid), outside=window)
            self.log.note(reason)
            active.append(reason is None)
        return Call(HostCall(grid, optimized_attention), tuple(active))

    def note_taken(self, running: Running, diffusion_model: Any, seen: str | None) -> None:
        """Says that a call that was for it had none of its forwards run, and who has the blocks, if that is known.

        A cache of steps rightly runs none where it repeats an earlier call, but not from the first one on.
        """
        who = seen or holder(running, diffusion_model)
        self.watch = who is None and not self.ran
        if who is not None:
            self.log.note(f"none of its blocks ran in a call of the model: {who}")
        elif not self.ran:
            self.log.note("none of its blocks ran in a call of the model: something within that call has their places")


def holder(running: Running, diffusion_model: Any) -> str | None:
    """Who has the place of a replaced forward just now, or of the model's own; None where nobody does."""
    injection = running.injection
    for path, module, forward in running.placed:
        if module.forward is not forward:
            return f"{origin(module.forward)} has {path}.forward"
        try:
            found = unwrapped(comfy.utils.get_attr(diffusion_model, path))
        except AttributeError:
            found = comfy.utils.get_attr(diffusion_model, path.partition(".")[0])[0]
        if found is not module and not injection.ran:
            return f"{origin(found)} has the place of {path}"
    if "forward" in vars(diffusion_model) and not injection.ran:
        return f"{origin(diffusion_model.forward)} has the model's forward"
    return None


def origin(found: Any) -> str:
    """Module and name of a function, or of an object's class."""
    while isinstance(found, functools.partial):
        found = found.func
    named = found if hasattr(found, "__qualname__") else getattr(found, "__func__", type(found))
    return f"{named.__module__}.{named.__qualname__}"


@contextlib.contextmanager
def watched(running: Running, diffusion_model: Any, wanted: bool) -> Iterator[list[str]]:
    """Looks, before every module's forward, who has a replaced forward's place; gives the first that it finds."""
    found: list[str] = []
    if not wanted:
        yield found
        return

    def look(*_: Any) -> None:
        if not found and (who := holder(running, diffusion_model)):
            found.append(who)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def replace_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Sets an instance's forward; returns what restores it exactly, another pack's object patch included."""
    if "forward" in module.__dict__:
        previous = module.forward
        module.forward = forward
        return lambda: setattr(module, "forward", previous)
    module.forward = forward
    # Not delattr: another pack may have taken its own away, and this with it.
    return lambda: module.__dict__.pop("forward", None)


def running_for(injection: EDiTInjection, model: Any) -> Running | None:
    """An injection's work in a base model, which it takes up again where another patcher has undone it.

    A clone of a loaded MODEL believes itself injected: when it is dropped or looked at while the MODEL is sampled, it
    ejects or injects in a base model that is not its own any more.
    """
    running = _RUNNING.get(model)
    if running is None or running.injection is not injection:
        patcher = model.current_patcher
        if patcher is None or injection not in (patcher.get_injections(KEY) or ()):
            return None
        injection.take_up(patcher)
        running = _RUNNING[model]
    return running


def _make_wrapper(injection: EDiTInjection) -> Callable[..., Any]:
    def edit_apply_model(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        running = running_for(injection, executor.class_obj)
        if running is None:
            return executor(x, *args, **kwargs)
        options = kwargs["transformer_options"] if "transformer_options" in kwargs else args[4]
        model = executor.class_obj
        call = injection.begin_call(model, x, options)
        before, running.under_way.call = running.under_way.call, call
        _CALLS[model] = _CALLS.get(model, 0) + 1
        try:
            with watched(running, model.diffusion_model, injection.watch) as seen:
                output = executor(x, *args, **kwargs)
        finally:
            running.under_way.call = before
            _CALLS[model] -= 1
        if call.ran:
            injection.ran = True
        elif _RUNNING.get(model) is running and call.wanted(injection.applications):
            injection.note_taken(running, model.diffusion_model, next(iter(seen), None))
        return output

    return edit_apply_model


def identify_model(model: Any) -> Base:
    """What a MODEL is.

    Raises:
        EDiTModelError: none that EDiT knows.
    """
    return identify_module(model.get_model_object("diffusion_model"))


def apply_to_model(
    model: Any,
    weights: EDiTWeights | EDiTConfig,
    layers: str = "all",
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    min_tokens: int = 0,
) -> Any:
    """A clone of a MODEL that runs EDiT in the given blocks, between two points of the schedule: with weights, or by
    a config that needs none.

    A later application has the first word where two name the same block; outside its range the earlier one stands.
    Differences on the model's own linears, if the weights hold any, are added whatever the range.

    Raises:
        EDiTError: the weights do not fit the model, or a bad `layers` text.
    """
    base = identify_model(model)
    weights = weights_for(base, weights)
    blocks = weights.choose(layers, base)
    if warning := weights.warning(base, base_tensor(model)):
        logger.warning("EDiT: %s", warning)
    for block in blocks:
        path = f"diffusion_model.{base.backbone.comfy_path(block)}.forward"
        if path in model.object_patches:
            logger.warning("EDiT: another node patched %s; it now only runs where EDiT stays dense", path)
    if dense := set(range(base.depth)) - set(blocks):
        logger.info("EDiT: blocks %s stay dense: not listed or without weights", format_layers(dense))

    model = model.clone()
    injections = model.get_injections(KEY)
    earlier = injections[0].applications if injections else ()
    changed = add_differences(model, weights, blocks, base)
    if changed and (start_percent, end_percent, min_tokens) != (0.0, 1.0, 0):
        logger.info(
            "EDiT: start_percent, end_percent and min_tokens switch the attention alone; what these weights change in "
            "the model's own layers stays changed throughout"
        )
    if twice := changed.intersection(path for application in earlier for path in application.changed):
        logger.warning("EDiT: %d of the model's layers were changed before; the changes add up", len(twice))
    bare = None
    if weights.config.side_weights:
        side = side_patcher(weights, blocks, compute_dtype(model))
        model.set_additional_models(KEY, [*model.get_additional_models_with_key(KEY), side])
    else:  # nothing to load, which ComfyUI would do all the same, and tell
        bare, _ = weights.build(blocks)
    application = Application(base.backbone, blocks, start_percent, end_percent, min_tokens, changed, bare)
    injection = EDiTInjection((*earlier, application))
    model.set_injections(KEY, [injection])
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _make_wrapper(injection))
    return model


def base_tensor(model: Any) -> Callable[[str], torch.Tensor]:
    """Gives the base's tensors by their names below `diffusion_model`, without what is patched into them just now."""

    def tensor(key: str) -> torch.Tensor:
        path = f"diffusion_model.{key}"
        # Not of all keys at once: a GGUF base's state dict also has names that no module bears.
        patches = model.get_key_patches(path)
        if path not in patches:  # another node's compiled blocks are in the model just now
            path = next(name for name in model.model.state_dict() if plain_name(name) == path)
            patches = model.get_key_patches(path)
        found: torch.Tensor = patches[path][0][0]
        return found

    return tensor


def add_differences(model: Any, weights: EDiTWeights, blocks: tuple[int, ...], base: Base) -> frozenset[str]:
    """Patches a MODEL's linears with the weights' differences on some blocks; returns the linears' diffusers paths.

    ComfyUI adds and takes off such patches with a model's loading, so they cannot follow the schedule.
    """
    differences = weights.differences(blocks)
    if not differences:
        return frozenset()  # an empty patch would still make ComfyUI load the model anew
    tensors, targets = {}, {}
    for linear in (linear for block in blocks for linear in base.linears(block) if linear.diffusers in differences):
        path, parts = linear.diffusers, differences[linear.diffusers]
        if "weight" in parts:
            tensors.update({f"{path}.diff": parts["weight"], f"{path}.bias.diff": parts["bias"]})
        else:
            tensors.update({f"{path}.{part}": tensor for part, tensor in parts.items()})
        module, rows = base.place(linear)
        for name, part in ((path, "weight"), (f"{path}.bias", "bias")):
            targets[name] = (
                f"diffusion_model.{module}.{part}",
                (0, rows.start, rows.stop - rows.start),
            )  # dimension, start, length
    model.add_patches(comfy.lora.load_lora(tensors, targets, log_missing=False))
    return frozenset(differences)


def side_patcher(
    weights: EDiTWeights, blocks: tuple[int, ...], dtype: torch.dtype, disable_dynamic: bool = False
) -> Any:
    """The side weights as a patcher, so that ComfyUI loads, offloads and accounts for them as for any model.

    Args:
        disable_dynamic: as ComfyUI asks of the factories that make independent copies for several GPUs.
    """
    management = comfy.model_management
    offload = management.unet_offload_device()
    # Layers may come without memory until they are loaded (dynamic VRAM): a strict load fills all, and nothing else.
    sides, state = weights.build(blocks, comfy.ops.manual_cast, offload, dtype)
    plain = comfy.model_patcher.ModelPatcher
    patcher_class = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = patcher_class(sides, load_device=management.get_torch_device(), offload_device=offload)
    sides.load_state_dict(state, assign=getattr(patcher, "is_dynamic", lambda: False)())
    sides.requires_grad_(False).eval()
    patcher.cached_patcher_init = (side_patcher, (weights, blocks, dtype))
    return patcher


def compute_dtype(model: Any) -> torch.dtype:
    """What the base computes in, which for an fp8 base is not what it is stored in."""
    return model.model.manual_cast_dtype or model.model.get_dtype()
