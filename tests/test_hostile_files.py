"""Hostile and broken files: each is read rightly or refused by one sentence; no writer takes another's file away."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fuzz, models

from edit_core import EDiTConfig, EDiTError, EDiTWeights, EDiTWeightsError
from edit_core.basefile import BaseFile
from edit_core.cli import main
from edit_core.distill.config import load_config
from edit_core.errors import EDiTConfigError, EDiTModelError
from edit_core.files import new_output, write_file

COUNTS = {"weights": 7000, "base": 1500, "cache": 1000, "config": 500}
"""Mutated files of each kind; `make fuzz` tries more."""


@pytest.fixture(scope="module")
def weights() -> EDiTWeights:
    return EDiTWeights.init(models.pixart(heads=1, head_dim=8, blocks=1, caption=8))


@pytest.fixture
def saved(weights: EDiTWeights, tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    weights.save(path)
    return path


@pytest.fixture
def impatient() -> Iterator[None]:
    """Ends a test that waits for something that never comes."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_mutated_files_are_read_or_refused_by_one_sentence(kind: str, record_property: Any) -> None:
    found = fuzz.run(kind, COUNTS[kind])
    assert sum(found[what] for what in ("read", "refused")) == found["files"] == COUNTS[kind]
    assert min(found["read"], found["refused"]) > COUNTS[kind] // 100, "the mutations are all of one kind"
    for what, count in found.items():
        record_property(f"{kind} {what}", count)


def refused(path: Path | str, part: str) -> None:
    for read in (EDiTWeights.load, lambda path: BaseFile(path).identify()):
        with pytest.raises((EDiTWeightsError, EDiTModelError)) as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(EDiTWeightsError, match=part) as caught:
        EDiTWeights.load(path)
    assert str(path) in str(caught.value)


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a file's header, and leaves its data."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


# --- what stands in for a file ----------------------------------------------------------------------------------------


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, saved: Path, impatient: None) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    for name in ("pipe.safetensors", "nowhere.safetensors", "loop.safetensors", "n" * 5000, "a\0b", "/dev/zero"):
        refused(tmp_path / name, "there is no such file")
    refused(tmp_path, "there is no such file")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "not a complete safetensors file")
    for name in ("pipe.safetensors", "n" * 5000):
        with pytest.raises(EDiTConfigError, match="there is no such file"):
            load_config(str(tmp_path / name))


def test_a_link_to_a_file_is_that_file(tmp_path: Path, saved: Path, weights: EDiTWeights) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(saved)
    assert EDiTWeights.load(link).tensors.keys() == weights.tensors.keys()
    weights.save(link)  # replaces the link, and not what it points to
    assert not link.is_symlink()
    EDiTWeights.load(saved)


def _as_nobody(work: Callable[..., None], *arguments: Any) -> None:
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    work(*arguments)


def _try_forbidden(folder: Path) -> None:
    refused(folder / "file.safetensors", "cannot be read")
    refused(folder / "closed" / "w.safetensors", "there is no such file")
    assert main(["init", str(folder / "file.safetensors"), str(folder / "x")]) == 2
    assert main(["info", str(folder / "closed" / "w")]) == 2


def test_what_may_not_be_read_is_said_to_be_so(tmp_path: Path, saved: Path) -> None:
    for path in (tmp_path, *list(tmp_path.parents)[:3]):
        path.chmod(0o755)
    (tmp_path / "file.safetensors").write_bytes(saved.read_bytes())
    (tmp_path / "file.safetensors").chmod(0)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "w.safetensors").write_bytes(saved.read_bytes())
    (tmp_path / "closed").chmod(0)
    child = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(_try_forbidden, tmp_path))
    child.start()
    child.join()
    (tmp_path / "closed").chmod(0o755)
    assert child.exitcode == 0


# --- what files claim -------------------------------------------------------------------------------------------------


def test_shapes_are_checked_before_anything_is_read(tmp_path: Path, saved: Path) -> None:
    """A file of 16 GiB (nearly all of it a hole) whose one tensor is of the wrong shape takes no memory."""
    path = tmp_path / "huge.safetensors"
    entry = {"dtype": "F32", "shape": [65536, 65536], "data_offsets": [0, 1 << 34]}
    header = {"__metadata__": EDiTWeights.load(saved).metadata(), "0.self.conv_fusion.up.weight": entry}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (1 << 34))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EDiTWeightsError, match=r"up.weight is 65536x65536, but compression=4 asks for 65536x16384"):
        EDiTWeights.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 15  # KiB


def test_a_header_by_the_megabyte_is_refused_unparsed(saved: Path) -> None:
    def fill(header: dict[str, Any]) -> None:
        header["__metadata__"]["training"] = json.dumps({"note": "x" * (5 << 20)})

    with_header(saved, fill)
    with pytest.raises(EDiTWeightsError, match=r"its header has 52\d{5} bytes, but that of EDiT weights has 4194304"):
        EDiTWeights.load(saved)


def test_blocks_by_the_thousand_are_refused_at_once(saved: Path) -> None:
    """Modules were built for each block that a name pretends there is: minutes for a small file."""

    def fill(header: dict[str, Any]) -> None:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header.update({f"{block}.self.x": empty for block in range(40_000)})

    with_header(saved, fill)
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(EDiTWeightsError, match="tensors are missing"):
        EDiTWeights.load(saved)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - begin < 20


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ('{"compression": 1' + "0" * 5000 + "}", "4300 digits"),
        ('{"eps": 1' + "0" * 400 + "}", "eps must be a number"),
        ('{"kernel": "' + "x" * 100_000 + '"}', "kernel must be one of"),
        ('{"\\ud800\\n": 1}', "unknown to this version"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["digits", "overflow", "long", "surrogate", "deep"],
)
def test_metadata_that_bursts_a_parser_is_one_short_sentence(saved: Path, config: str, part: str) -> None:
    with_header(saved, lambda header: header["__metadata__"].update(config=config))
    with pytest.raises(EDiTWeightsError, match=part) as caught:
        EDiTWeights.load(saved)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_names_cannot_write_to_the_terminal_or_into_the_log(saved: Path) -> None:
    def fill(header: dict[str, Any]) -> None:
        for name in ("\x1b[2J", "a\nERROR: b", "n" * 1000):
            header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}

    with_header(saved, fill)
    report = str(EDiTWeights.load_with_report(saved)[1])
    assert report.isprintable() and len(report) < 600 and "3 unexpected tensors" in report


