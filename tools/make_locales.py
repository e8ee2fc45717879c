"""Writes `locales/en/nodeDefs.json` from the schemas: `python make_locales.py OBJECT_INFO`.

OBJECT_INFO is a ComfyUI server's saved answer to GET /object_info. Other languages are written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ENGLISH = Path(__file__).resolve().parents[1] / "locales" / "en" / "nodeDefs.json"


def english_of(info: dict[str, Any]) -> dict[str, Any]:
    """Names and tooltips of this pack's nodes, by node id, in the form in which ComfyUI's page looks them up."""
    return {
        name: {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": {
                key: {"name": options.get("display_name", key), "tooltip": options["tooltip"]}
                for section in ("required", "optional")
                for key, (_, options) in node["input"].get(section, {}).items()
            },
            "outputs": {
                str(number): {"name": title, "tooltip": tooltip}
                for number, (title, tooltip) in enumerate(
                    zip(node["output_name"], node["output_tooltips"], strict=True)
                )
            },
        }
        for name, node in sorted(info.items())
        if name.startswith("EDiT")
    }


def text_of(info: dict[str, Any]) -> str:
    """What the file holds."""
    return json.dumps(english_of(info), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    info = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(text_of(info), encoding="utf-8")


if __name__ == "__main__":
    main()
