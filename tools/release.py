"""Makes a checkout ready for the registry: `python release.py OWNER/NAME v0.1.0` (the publishing workflow runs it).

The registry wants addresses of the repository, the icon and the banner, and a fork or a mirror has others than ours:
so they are filled in where the repository's name is known, and not before.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ICON, BANNER = "docs/icon.png", "docs/banner.png"


def changes(changelog: str, version: str) -> str:
    """What a changelog says of a version that is dated.

    Raises:
        ValueError: it has no such version, or says that it is not released yet.
    """
    found = re.search(rf"^## \[{re.escape(version)}\] - (\S+)\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if not found:
        raise ValueError(f"CHANGELOG.md has no entry [{version}]")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", found[1]):
        raise ValueError(f"CHANGELOG.md says that {version} is {found[1]}; put the date there")
    return found[2].strip()


def addressed(pyproject: str, repository: str, tag: str) -> str:
    """`pyproject.toml` with the addresses of a repository `owner/name` on GitHub, as of a tag.

    Raises:
        ValueError: the tag is not the version's.
    """
    version = re.search(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    if version is None or tag != f"v{version[1]}":
        raise ValueError(f"the tag is {tag}, and pyproject.toml has version {version and version[1]}")
    page, files = f"https://github.com/{repository}", f"https://raw.githubusercontent.com/{repository}/{tag}"
    urls = {
        "Repository": page,
        "Documentation": f"{page}#readme",
        "Issues": f"{page}/issues",
        "Changelog": f"{page}/blob/{tag}/CHANGELOG.md",
    }
    pictures = {"Icon": f"{files}/{ICON}", "Banner": f"{files}/{BANNER}"}
    for table, entries in (("project.urls", urls), ("tool.comfy", pictures)):
        lines = "".join(f'{name} = "{value}"\n' for name, value in entries.items())
        pyproject = pyproject.replace(f"[{table}]\n", f"[{table}]\n{lines}", 1)
    return pyproject


def main(repository: str, tag: str) -> str:
    """Fills in the addresses, and gives the changes of this version."""
    path = ROOT / "pyproject.toml"
    text = addressed(path.read_text(encoding="utf-8"), repository, tag)
    found = changes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), tag.removeprefix("v"))
    path.write_text(text, encoding="utf-8")
    return found


if __name__ == "__main__":
    try:
        print(main(*sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
