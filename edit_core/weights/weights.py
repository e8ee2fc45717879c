"""EDiT weights: a student's side weights and its changes to the base, what they were made for, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..attention import SITES, LayerFactory, SideAttention
from ..backbones import BACKBONES, Base, identify_module, module_tensors
from ..config import EDiTConfig
from ..errors import EDiTError, EDiTWeightsError, shown
from ..files import write_file
from ..layers import format_layers, parse_layers
from .differences import Trainable, check_trainable, group, in_full, initial_differences, modules_of
from .file import FORMAT, FORMAT_VERSION, SIDE_NAME, paths_of, read_file, sites_of, width_for
from .fingerprint import SAME_BASE, added, fingerprint, fingerprint_distance

__all__ = ["EDiTWeights", "LoadReport", "build_sides"]


@dataclass(frozen=True)
class LoadReport:
    """What a weights file had too much of, for the reader to print."""

    blocks: tuple[int, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"blocks {format_layers(self.blocks)}"]
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} unexpected tensors ignored: {shown(self.unexpected)}")
        return "; ".join(lines)


def build_sides(
    dim: int,
    sites: Mapping[int, Iterable[str]],
    config: EDiTConfig,
    layers: LayerFactory = nn,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.ModuleDict:
    """The modules of a student, `sides[str(block)][site]`; their state dict has a weights file's names."""
    return nn.ModuleDict(
        {
            str(block): nn.ModuleDict({site: SITES[site](dim, config, layers, device, dtype) for site in names})
            for block, names in sites.items()
        }
    )


