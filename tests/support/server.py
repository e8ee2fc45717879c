"""A real ComfyUI server as a subprocess, with this pack in its custom_nodes, driven over HTTP as a user's client is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

from . import comfy

PACK_NAME = "edit-attention"
"""The folder's name in custom_nodes, as the registry would install it: it differs from the repository's on purpose."""

READY_SECONDS = 600
PROMPT_SECONDS = 120


class ServerError(RuntimeError):
    """The server did not start, or refused or failed a prompt."""


class Run(NamedTuple):
    outputs: dict[str, Any]
    """By node id, as in /history."""
    cached: set[str]
    """Ids of the nodes that were not executed again."""
    interrupted: bool = False


class Server:
    """A context manager; `base` is the --base-directory, and what the server writes goes there.

    The pack in it is this one, or what an archive of it holds.
    """

    def __init__(self, checkout: Path, base: Path, archive: Path | None = None) -> None:
        self.checkout, self.base, self.archive = checkout, base, archive
        self.log = base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        (self.base / "custom_nodes").mkdir(parents=True, exist_ok=True)
        pack = self.base / "custom_nodes" / PACK_NAME
        if self.archive is None:
            pack.symlink_to(comfy.PACK, target_is_directory=True)
        else:
            with zipfile.ZipFile(self.archive) as packed:
                packed.extractall(pack)
        command = [
            comfy.interpreter(self.checkout), str(self.checkout / "main.py"), "--cpu", "--listen", "127.0.0.1",
            "--port", str(self.port), "--base-directory", str(self.base), "--disable-auto-launch",
            "--disable-api-nodes", "--database-url", "sqlite:///:memory:",
            "--cache-classic",  # keeps only the last prompt's results, so that an earlier one is computed afresh
        ]  # fmt: skip
        with self.log.open("wb") as log:
            # Spinning threads make a busy machine several times slower; what the user's machine measured is not asked.
            environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "XDG_CACHE_HOME": str(self.base / "cache")}
            self._process = subprocess.Popen(
                command, cwd=self.base, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        return self._request(path)

    def get_json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def post(self, path: str, data: dict[str, Any]) -> bytes:
        return self._request(path, data)

    def run(self, prompt: dict[str, Any]) -> Run:
        """Executes an API prompt.

        Raises:
            ServerError: the prompt is not valid, a node failed, or it took too long.
        """
        return self.wait(self.submit(prompt))

    def submit(self, prompt: dict[str, Any]) -> str:
        """Queues an API prompt; returns its id.

        Raises:
            ServerError: it is not valid.
        """
        return str(json.loads(self._request("/prompt", {"prompt": prompt}))["prompt_id"])

    def running(self) -> set[str]:
        """Ids of the prompts that are being executed."""
        return {entry[1] for entry in self.get_json("/queue")["queue_running"]}

    def wait(self, prompt_id: str) -> Run:
        """The result of a queued prompt, once it is there.

        Raises:
            ServerError: a node failed, or it took too long.
        """
        end = time.monotonic() + PROMPT_SECONDS
        while time.monotonic() < end:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                messages = dict(entry["status"]["messages"])
                if failed := messages.get("execution_error"):
                    raise ServerError(
                        f"{failed['node_type']}: {failed['exception_type']}: {failed['exception_message']}"
                    )
                return Run(
                    entry["outputs"],
                    set(messages["execution_cached"]["nodes"]),
                    "execution_interrupted" in messages,
                )
            self._check_alive()
            time.sleep(0.1)
        raise ServerError(f"no result after {PROMPT_SECONDS} s:\n{self._log_tail()}")

    def resident(self) -> int:
        """Bytes of memory that the server's process holds."""
        assert self._process is not None
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def interrupt(self) -> None:
        """Asks the node that is running to stop, as the button does."""
        self._request("/interrupt", {})

    def _request(self, path: str, data: dict[str, Any] | None = None) -> bytes:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {error.code}: {error.read().decode(errors='replace')}") from None

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            self._check_alive()
            try:
                self.get("/prompt")
                return
            except urllib.error.URLError:
                time.sleep(0.2)
        raise ServerError(f"not ready after {READY_SECONDS} s:\n{self._log_tail()}")

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise ServerError(f"the server is not running:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        return self.log_text()[-3000:]
