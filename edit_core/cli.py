"""The command line: `python -m edit_core COMMAND`, or `edit COMMAND` once installed."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Sequence

import torch

from . import __version__
from .commands import COMMANDS
from .errors import EDiTError, EDiTResultError, said

__all__ = ["main"]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults where there are some, and not of what must be given that it is None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0 on success, 1 if a check fails, 2 on bad usage, 130 after Ctrl-C."""
    _write_what_can_be_written()
    parser = argparse.ArgumentParser(prog="edit_core", description="EDiT: linear attention for diffusion transformers.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip().split("\n\n")[0]
        sub = subparsers.add_parser(name, help=summary, description=command.__doc__, formatter_class=_Help)
        command.add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="print the result as JSON, for machines")
        sub.set_defaults(command=command)
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes a list of texts in one place alone, and leaves what stands behind a later option
        if "overrides" not in options or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides += rest
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        result = options.command.run(options)
    except EDiTError as error:
        print(f"edit_core: {error}", file=sys.stderr)
        return 1 if isinstance(error, EDiTResultError) else 2
    except OSError as error:  # a full disk, a folder that may not be written, a file that has come meanwhile
        print(f"edit_core: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("edit_core: stopped", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        advice = "take fewer or smaller pictures at a time, or a narrower dtype"
        print(f"edit_core: the device's memory does not suffice ({said(error)}); {advice}", file=sys.stderr)
        return 2
    if result is not None:
        print(json.dumps(result.data, indent=1) if options.json else result.text)
    return 0


def _write_what_can_be_written() -> None:
    """Has stdout write what its encoding lacks, as Σ in a pipe on Windows, as an escape: a command does not fail by it.

    stderr does so from the start.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
