"""EDiT weights: a student's side weights and its changes to the base, what they were made for, and their file."""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..attention import SITES, LayerFactory
from ..backbones import BACKBONES, Base, identify_module, module_tensors
from ..config import KEY_PARTS, QUERY_PARTS, EDiTConfig
from ..errors import EDiTError, EDiTModelError, EDiTWeightsError, said, shown
from ..files import write_file
from ..layers import format_layers, parse_layers
from .differences import (
    PREFIX,
    Trainable,
    check_differences,
    check_trainable,
    group,
    initial_differences,
    modules_of,
    width_of,
)

__all__ = [
    "DTYPES",
    "EDiTWeights",
    "LoadReport",
    "build_sides",
    "fingerprint",
    "fingerprint_distance",
    "holds_weights",
]

FORMAT = "edit"
FORMAT_VERSION = "1"
_NAME = re.compile(r"(\d{1,6})\.(self|joint)\.(.+)")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in, by safetensors' names."""
_MOST_CHANNELS = 65536
_MOST_HEADER = 1 << 22  # bytes; those of the real models' students are under a tenth of it
_SAMPLES = 8  # bias values per block in a base's fingerprint
_SAME_BASE = 0.5  # relative distance of fingerprints; unrelated bases are near 1.4, an fp8 copy is under 0.2


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
        tensor = module_tensors(transformer).__getitem__
        return cls.init_for(identify_module(transformer), tensor, config, layers, seed, trainable, rank)

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
        tensors = {name: _initial(name, tuple(t.shape), config, generator) for name, t in sides.state_dict().items()}
        paths = [linear.diffusers for block in chosen for linear in base.linears(block)]
        tensors.update(initial_differences(paths, base.dim, trainable, rank, generator))
        return cls(base.backbone.name, config, tensors, fingerprint(base, tensor))

    @property
    def sites(self) -> dict[int, tuple[str, ...]]:
        """Which sites of which blocks there are weights for."""
        return _sites(self.tensors, self.backbone, self.config)

    @property
    def dim(self) -> int:
        """Channels `C` of the base that these were made for."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return _width(shapes, self.backbone, self.config, "these EDiT weights")

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
        ours = {name: match for name in self.tensors if (match := _NAME.fullmatch(name))}
        state = {n: self.tensors[n].to(dtype=dtype) for n, match in ours.items() if int(match[1]) in wanted}
        return modules, state

    def build_differences(
        self, blocks: Iterable[int], device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, nn.Module]:
        """The differences on the linears of some blocks, by the linears' diffusers paths, as filled modules."""
        return modules_of(self.differences(blocks), device, dtype)

    def differences(self, blocks: Iterable[int] | None = None) -> dict[str, dict[str, Tensor]]:
        """The differences on the linears of some blocks, or of all (see :data:`.differences.Differences`)."""
        paths = _paths(self.backbone, self.sites, blocks)
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
        if distance <= _SAME_BASE:
            if 2 * fingerprint_distance(self._merged_hash(base), found) >= distance:
                return None
            return (
                "this base model seems to hold what these EDiT weights change in it already, as one that ModelSave "
                "wrote of a student does, and now it is added once more; apply them to the base that they were made for"
            )
        return (
            f"these EDiT weights were made for another base model (fingerprints differ by {distance:.2f}, the same "
            f"base stays under {_SAME_BASE}); the pictures will probably be poor"
        )

    def _merged_hash(self, base: Base) -> str:
        """The fingerprint of the base with these weights' differences in it."""
        biases = {}
        for block, sites in enumerate(base.sites):
            output = next(x for x in base.backbone.linears(block, sites[0]) if x.name == "to_out")
            bias = self.tensors.get(f"{PREFIX}{output.diffusers}.bias", torch.zeros(base.dim))
            biases[base.sampled(block)] = bias
        return _encoded(_decoded(self.base_hash) + _decoded(fingerprint(base, biases.__getitem__)))

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
        weights, unexpected = cls._read(Path(path))
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
        return cls._read(Path(path), metadata, prefix)[0]

    @classmethod
    def _read(
        cls, path: Path, metadata: Mapping[str, str] | None = None, prefix: str = ""
    ) -> tuple[EDiTWeights, tuple[str, ...]]:
        """The weights, and the names that are none of theirs."""
        # Not Path.is_file: of a name that is too long, or a folder that may not be read, it makes an error of its own.
        if not os.path.isfile(path):  # a device or a pipe would be waited for
            raise EDiTWeightsError(f"{path}: there is no such file")
        try:
            _check_header(path)
            with safe_open(path, framework="pt", device="cpu") as file:
                if metadata is None:
                    metadata = file.metadata() or {}
                names = [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                slices = {name: file.get_slice(prefix + name) for name in names}
                header = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
                weights = cls._from_header(path, metadata, header)
                expected = weights.tensors
                weights.tensors = {name: file.get_tensor(prefix + name) for name in names if name in expected}
        except SafetensorError as error:
            raise EDiTWeightsError(f"{path}: not a complete safetensors file ({said(error)})") from None
        except OSError as error:
            raise EDiTWeightsError(f"{path}: cannot be read ({error})") from None
        return weights, tuple(name for name in names if name not in weights.tensors)

    @classmethod
    def _from_header(
        cls, path: Path, metadata: Mapping[str, str], header: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> EDiTWeights:
        """Weights with `meta` tensors, all checked against what the config makes of them."""
        if metadata.get("format") != FORMAT:
            raise EDiTWeightsError(
                f"{path}: not an EDiT weights file (its metadata says format={metadata.get('format')!r:.80}, "
                "not 'edit')"
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise EDiTWeightsError(
                f"{path}: format_version {metadata.get('format_version')!r:.80} is unknown; this version reads "
                f"{FORMAT_VERSION!r}, so update EDiT or convert the file"
            )
        if metadata.get("backbone") not in BACKBONES:
            raise EDiTWeightsError(
                f"{path}: backbone {metadata.get('backbone')!r:.80} is unknown; known are {', '.join(BACKBONES)}"
            )
        try:
            config = EDiTConfig.from_json(metadata.get("config", ""))
            training = json.loads(metadata.get("training", "{}"))
        except (ValueError, RecursionError) as error:  # EDiTConfigError among them, and numbers of too many digits
            raise EDiTWeightsError(f"{path}: its metadata is damaged: {error}") from None
        shapes = {name: shape for name, (shape, _) in header.items()}
        found = _sites(shapes, metadata["backbone"], config)
        dim = _width(shapes, metadata["backbone"], config, str(path))
        if not 1 <= dim <= _MOST_CHANNELS:
            raise EDiTWeightsError(f"{path}: its tensors are for {dim} channels, not for 1 to {_MOST_CHANNELS}")
        # One of each site, not of each block, of which a file's names may pretend any number.
        meta = {site: SITES[site](dim, config, device=torch.device("meta")).state_dict() for site in SITES}
        expected = {
            f"{block}.{site}.{name}": tensor
            for block, names in found.items()
            for site in names
            for name, tensor in meta[site].items()
        }
        if missing := sorted(set(expected) - set(header)):
            raise EDiTWeightsError(f"{path}: {len(missing)} tensors are missing, {missing[0]} among them")
        for name, tensor in expected.items():
            shape = header[name][0]
            if shape != tuple(tensor.shape):
                raise EDiTWeightsError(f"{path}: {name} is {_by(shape)}, but the config asks for {_by(tensor.shape)}")
        differences = check_differences(shapes, _paths(metadata["backbone"], found), dim, str(path))
        expected.update({name: torch.empty(shapes[name], device="meta") for name in differences})
        for name in expected:
            dtype = header[name][1]
            if dtype not in DTYPES:
                raise EDiTWeightsError(f"{path}: {name} is {dtype}, but EDiT weights are {', '.join(DTYPES)}")
        if not isinstance(training, dict):
            raise EDiTWeightsError(f"{path}: its metadata is damaged: training is not a JSON object")
        return cls(metadata["backbone"], config, expected, metadata.get("base_hash", ""), training)


def _check_header(path: Path) -> None:
    """Refuses names and metadata by the megabyte before they are parsed.

    Raises:
        EDiTWeightsError: as it says.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _MOST_HEADER < size < os.path.getsize(path):  # a size beyond the file is not one: it is no safetensors file
        raise EDiTWeightsError(
            f"{path}: its header has {size} bytes, but that of EDiT weights has {_MOST_HEADER} at most"
        )


def holds_weights(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a file's tensors have names that EDiT weights have."""
    return any(map(_NAME.fullmatch, shapes)) or bool(group(shapes))


def _sites(tensors: Mapping[str, Any], backbone: str, config: EDiTConfig) -> dict[int, tuple[str, ...]]:
    """The sites that have side weights; where the config has none, those that have a difference."""
    if config.side_weights:
        keys = [(int(match[1]), match[2]) for match in map(_NAME.fullmatch, tensors) if match]
    else:
        keys = [key for key in map(BACKBONES[backbone].site_of, group(tensors)) if key]
    found: dict[int, set[str]] = {}
    for block, site in keys:
        found.setdefault(block, set()).add(site)
    return {block: tuple(sorted(found[block])) for block in sorted(found)}


def _width(shapes: Mapping[str, tuple[int, ...]], backbone: str, config: EDiTConfig, source: str) -> int:
    """Channels `C` of the base that tensors were made for.

    Raises:
        EDiTWeightsError: none of them tells; names `source`, the tensor and the numbers.
    """
    if not config.side_weights:
        return width_of(shapes, _paths(backbone, _sites(shapes, backbone, config)), source)
    fusion = QUERY_PARTS.get(config.query) or KEY_PARTS.get(config.key)
    part = f"{fusion}.up" if fusion else {"compressor": "compress_k.conv", "plain": "local"}[config.key]
    name = next((n for n in shapes if (match := _NAME.fullmatch(n)) and match[3] == f"{part}.weight"), None)
    if name is None or len(shapes[name]) < 2:
        raise EDiTWeightsError(f"{source}: holds no <block>.<site>.{part}.weight; it has no EDiT weights")
    dim, hidden = shapes[name][:2]
    if part.endswith("up") and dim != hidden * config.compression:
        raise EDiTWeightsError(
            f"{source}: {name} is {dim}x{hidden}, but compression={config.compression} asks for "
            f"{dim}x{dim // config.compression}"
        )
    return dim


def _paths(backbone: str, sites: Mapping[int, Iterable[str]], blocks: Iterable[int] | None = None) -> set[str]:
    """Diffusers paths of the linears that some blocks, or all, can have a difference on."""
    linears = BACKBONES[backbone].linears
    chosen = sites if blocks is None else blocks
    return {linear.diffusers for block in chosen for site in sites[block] for linear in linears(block, site)}


def _by(shape: Iterable[int]) -> str:
    sizes = [*map(str, shape)]
    return "x".join(sizes[:8] + ["..."] * (len(sizes) > 8)) or "a scalar"


def _initial(name: str, shape: tuple[int, ...], config: EDiTConfig, generator: torch.Generator) -> Tensor:
    if name.endswith((".down.weight", ".around.weight")):
        bound = math.sqrt(6 / math.prod(shape[1:]))  # He initialisation for a ReLU-like activation
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith(".norm.weight"):
        return torch.ones(shape)
    if name.endswith(".conv.weight"):  # a compressor's
        row = torch.tensor([0.0, 1.0, 0.0] if config.kv_stride == 1 else [0.25, 0.5, 0.25])
        return torch.outer(row, row).expand(shape).clone()
    return torch.zeros(shape)


def fingerprint(base: Base, tensor: Callable[[str], Tensor]) -> str:
    """What a base's `base_hash` is: a few values of every block's attention output bias, as bfloat16 in base64.

    Biases bear the same values in ComfyUI's, the original and diffusers' files, and stay unquantised in GGUF and
    scaled fp8 files; values, unlike a digest, can be compared when the base was cast to another dtype.

    Raises:
        EDiTModelError: the base has no values just now, but only shapes.
    """
    samples = []
    for block in range(base.depth):
        bias = tensor(base.sampled(block))
        if bias.is_meta:
            raise EDiTModelError(
                f"the model's block {block} is not in memory, as accelerate's offloading leaves it between calls; "
                "use EDiT first, and offload the model then"
            )
        places = torch.linspace(0, len(bias) - 1, _SAMPLES).round().long().to(bias.device)
        samples.append(bias.detach()[places].float().cpu())
    return _encoded(torch.cat(samples))


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.bfloat16().view(torch.uint8).numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()


def fingerprint_distance(a: str, b: str) -> float:
    """Relative distance of two fingerprints: 0 for the same base, near 1.4 for unrelated ones, inf for other sizes."""
    try:
        left, right = _decoded(a), _decoded(b)
    except ValueError:
        return math.inf
    if left.shape != right.shape:
        return math.inf
    scale = max(float(left.norm()), float(right.norm()))
    return float((left - right).norm()) / scale if scale else 0.0
