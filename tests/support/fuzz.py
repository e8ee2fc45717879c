"""Mutated files for the readers: each must be refused by one clear sentence or read correctly, whatever it holds.

`python -m support.fuzz weights 10000 0` (from tests/) tries 10,000 files of one kind; the n-th file follows from the
kind and n alone. The process limits its own memory, so that a reader which allocates what a header promises fails, and
ends itself where a file takes too long. It prints what came of the files as JSON.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("weights", "base", "cache", "config")
MEMORY = 256 << 20
"""Bytes that a reader may take beyond what the process has when it begins."""
SECONDS = 10
"""Of the processor that one file may take."""
_WAIT = 300  # seconds after which a reader hangs, however many others share the processor
_LONGEST = 2000  # characters of a sentence

HUGE = [0, 1, -1, 2**31, 2**40, 2**62, 2**63 - 1, 2**64, 10**30, 1.5, 1e308, None, True, "8", [], {}]
BOMBS = [
    "", " ", "{", "[", "[]", "{}", "null", "true", "NaN", "Infinity", "-Infinity", "1e400", "-0", '"', '"\\ud800"',
    "1" * 5000, "[" * 100_000, '{"a":' * 5000, "[" * 5000 + "]" * 5000, "A" * 100_000, "\x00", "\x1b[31mred", "a\nb",
    "../../x", "/etc/passwd", "\u202e", "💣" * 50, '{"__proto__": {}}', '{"compression": 1' + "0" * 5000 + "}",
    '{"eps": 1e-320}', '{"eps": NaN}', '{"eps": 1' + "0" * 400 + "}", '{"groups": 1e9}', '{"kernel": ["relu"]}',
    '{"kv_stride": true}', '{"compression": 4, "compression": 64}', '{"' + "k" * 5000 + '": 1}', '{"\\ud800\\n": 1}',
    '{"query": "plain", "key": "plain"}', '{"query": "plain", "key": "plain", "local": true, "kernel": "squared_relu"}',
]  # fmt: skip
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "C64",
    "",
    "f32",
    None,
    7,
]
NAMES = [
    "", "0", "0.self", "0.self.", "0.self.local.weight", "0.joint.local.weight", "999999.self.local.weight",
    "٣.self.local.weight", "-1.self.x", "0.self.__class__", "base..weight", "base.x.lora_A.weight", "../../x", "/",
    "base.transformer_blocks.0.attn1.to_q.weight", "base.transformer_blocks.999999.attn1.to_q.lora_A.weight",
    "\x1b[31m", "\x00", "n" * 10_000, "__metadata__", "💣", "\n",
]  # fmt: skip


def _some(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value."""
    if depth > 3 or rng.random() < 0.7:
        return copy.deepcopy(rng.choice([*HUGE, *BOMBS]))  # a later edit must not reach the list
    if rng.random() < 0.5:
        return [_some(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(NAMES): _some(rng, depth + 1) for _ in range(rng.randrange(4))}


# --- mutations of bytes -----------------------------------------------------------------------------------------------


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data) + 1)])]


def _flip(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        if flipped:
            place = rng.randrange(len(flipped)) if rng.random() < 0.5 else rng.randrange(min(len(flipped), 3000))
            flipped[place] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.randbytes(rng.choice([1, 8, 1000])) + data[place:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:b] + data[a:b] + data[b:]


def _zero(rng: random.Random, data: bytes) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + bytes(b - a) + data[b:]


def _garbage(rng: random.Random, data: bytes) -> bytes:
    return rng.randbytes(rng.randrange(200))


BYTES: list[Callable[[random.Random, bytes], bytes]] = [_cut, _flip, _flip, _insert, _repeat, _zero, _garbage]


# --- mutations of safetensors' headers --------------------------------------------------------------------------------


def _length(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    new = rng.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**32, 2**63, 2**64 - 1, 100_000_000, 99_999_999])
    return new.to_bytes(8, "little") + data[8:]


