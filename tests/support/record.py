"""Figures that tests measured, kept for the documentation where `EDIT_TEST_RECORD` names a folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from filelock import FileLock


def version(checkout: Path) -> str:
    """Which ComfyUI a checkout is."""
    (found,) = re.findall(r'__version__ = "(.*)"', (checkout / "comfyui_version.py").read_text(encoding="utf-8"))
    return str(found)


def record(name: str, checkout: Path, figures: dict[str, Any], keep: bool = False) -> None:
    """Puts one ComfyUI's figures into `name`.json, in place of what it held of this version.

    Args:
        keep: leave there what these figures are without.
    """
    print(json.dumps(figures))
    if folder := os.environ.get("EDIT_TEST_RECORD"):
        path = Path(folder) / f"{name}.json"
        with FileLock(f"{path}.lock"):
            held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            before = held.get(version(checkout), {}) if keep else {}
            held[version(checkout)] = before | figures
            path.write_text(
                json.dumps(dict(sorted(held.items())), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        Path(f"{path}.lock").unlink(missing_ok=True)