@dataclass
class EDiTWeights:
    """A student's side weights and differences on its base, on the CPU, and what they were made for.

    A config may leave a student no side weights (`query=plain`, `key=plain`): then it is its differences alone, and
    the attentions that have one on a linear of theirs are those that it replaces.
    """

    backbone: str
    """`pixart_sigma` or `sd35_medium`."""
    config: EDiTConfig
    tensors: dict[str, Tensor]
    """`<block>.<site>.<tensor>` and `base.<diffusers path>.<tensor>`, float32, float16 or bfloat16."""
    base_hash: str
    """A fingerprint of the base (see :func:`fingerprint`)."""
    training: dict[str, Any] = field(default_factory=dict)
    """How they were trained; empty for untrained ones."""

    @classmethod
    def init(
        cls,
        transformer: nn.Module,
        config: EDiTConfig | None = None,
        layers: str = "all",
        seed: int = 0,
        trainable: Trainable = "side",
        rank: int = 16,
    ) -> EDiTWeights:
        """Weights that make the student start near its teacher (ours; the paper states no initialisation).

        `Conv1x1'` and an MLP's last linear start at zero, so that queries (and keys that are not compressed) start as
        the teacher's; a local branch starts at zero; the compressors start as the 3x3 binomial low-pass, so that keys
        and values start as a smoothed down-sampling of the teacher's (without a stride, as the teacher's own). Nothing
        of the teacher's weights is copied: its layers stay its own.

        Args:
            transformer: the teacher, a diffusers transformer or a ComfyUI `diffusion_model`.
            config: the student's choices; by default the preset :data:`~edit_core.config.DEFAULT`.
            layers: the blocks to make weights for, `"all"` or `"0, 3-9"`.
            seed: seeds the 3x3 convolutions, an MLP's first linear and the `A` of low-rank differences, the only
                random parts.
            trainable: `low_rank` or `full` add differences, without an effect yet, on the linears of the replaced
                attentions, for a training to change.
            rank: of low-rank differences.

        Raises:
            EDiTModelError: not a transformer that EDiT knows, or one whose weights are not in memory.
            EDiTError: a bad `layers` text, or one that names no block; a bad rank; nothing that could be trained.
        """
        base = identify_module(transformer)
        tensor = module_tensors(transformer).__getitem__
        return cls.init_for(base, tensor, config, layers, seed, trainable, rank)

    @classmethod
    def init_for(
        cls,
        base: Base,
        tensor: Callable[[str], Tensor],
        config: EDiTConfig | None = None,
        layers: str = "all",
        seed: int = 0,
        trainable: Trainable = "side",
        rank: int = 16,
    ) -> EDiTWeights:
        """:meth:`init` for a base that need not be in memory: `tensor` gives a few of its biases by name."""
        config = config or EDiTConfig.preset()
        check_trainable(config, trainable)
        chosen = {block: base.sites[block] for block in parse_layers(layers, base.depth)}
        if not chosen:
            raise EDiTError(f"layers: {layers!r} names no block, so there are no weights to make")
        sides = build_sides(base.dim, chosen, config, device=torch.device("meta"))
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"{path}.{name}": tensor
            for path, side in sides.named_modules()
            if isinstance(side, SideAttention)
            for name, tensor in side.initial(generator).items()
        }
        paths = [linear.diffusers for block in chosen for linear in base.linears(block)]
        tensors.update(initial_differences(paths, base.dim, trainable, rank, generator))
        return cls(base.backbone.name, config, tensors, fingerprint(base, tensor))

    @property
    def sites(self) -> dict[int, tuple[str, ...]]:
        """Which sites of which blocks there are weights for."""
        return sites_of(self.tensors, self.backbone, self.config)

    @property
    def dim(self) -> int:
        """Channels `C` of the base that these were made for."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return width_for(shapes, self.backbone, self.config, "these EDiT weights")

    def build(
        self,
        blocks: Iterable[int],
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[nn.ModuleDict, dict[str, Tensor]]:
        """Empty side modules for some blocks, and the state dict to fill them with (strictly, by the caller)."""
        sites = self.sites
        wanted = {block: sites[block] for block in blocks}
        if layers is nn:  # its layers would draw values from the global generator, and what is drawn next would change
            modules = build_sides(self.dim, wanted, self.config, layers, torch.device("meta"), dtype)
            modules.to_empty(device=torch.empty(0, device=device).device)
        else:
            modules = build_sides(self.dim, wanted, self.config, layers, device, dtype)
        ours = {name: match for name in self.tensors if (match := SIDE_NAME.fullmatch(name))}
        state = {n: self.tensors[n].to(dtype=dtype) for n, match in ours.items() if int(match[1]) in wanted}
        return modules, state

    def build_differences(
        self, blocks: Iterable[int], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, nn.Module]:
        """The differences on the linears of some blocks, by the linears' diffusers paths, as filled modules."""
        return modules_of(self.differences(blocks), device, dtype)

    def differences(self, blocks: Iterable[int] | None = None) -> dict[str, dict[str, Tensor]]:
        """The differences on the linears of some blocks, or of all (see :data:`.differences.Differences`)."""
        paths = paths_of(self.backbone, self.sites, blocks)
        return {path: parts for path, parts in group(self.tensors).items() if path in paths}

    def check_base(self, base: Base) -> None:
        """Whether these weights can run on a base at all.

        Raises:
            EDiTWeightsError: another backbone, another width, or blocks or linears that the base does not have.
        """
        if self.backbone != base.backbone.name:
            titles = {name: backbone.title for name, backbone in BACKBONES.items()}
            raise EDiTWeightsError(
                f"these EDiT weights are for {titles[self.backbone]}, but the model is {base.backbone.title}; "
                "load weights made for this model"
            )
        if self.dim != base.dim:
            raise EDiTWeightsError(
                f"these EDiT weights are for a model of {self.dim} channels, but this one has {base.dim}"
            )
        for block, sites in self.sites.items():
            if block >= base.depth or sites != tuple(sorted(base.sites[block])):
                has = " and ".join(base.sites[block]) if block < base.depth else "no such block"
                raise EDiTWeightsError(
                    f"these EDiT weights hold block {block} ({' and '.join(sites)}), but the model has {has} there"
                )
        paths = {linear.diffusers for block in self.sites for linear in base.linears(block)}
        if surplus := sorted(set(self.differences()) - paths):
            raise EDiTWeightsError(f"these EDiT weights change {surplus[0]}, which the model does not have or use")

    def choose(self, layers: str, base: Base) -> tuple[int, ...]:
        """The blocks of `layers` for this base; `"all"` means all that these weights hold.

        Raises:
            EDiTWeightsError: the weights do not fit the base, or lack a block that was asked for by number.
            EDiTError: a bad `layers` text.
        """
        self.check_base(base)
        chosen = parse_layers(layers, base.depth)
        if layers.strip().lower() == "all":
            return tuple(self.sites)
        if missing := sorted(set(chosen) - set(self.sites)):
            raise EDiTWeightsError(
                f"layers: these EDiT weights hold no block {format_layers(missing)}; "
                f"they hold {format_layers(self.sites)}"
            )
        return chosen

    def warning(self, base: Base, tensor: Callable[[str], Tensor]) -> str | None:
        """A sentence if the base's fingerprint is not the one that these weights were made for, or is what their own
        differences make of it. Those of low rank leave biases, and with them the fingerprint, as they are."""
        found = fingerprint(base, tensor)
        distance = fingerprint_distance(self.base_hash, found)
        if distance <= SAME_BASE:
            if 2 * fingerprint_distance(self._merged_hash(base), found) >= distance:
                return None
            return (
                "this base model seems to hold what these EDiT weights change in it already, as one that ModelSave "
                "wrote of a student does, and now it is added once more; apply them to the base that they were made for"
            )
        return (
            f"these EDiT weights were made for another base model (fingerprints differ by {distance:.2f}, the same "
            f"base stays under {SAME_BASE}); the pictures will probably be poor"
        )

    def _merged_hash(self, base: Base) -> str:
        """The fingerprint of the base with these weights' differences in it."""
        differences, changes = self.differences(), {}
        for block, sites in enumerate(base.sites):
            output = next(x for x in base.backbone.linears(block, sites[0]) if x.name == "to_out")
            key = base.sampled(block)
            change = in_full(differences.get(output.diffusers, {}), key.rpartition(".")[2])
            changes[key] = torch.zeros(1) if change is None else change
        return added((self.base_hash, fingerprint(base, changes.__getitem__)))

    def metadata(self) -> dict[str, str]:
        """What the file says of itself, as strings: format, backbone, config, base_hash and training."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "backbone": self.backbone,
            "config": self.config.to_json(),
            "base_hash": self.base_hash,
            "training": json.dumps(self.training),
        }

    def save(self, path: str | os.PathLike[str], replace: bool = True) -> None:
        """Writes one `.safetensors` file; an existing file is replaced only once the new one is complete.

        Args:
            path: the file; its folder must be there.
            replace: False keeps an existing file.

        Raises:
            FileExistsError: there is one, and it is not to be replaced.
            OSError: the disk is full, or the folder cannot be written; nothing is left behind then.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_file(Path(path), save(tensors, self.metadata()), replace)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EDiTWeights:
        """Reads a weights file. Nothing is unpickled, and nothing is allocated before the shapes are checked.

        Raises:
            EDiTWeightsError: the file cannot be read or is not what it should be; names the file, the tensor and the
                numbers.
        """
        return cls.load_with_report(path)[0]

    @classmethod
    def load_with_report(cls, path: str | os.PathLike[str]) -> tuple[EDiTWeights, LoadReport]:
        """:meth:`load`, with a report of what the file held."""
        content, unexpected = read_file(Path(path))
        weights = cls(*content)
        return weights, LoadReport(tuple(weights.sites), unexpected)

    @classmethod
    def load_from_checkpoint(
        cls, path: str | os.PathLike[str], metadata: Mapping[str, str], prefix: str
    ) -> EDiTWeights:
        """:meth:`load` for weights among a training's tensors.

        Args:
            path: a checkpoint's `.safetensors` file.
            metadata: what :meth:`metadata` gave when it was written.
            prefix: what stands before the names of the wanted tensors.

        Raises:
            EDiTWeightsError: as from :meth:`load`.
        """
        return cls(*read_file(Path(path), metadata, prefix)[0])
