"""Commands that meet a fault: killed at a file operation, or on a full disk. Each runs in a process of its own.

A process that has imported everything forks them, since imports would take longer than all else.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ("replace", "rename", "fsync", "unlink", "rmdir")
"""Of `os`: after which a folder or a disk holds something else."""
NOT_ALLOWED = 77
_DISK = 1 << 26  # bytes
_SECONDS = 300  # after which a process that hangs is ended
_CLONE_NEWNS, _CLONE_NEWUSER, _MS_REC, _MS_PRIVATE = 0x00020000, 0x10000000, 1 << 14, 1 << 18


class Outcome(NamedTuple):
    status: int
    """Exit status, or minus the signal's number."""
    said: str
    """What it wrote to stderr, its threads and libraries too."""


class Forks:
    """A context manager; `run` forks a process that does one of the jobs below, and waits for it."""

    def __init__(self, folder: Path) -> None:
        self._said = folder / "said.txt"
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Forks:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.communicate()

    def run(self, job: Callable[..., int], *arguments: Any) -> Outcome:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        order = {"job": job.__name__, "arguments": arguments, "said": str(self._said)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Outcome(int(self._process.stdout.readline()), self._said.read_text())


# --- jobs: they give the exit status ---


def command(words: list[str]) -> int:
    from edit_core.cli import main

    return main(words)


def killed(words: list[str], call: int, log: str) -> int:
    """A command that SIGKILL ends right before its `call`-th file operation, which `log` then has a line of."""
    left = [call]

    def dying(name: str) -> Any:
        original = getattr(os, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                with open(log, "a") as file:
                    file.write(f"{name} {arguments[0]}\n")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return operation

    for name in OPERATIONS:
        setattr(os, name, dying(name))
    return command(words)


def limited(words: list[str], size: int, saves: int) -> int:
    """A training no file of which may grow beyond `size` bytes once it has written so many checkpoints."""
    from edit_core.distill.engine import Engine

    save, left = Engine.save, [saves]

    def limiting(engine: Engine) -> Path:
        written = save(engine)
        left[0] -= 1
        if left[0] == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return written

    Engine.save = limiting  # type: ignore[method-assign]
    return command(words)


def on_a_full_disk(words: list[str], disk: str, free: int, keep: str) -> int:
    """A command on a small disk of which something else leaves `free` bytes; then again with `--resume latest`, with
    that removed. The disk is copied to `keep/full` and `keep/mended`, since it is gone when this process ends.
    """
    _mount(disk, _DISK)
    ballast = Path(disk) / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, _DISK - free)
    status = command(words)
    ballast.unlink()
    shutil.copytree(disk, Path(keep) / "full")
    assert command([*words, "--resume", "latest"]) == 0
    shutil.copytree(disk, Path(keep) / "mended")
    return status


def _mount(folder: str, size: int) -> None:
    """A tmpfs that this process alone sees; ends the process where that cannot be had."""
    if sys.platform != "linux":
        raise SystemExit(NOT_ALLOWED)
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments):
            print(f"{name}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
            raise SystemExit(NOT_ALLOWED)

    call("unshare", _CLONE_NEWNS | (_CLONE_NEWUSER if user else 0))
    if user:
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{file}").write_text(text)
    call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode())


def _import_everything() -> None:
    sys.path.insert(0, str(ROOT))
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import PixArtSigmaPipeline, StableDiffusion3Pipeline  # noqa: F401

    import edit_core.cli
    import edit_core.distill.engine  # noqa: F401


def _serve() -> None:
    _import_everything()
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process:
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
            continue
        signal.alarm(_SECONDS)
        with open(order["said"], "w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        sys.exit(globals()[order["job"]](*order["arguments"]))


if __name__ == "__main__":
    _serve()
