"""Checks of names that lead elsewhere and of files that are in the way; `inside.py` runs them."""

from __future__ import annotations

import importlib
import os
import threading
from pathlib import Path
from typing import Any

from host import BASE, folder_paths, load, run, user_error

import nodes


def found(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def check_saving_stays_in_its_folder_and_replaces_nothing(b: str) -> Any:
    made = run("EDiTInit", model=load(b), compression=4, layers="0")
    edit = Path(folder_paths.get_folder_paths("edit")[0])
    outside, name = edit.parents[1], f"{b}_hostile"
    before = found(outside)
    said = [
        user_error("filename_prefix", run, "EDiTSaveWeights", edit_weights=made, filename_prefix=prefix)
        for prefix in ("../x", "a/../../x", "/tmp/x", str(outside / "x"), "sub/../../../x", "a\0b")
    ]
    said += [user_error("cannot be written", run, "EDiTSaveWeights", edit_weights=made, filename_prefix="n" * 240)]
    new = found(outside) - before
    assert not [path for path in new if not path.startswith("models/edit/") or path.endswith((".safetensors", ".part"))]

    (edit / f"{name}_00001_.safetensors").write_bytes(b"another's")
    threads = [
        threading.Thread(target=run, args=("EDiTSaveWeights",), kwargs={"edit_weights": made, "filename_prefix": name})
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = sorted(path.name for path in edit.glob(f"{name}_*"))
    assert numbers == [f"{name}_{n:05}_.safetensors" for n in range(1, 10)], numbers
    assert (edit / numbers[0]).read_bytes() == b"another's"
    for other in numbers[1:]:
        assert list(run("EDiTLoadWeights", edit_name=other).sites) == [0]
    for other in numbers:
        os.unlink(edit / other)
    assert not any("\n" in line for line in said)
    return said


def check_a_folder_in_extra_model_paths_is_read_and_not_saved_to(b: str) -> Any:
    made = run("EDiTInit", model=load(b), compression=4, layers="0")
    files = importlib.import_module(nodes.NODE_CLASS_MAPPINGS["EDiTSaveWeights"].__module__)
    edit, other = Path(folder_paths.models_dir, "edit"), BASE / f"elsewhere-{b}"
    kept = folder_paths.folder_names_and_paths.pop("edit")
    try:
        folder_paths.add_model_folder_path("edit", str(other))  # as ComfyUI does at its start, before it loads packs
        files.register_model_folder()
        run("EDiTSaveWeights", edit_weights=made, filename_prefix=f"{b}_extra")
        (saved,) = edit.glob(f"{b}_extra*")
        assert not other.exists()
        other.mkdir()
        saved.rename(other / saved.name)
        assert list(run("EDiTLoadWeights", edit_name=saved.name).sites) == [0]
    finally:
        folder_paths.folder_names_and_paths["edit"] = kept
    return None
