"""For a process of its own: trains by a configuration until a step, resuming where there is a checkpoint."""

from __future__ import annotations

import sys
from typing import Any

import torch

from edit_core.distill.config import load_config
from edit_core.distill.engine import Engine


def stop_after(engine: Engine, total: int) -> None:
    """Tells a training to stop after its `total`-th step, as a signal would."""
    update = engine._update

    def counted(*args: Any) -> bool:
        engine.stopping = engine.total + 1 >= total
        return update(*args)

    engine._update = counted  # type: ignore[method-assign]


def main(file: str, stop_at: int) -> None:
    torch.set_num_threads(1)
    engine = Engine(load_config(file))
    engine.resume()
    stop_after(engine, stop_at)
    engine.run()
    parameters = list(engine.transformer.transformer_blocks[0].parameters())
    print(f"rank {engine.processes.rank} of {engine.processes.world}: {engine.total} steps, "
          f"{sum(type(p).__name__ == 'DTensor' for p in parameters)} sharded parameters in a block")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
