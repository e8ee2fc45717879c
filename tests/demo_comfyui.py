"""The last part of `make demo`: every workflow on a real ComfyUI server.

The small world's pictures are drawn as they are; everything else runs with a few steps and small sizes, on small random
stand-ins for the files that do not come with the pack.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from PIL import Image
from support import comfy
from support.server import Server
from support.workflows import NAMES, draw, furnished, write_stand_ins

OUT = comfy.PACK / "out"


def main() -> None:
    found = comfy.checkouts()
    if not found:
        print(comfy.NO_COMFYUI.replace("the checks inside ComfyUI are skipped", "its part of the demo is skipped"))
        return
    OUT.mkdir(exist_ok=True)
    print("\n| ComfyUI | workflow | pictures | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        files = write_stand_ins(Path(temporary) / "files")
        for checkout in found:
            base = Path(temporary) / checkout.name
            base.mkdir()
            with Server(checkout, furnished(base, checkout, files)) as server:
                for seed, name in enumerate(NAMES):  # made small, some are alike, and ComfyUI would draw them once
                    start = time.perf_counter()
                    pictures = draw(server, name, seed, whole=name.startswith("small_world") and name.endswith("_ab"))
                    seconds = time.perf_counter() - start
                    for prefix, picture in pictures.items():
                        Image.fromarray(picture).save(OUT / f"{checkout.name}_{name}_{Path(prefix).name}.png")
                    print(f"| {checkout.name} | {name} | {len(pictures)} | {seconds:.1f} |", flush=True)
    print(f"\npictures: {OUT.name}/ (noise but for the small world's: the other weights are random)")


if __name__ == "__main__":
    main()
