"""What the nodes share: their sockets, and checks of what a widget may hold, where ComfyUI does not.

ComfyUI leaves whatever `validate_inputs` names to us, does not look at linked values, and in 0.3 not at lists either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.utils
from comfy_api.latest import io

from ..edit_core import EDiTError
from ..edit_core.backbones import plain_name
from ..edit_core.errors import quoted

__all__ = ["CATEGORY", "Weights", "check_values", "layers_input", "plain_state", "refusal"]

CATEGORY = "EDiT"
Weights = io.Custom("EDIT_WEIGHTS")


def layers_input() -> io.String.Input:
    """The socket of every node that takes a list of blocks."""
    return io.String.Input(
        "layers", default="all", tooltip='Transformer blocks: "all", "none", or a list such as "0, 3-9, 27".'
    )


def check_values(node: type[io.ComfyNode], **values: Any) -> None:
    """Compares values with what the node's schema allows; None is one that is not known yet.

    Raises:
        EDiTError: a number is outside its range, or a choice is not in its list.
    """
    for socket in node.define_schema().inputs:
        value = values.get(socket.id)
        if value is None:
            continue
        if isinstance(socket, io.Combo.Input) and value not in socket.options:
            raise EDiTError(f"{socket.id}: {quoted(str(value))} is not one of {', '.join(map(str, socket.options))}")
        if isinstance(socket, io.Int.Input | io.Float.Input) and not socket.min <= value <= socket.max:
            raise EDiTError(f"{socket.id}: {value} is not between {socket.min} and {socket.max}")


def refusal(check: Callable[[], object]) -> bool | str:
    """For `validate_inputs`: True, or the sentence with which a check fails."""
    try:
        check()
    except EDiTError as error:
        return str(error)
    return True


def plain_state(path: str, prefix: str) -> dict[str, Any]:
    """A model file's tensors by their plain names below a prefix."""
    state = {plain_name(key): value for key, value in comfy.utils.load_torch_file(path).items()}
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
