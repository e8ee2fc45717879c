"""comfy-cli, with a home of its own, so that it neither reads nor writes the user's settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from . import comfy


@pytest.fixture(scope="session")
def comfy_cli(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs it in the pack's folder, or in another; gives what it printed."""
    home = str(tmp_path_factory.mktemp("home"))
    environment = os.environ | {"HOME": home, "XDG_CONFIG_HOME": home, "COMFY_CLI_NO_REMOTE_REFRESH": "1"}

    def run(*arguments: str, folder: Path = comfy.PACK) -> str:
        command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", *arguments]
        process = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        return process.stdout + process.stderr

    run("tracking", "disable")
    return run