def _edit_tensor(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([name for name in header if name != "__metadata__"] or ["x"])
    entry = header.setdefault(name, {})
    if not isinstance(entry, dict):
        return
    field = rng.choice(["dtype", "shape", "data_offsets", "name", "gone", "extra", "whole"])
    if field == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif field == "shape":
        shape = list(entry.get("shape") or [])
        how = rng.randrange(5)
        if how == 0:
            shape = [rng.choice(HUGE) for _ in range(rng.randrange(6))]
        elif how == 1 and shape:
            shape[rng.randrange(len(shape))] = rng.choice(HUGE)
        elif how == 2:
            shape = shape[::-1]
        elif how == 3:
            shape = [1] * rng.choice([10, 1000]) + shape
        else:
            shape = [2**21] * 3
        entry["shape"] = shape
    elif field == "data_offsets":
        others = [e["data_offsets"] for e in header.values() if isinstance(e, dict) and "data_offsets" in e]
        entry["data_offsets"] = rng.choice(
            [rng.choice(others or [[0, 0]]), [rng.choice(HUGE), rng.choice(HUGE)], [0], [0, 2**40], [8, 0], None]
        )
    elif field == "name":
        header[rng.choice(NAMES)] = header.pop(name)
    elif field == "gone":
        del header[name]
    elif field == "extra":
        header[rng.choice(NAMES)] = {**entry, "data_offsets": [0, 0], "shape": [0]}
    else:
        header[name] = _some(rng)


def _edit_metadata(rng: random.Random, header: dict[str, Any]) -> None:
    metadata = header.setdefault("__metadata__", {})
    if not isinstance(metadata, dict) or rng.random() < 0.05:
        header["__metadata__"] = _some(rng)
        return
    key = rng.choice([*metadata, "format", "config", "config", "training", "base_hash"])
    how = rng.random()
    if how < 0.2:
        metadata.pop(key, None)
    elif how < 0.6 and key == "config":
        try:
            fields = json.loads(metadata.get("config", "{}"))
            fields[rng.choice([*fields, "unknown"])] = _some(rng)
            metadata["config"] = json.dumps(fields)
        except (ValueError, TypeError, RecursionError):
            metadata["config"] = rng.choice(BOMBS)
    elif how < 0.95:
        metadata[key] = rng.choice(BOMBS)
    else:
        metadata[key] = _some(rng)


def _header(rng: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    for _ in range(rng.choice([1, 1, 1, 2, 3, 10])):
        (_edit_metadata if rng.random() < 0.4 else _edit_tensor)(rng, header)
    if rng.random() < 0.05:  # a tensor by the thousand
        header.update({f"{i}.self.local.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                       for i in range(rng.choice([100, 3000]))})  # fmt: skip
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:  # the same key twice
        text = text.replace("{", '{"__metadata__": {"format": "edit"}, ', 1)
    if rng.random() < 0.05:
        text = rng.choice(BOMBS)
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded + rest


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    how = rng.random()
    if how < 0.6:
        data = _header(rng, data)
    elif how < 0.65:
        data = _length(rng, data)
    if how > 0.6 or rng.random() < 0.1:
        data = rng.choice(BYTES)(rng, data)
    return data


# --- mutations of JSON and YAML ---------------------------------------------------------------------------------------


def _edit_value(rng: random.Random, value: Any) -> Any:
    """The value with one part of it, or itself, replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _edit_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], _edit_value(rng, value[index]), *value[index + rng.choice([1, 1, 1, 0, 2]) :]]
    return _some(rng)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.6:
        return json.dumps(_edit_value(rng, json.loads(data))).encode()
    if rng.random() < 0.1:
        return rng.choice(BOMBS).encode("utf-8", "surrogatepass")
    return rng.choice(BYTES)(rng, data)


YAML_BOMBS = [
    "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghijk")),
    "stages: &s [*s]", "? {a: 1}\n: 2", "- " * 3000 + "x", "[" * 3000, "{" * 3000, "!!python/name:os.system",
    "!!python/object/apply:os.system [exit 1]", "%YAML 9.9\n---\na: 1", "a: b: c", "\t- x", "a: 1" + "0" * 5000,
    "steps: !!int 0x" + "f" * 5000, "2024-13-45", "a: 9999-99-99", "a: !!binary x", "<<: 1", "? \n? ", "--- 1\n--- 2",
    "\x00", "\ufeffa: 1", "a: .inf", "12:61:99", "a: !!int x", "a: !!bool x", "a: !!timestamp x", "a: !!float ''",
]  # fmt: skip


def mutate_yaml(rng: random.Random, data: bytes) -> bytes:
    how = rng.random()
    if how < 0.2:
        bomb = rng.choice(YAML_BOMBS).encode()
        return bomb if rng.random() < 0.5 else data + b"\n" + bomb
    if how < 0.7:
        lines = data.decode().splitlines()
        index = rng.randrange(len(lines))
        key, colon, _ = lines[index].partition(":")
        value = str(rng.choice([*HUGE, *BOMBS, *YAML_BOMBS[1:]]))
        lines[index] = f"{key}{colon} {value}" if colon else value
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    return rng.choice(BYTES)(rng, data)


# --- trying them ------------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A reader did neither."""


def outcome(read: Callable[[], Any], named: Path, errors: type[Exception]) -> str:
    """`read` or `refused`.

    Raises:
        Wrong: something else was raised, or the sentence is none or does not name the file.
    """
    try:
        read()
    except errors as error:
        said = str(error)
        if not said.isprintable() or len(said) > _LONGEST or named.name not in said:
            raise Wrong(f"{type(error).__name__} is not one sentence about {named.name}: {said[:300]!r}") from error
        return "refused"
    except BaseException as error:
        raise Wrong(f"{type(error).__name__}: {str(error)[:300]}") from error
    return "read"


def _weights(folder: Path) -> Callable[[int], str]:
    from support import models

    from edit_core import EDiTConfig, EDiTWeights, EDiTWeightsError

    pixart = models.pixart(heads=1, head_dim=8, blocks=1, caption=8)
    sd35 = models.sd35(heads=1, blocks=2, dual=(0,), context=8, pooled=8)
    students = [
        EDiTWeights.init(pixart),
        EDiTWeights.init(pixart, EDiTConfig.preset("paper"), trainable="full"),
        EDiTWeights.init(pixart, EDiTConfig.preset("sana"), trainable="low_rank", rank=1),
        EDiTWeights.init(sd35, EDiTConfig.preset("linfusion"), layers="1"),
    ]
    path, valid = folder / "w.safetensors", []
    for student in students:
        student.training = {"steps": 3, "losses": [1.0, 0.5]}
        student.save(path)
        valid.append(path.read_bytes())

    def load() -> None:
        weights, report = EDiTWeights.load_with_report(path)
        if not str(report).isprintable():
            raise Wrong(f"the report is not printable: {str(report)[:300]!r}")
        expected = weights.build(weights.sites)[0].state_dict()
        if {name for name in weights.tensors if not name.startswith("base.")} != set(expected):
            raise Wrong("what was read is not what the config makes")
        weights.check_base(bases[weights.backbone])

    def try_one(number: int) -> str:
        rng = random.Random(f"weights {number}")
        path.write_bytes(mutate_safetensors(rng, rng.choice(valid)))
        try:
            return outcome(load, path, EDiTWeightsError)
        except Wrong as wrong:
            # Whether what was read fits a base is another question, whose answer names no file.
            if isinstance(wrong.__cause__, EDiTWeightsError) and "these EDiT weights" in str(wrong.__cause__):
                return "read"
            raise

    from edit_core.backbones import identify_module

    bases = {"pixart_sigma": identify_module(pixart), "sd35_medium": identify_module(sd35)}
    return try_one


def _base(folder: Path) -> Callable[[int], str]:
    from safetensors.torch import save
    from support import models

    from edit_core.basefile import BaseFile
    from edit_core.errors import EDiTModelError
    from edit_core.weights import fingerprint

    transformers = [
        models.pixart(heads=1, head_dim=8, blocks=1, caption=8),
        models.sd35(heads=1, blocks=2, dual=(0,), context=8, pooled=8),
    ]
    valid = [save({name: t.half() for name, t in model.state_dict().items()}) for model in transformers]
    path = folder / "base.safetensors"

    def read() -> None:
        file = BaseFile(path)
        fingerprint(file.identify(), file.tensor)

    def try_one(number: int) -> str:
        rng = random.Random(f"base {number}")
        data = rng.choice(valid)
        if rng.random() < 0.3:  # where a reader looks first
            data = data.replace(b".attn1.to_out.0.bias", b".attn1.to_out.0.bia_", rng.randrange(2))
        path.write_bytes(mutate_safetensors(rng, data))
        return outcome(read, path, EDiTModelError)

    return try_one


def _cache(folder: Path) -> Callable[[int], str]:
    from support.caching import STEP, PoolEncoder, draw

    from edit_core.distill.cache import build_cache
    from edit_core.distill.dataset import CachedLatents
    from edit_core.distill.sources import FolderSource
    from edit_core.errors import EDiTError

    cache = folder / "cache"
    build_cache(FolderSource(draw(folder / "images", [(80, 80)] * 3)), PoolEncoder(), cache, [64], shard_size=2, **STEP)
    files = {
        path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file() and path.parent.name != "ranks"
    }
    files.pop(cache / "settings.json")  # what builds a cache reads it, and no training

    def try_one(number: int) -> str:
        rng = random.Random(f"cache {number}")
        path = rng.choice([*files])
        mutate = (
            mutate_json if path.suffix == ".json" else mutate_safetensors if path.suffix == ".safetensors" else None
        )
        data = mutate(rng, files[path]) if mutate else _shard(rng, files[path])
        path.write_bytes(data)
        verify = rng.random() < 0.2

        def read() -> None:
            data = CachedLatents(cache, 64, verify=verify)
            for index in range(len(data)):
                data[index]
                data.info(index)
            data.empty_prompt(cache)
            data.describe(cache)

        try:
            return outcome(read, cache, EDiTError)
        finally:
            path.write_bytes(files[path])

    return try_one


def _shard(rng: random.Random, data: bytes) -> bytes:
    """A tar of the same size, as its reader asks for that first; or of another."""
    if rng.random() < 0.2:
        return rng.choice(BYTES)(rng, data)
    if rng.random() < 0.5:
        return _flip(rng, data)
    place = rng.randrange(len(data) // 512) * 512
    block = mutate_safetensors(rng, data[512:])[: len(data) - place - 512]
    return (data[: place + 512] + block + data[place + 512 + len(block) :])[: len(data)]


def _config(folder: Path) -> Callable[[int], str]:
    from edit_core.distill.config import load_config
    from edit_core.errors import EDiTConfigError

    valid = [path.read_bytes() for path in sorted((ROOT / "edit_core" / "configs").glob("*.yaml"))]
    path = folder / "c.yaml"

    def try_one(number: int) -> str:
        rng = random.Random(f"config {number}")
        path.write_bytes(mutate_yaml(rng, rng.choice(valid)))
        return outcome(lambda: load_config(str(path)), path, EDiTConfigError)

    return try_one


def main(kind: str, count: int, start: int) -> None:
    import torch

    torch.set_num_threads(1)
    made: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        try_one = {"weights": _weights, "base": _base, "cache": _cache, "config": _config}[kind](Path(name))
        for number in range(50):  # what is imported or allocated on first use
            try_one(number)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        for number in range(start, start + count):
            faulthandler.dump_traceback_later(_WAIT, exit=True)
            used = int(time.process_time())
            resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            try:
                made[try_one(number)] += 1
            except Wrong as wrong:
                made["wrong"] += 1
                print(f"{kind} {number}: {wrong}", file=sys.stderr, flush=True)
        faulthandler.cancel_dump_traceback_later()
    print(json.dumps({"files": count, **made}))


def run(kind: str, count: int, start: int = 0) -> dict[str, int]:
    """Tries files in a process of their own.

    Raises:
        AssertionError: the process died or hung, or a file was neither read nor refused as it should be.
    """
    child = subprocess.run(
        [sys.executable, "-m", "support.fuzz", kind, str(count), str(start)],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, f"{kind} files from {start}: exit status {child.returncode}\n{child.stderr[-3000:]}"
    found: dict[str, int] = json.loads(child.stdout)
    assert "wrong" not in found, child.stderr[-3000:]
    return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
