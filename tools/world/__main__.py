"""The small world's workshop, from the repository's root: `python tools/world table --backbone pixart_sigma`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # that of the package, not the folder that is run

from world import classifier, compare_piecewise, decoder, ship, table, train

COMMANDS = {
    "train": train.main, "decoder": decoder.main, "classifier": classifier.main, "ship": ship.main, "table": table.main,
    "compare_piecewise": compare_piecewise.main,
}  # fmt: skip


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        sys.exit(f"usage: tools/world {{{','.join(COMMANDS)}}} …")
    COMMANDS[name](sys.argv[2:])


if __name__ == "__main__":
    main()
