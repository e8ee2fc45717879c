"""Checks of names that lead elsewhere and of files that are in the way; `inside.py` runs them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from host import folder_paths, load, run, user_error


def found(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def check_saving_stays_in_its_folder_and_replaces_nothing(b: str) -> Any:
    made = run("EDiTInit", model=load(b), compression=4, layers="0")
    edit = Path(folder_paths.get_folder_paths("edit")[0])
    outside, name = edit.parents[1], f"{b}_hostile"
    before = found(outside)
    said = [
        user_error("filename_prefix", run, "EDiTSaveWeights", edit_weights=made, filename_prefix=prefix)
        for prefix in ("../x", "a/../../x", "/tmp/x", str(outside / "x"), "sub/../../../x")
    ]
    said += [
        user_error("filename_prefix", run, "EDiTSaveWeights", edit_weights=made, filename_prefix=prefix)
        for prefix in ("n" * 240, "a\0b")
    ]
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