def test_a_base_whose_biases_are_no_vectors_is_said_to_be_damaged(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = models.pixart(heads=1, head_dim=8, blocks=2, caption=8).state_dict()
    path = tmp_path / "base.safetensors"
    for block, tensor in ((0, torch.tensor(1.0)), (0, torch.empty(0)), (1, torch.zeros(3)), (1, torch.zeros(8, 8))):
        save_file({**state, f"transformer_blocks.{block}.attn1.to_out.0.bias": tensor}, path)
        with pytest.raises(EDiTModelError, match=rf"base.safetensors is damaged: its transformer_blocks.{block}"):
            BaseFile(path).identify()


def test_yaml_neither_runs_anything_nor_unfolds(tmp_path: Path, impatient: None) -> None:
    path = tmp_path / "c.yaml"
    bombs = {
        f"!!python/object/apply:os.mkdir [{tmp_path / 'made'}]": "not YAML: could not determine a constructor",
        fuzz.YAML_BOMBS[0]: r"an alias \(\*name\) is not read here",
        "a: " + "[" * 100_000: "nested more than 20 deep",
        "a: 2024-13-45": "month must be in 1..12",
    }
    for text, part in bombs.items():
        path.write_text(text)
        with pytest.raises(EDiTConfigError, match=part) as caught:
            load_config(str(path))
        assert str(path) in str(caught.value)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EDiTConfigError, match="cannot be read"):
        load_config(str(path))


# --- writers ----------------------------------------------------------------------------------------------------------


def _save_numbered(folder: Path, weights: EDiTWeights, who: str, times: int) -> None:
    torch.set_num_threads(1)
    for turn in range(times):
        marked, number = replace(weights, training={"who": who, "turn": turn}), 1
        while True:  # as the node does
            try:
                marked.save(folder / f"edit_{number:05}_.safetensors", replace=False)
                break
            except FileExistsError:
                number += 1


def test_writers_at_once_keep_each_others_files(weights: EDiTWeights, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_numbered, args=(tmp_path, weights, who, 25)) for who in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"edit_{n:05}_.safetensors" for n in range(1, 76)]
    made = [EDiTWeights.load(path).training for path in tmp_path.iterdir()]
    assert sorted((m["who"], m["turn"]) for m in made) == [(who, turn) for who in "abc" for turn in range(25)]


def _save_over(path: Path, weights: EDiTWeights, value: float, times: int) -> None:
    torch.set_num_threads(1)
    same = replace(weights, tensors={name: torch.full_like(t, value) for name, t in weights.tensors.items()})
    for _ in range(times):
        same.save(path)


def test_a_reader_beside_two_writers_of_one_name_always_finds_a_whole_file(
    weights: EDiTWeights, tmp_path: Path
) -> None:
    path, context = tmp_path / "w.safetensors", multiprocessing.get_context("fork")
    weights.save(path)
    writers = [context.Process(target=_save_over, args=(path, weights, value, 40)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    values = [{1.0}, {2.0}, {v for t in weights.tensors.values() for v in t.unique().tolist()}]
    while any(writer.is_alive() for writer in writers):
        loaded = EDiTWeights.load(path)
        assert {v for t in loaded.tensors.values() for v in t.unique().tolist()} in values
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("links", [True, False], ids=["a disk with links", "FAT"])
def test_a_file_that_is_there_is_not_replaced_unless_told_so(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_link)
    path = tmp_path / "file"
    write_file(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_file(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    write_file(path, b"third")
    assert path.read_bytes() == b"third"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "link", b"through a link", replace=False)
    with pytest.raises(EDiTError, match="exists already"):
        new_output(tmp_path / "link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_commands_do_not_replace_a_file_that_came_meanwhile_and_say_so_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    base, output = tmp_path / "base.safetensors", tmp_path / "w.safetensors"
    save_file(models.pixart(heads=1, head_dim=8, blocks=1, caption=8).state_dict(), base)
    make = EDiTWeights.init_for

    def slowly(*arguments: Any, **options: Any) -> EDiTWeights:
        output.write_bytes(b"another's")
        return make(*arguments, **options)

    monkeypatch.setattr(EDiTWeights, "init_for", slowly)
    assert main(["init", str(base), str(output)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "File exists" in said and str(output) in said
    assert output.read_bytes() == b"another's"
    output.unlink()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EDiTWeights, "init_for", make)
    monkeypatch.setattr(os, "fsync", full_disk)
    assert main(["init", str(base), str(output)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not output.exists()


def test_presets_of_every_form_survive_a_round_trip_through_a_hostile_path(tmp_path: Path) -> None:
    """Names that a shell, a URL or a format string would take for something else are only names here."""
    model = models.pixart(heads=1, head_dim=8, blocks=1, caption=8)
    for name in ("%s%n.safetensors", "a b'\"$(x);.safetensors", "‮fdp.safetensors", "-rf.safetensors", "http:x"):
        path = tmp_path / name
        EDiTWeights.init(model, EDiTConfig(), layers="0").save(path)
        assert EDiTWeights.load(path).sites == {0: ("self",)}
