"""Tries the tests: does any of them fail when the code is wrong? `tools/mutants.py --minutes 45`.

mutmut makes the mutants of what follows EDiT's formulas and of what patches the hosts, each one small mistake in one
function. Of all of them, in an order that a mutant's own text decides, as many as there is time for are put one at
a time into a copy of the repository, where the tests of that file run until one fails. A process that has imported
torch and diffusers forks for each, which saves most of the time. docs/mutants.json keeps what was found, so that a run
goes on where the last one ended; docs/mutants-survivors.json says of each survivor why it may live.

mutmut's own runner is not used: its mutants are chosen while the code runs, by what no compiled graph can hold, and
tests here look into those, and into ComfyUI processes that import the pack by themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

RESULTS, REASONS = ROOT / "docs" / "mutants.json", ROOT / "docs" / "mutants-survivors.json"
PAGE = ROOT / "docs" / "reliability.md"

FORMULAS = ("attention", "numbers", "baselines", "structure", "diffusers", "kernels")
PATCHES = ("diffusers", "differences", "structure", "bench_layers")
BASES = ("backbones", "differences", "diffusers", "convert", "comfyui")
TESTS: dict[str, tuple[str, ...]] = {
    "edit_core/attention/__init__.py": FORMULAS,
    "edit_core/attention/call.py": FORMULAS,
    "edit_core/attention/forms.py": FORMULAS,
    "edit_core/attention/joint.py": FORMULAS,
    "edit_core/attention/keys.py": FORMULAS,
    "edit_core/attention/linear.py": FORMULAS,
    "edit_core/attention/modules.py": FORMULAS,
    "edit_core/attention/queries.py": FORMULAS,
    "edit_core/attention/sites.py": FORMULAS,
    "edit_core/attention/slices.py": ("structure", *FORMULAS),
    "edit_core/apply.py": PATCHES,
    "edit_core/processors.py": PATCHES,
    "edit_core/backbones/__init__.py": BASES,
    "edit_core/backbones/base.py": BASES,
    "edit_core/backbones/pixart_sigma.py": BASES,
    "edit_core/backbones/sd35_medium.py": BASES,
    "nodes/patcher.py": ("comfyui",),
}
"""The files and their tests, the likeliest to fail first, without what compiles graphs: it takes a minute, and each
survivor would have to wait for it. `attention/naive.py` is the specification, not code."""
CHECKS = (
    "check_edit_changes_the_output_and_leaves_the_base_bit_equal",
    "check_what_stays_dense_says_why_once",
    "check_tokens_that_do_not_fill_the_grid_stay_dense",
    "check_another_packs_wrapper_may_pass_on_by_name",
    "check_other_packs_forward_patch_is_warned_of_and_restored",
    "check_clones_do_not_change_their_parent",
    "check_low_precision_bases_keep_the_fingerprint",
    "check_side_weights_are_loaded_and_counted",
    "check_deep_copied_base_is_independent",
    "check_differences_say_what_they_do_and_add_up",
    "check_output_equals_diffusers",
    "check_differences_equal_diffusers",
    "check_baselines_equal_diffusers",
)
"""What `comfyui` stands for: those of the checks in ComfyUI that patching could fail, on SD3.5, whose smallest model is
the quicker; the last three on both."""
MATRIX = "check_a_clone_dropped_while_sampling_takes_nothing_along[sd35_medium]"
"""And of the composition matrix."""
LIMIT = 400
"""Seconds for one mutant; one that ends nothing before is taken for an endless loop, which is a failure too."""


class Mutant:
    """A function of a file with one small mistake in it."""

    def __init__(self, file: str, source: str, module: Any, function: Any, mistaken: Any) -> None:
        self.file, self.source = file, source
        self.text = lambda: module.deep_replace(function, mistaken).code
        was, now, _ = changed(module.code_for_node(function), module.code_for_node(mistaken))
        self.key = f"{file}, {function.name.value}: {was} -> {now}"

    def line(self) -> int:
        return changed(self.source, self.text())[2]


def changed(source: str, mutated: str) -> tuple[str, str, int]:
    """The lines that differ, as they are in one and in the other text, and the number of the first."""
    a, b = source.splitlines(), mutated.splitlines()
    same = next(i for i in range(len(a)) if a[i] != b[i])
    after = list(zip(a[:same:-1], b[:same:-1], strict=False))
    rest = next((i for i, (one, other) in enumerate(after) if one != other), len(after))
    was, now = (" ".join(line.strip() for line in lines[same : len(lines) - rest]) for lines in (a, b))
    return was, now, same + 1


def mutants() -> list[Mutant]:
    """All that mutmut makes, in the order in which they are tried."""
    from libcst import FunctionDef
    from mutmut.mutation.file_mutation import create_mutations

    found: dict[str, Mutant] = {}
    for file in TESTS:
        source = (ROOT / file).read_text(encoding="utf-8")
        module, made, *_ = create_mutations(file, source)
        for mutation in made:
            function = mutation.contained_by_top_level_function
            if isinstance(function, FunctionDef):  # mutmut leaves the rest of a module alone
                mistaken = function.deep_replace(mutation.original_node, mutation.mutated_node)
                mutant = Mutant(file, source, module, function, mistaken)
                found.setdefault(mutant.key, mutant)
    return sorted(found.values(), key=lambda mutant: hashlib.sha256(mutant.key.encode()).digest())


class FirstFailure:
    """A plugin of pytest that keeps which test failed."""

    name: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.name = report.nodeid.rpartition("/")[2]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.name = f"importing {report.nodeid.rpartition('/')[2]}"


def by_pytest(tests: tuple[str, ...]) -> str | None:
    """The first test to fail, or None."""
    import pytest

    first, files = FirstFailure(), [f"tests/test_{name}.py" for name in dict.fromkeys(tests)]
    options = ["-c", "tests/pytest.ini", "-xq", "-p", "no:cacheprovider", "-m", "not slow", "-k", "not compile"]
    options.append("--hypothesis-profile=unshrunk")
    code = pytest.main([*options, "--basetemp=temporary", *files], [first])
    return first.name or (f"pytest ends with {code}" if code else None)


def in_comfyui() -> str | None:
    """The first of a few checks to fail in the newest ComfyUI, or None."""
    from support import comfy, models
    import test_comfyui

    checkout, base = max(comfy.checkouts(), key=comfy.version), Path("base").resolve()
    if not base.exists():
        comfy.write_files(base)
    cells = [f"{check}[sd35_medium]" for check in CHECKS] + [f"{check}[pixart_sigma]" for check in CHECKS[-3:]]
    found: dict[str, Any] = {}
    for script, wanted in ((test_comfyui.INSIDE, cells), (test_comfyui.INSIDE.with_name("matrix.py"), [MATRIX])):
        (base / "results.json").unlink(missing_ok=True)
        found |= comfy.run_checks(script, checkout, base, *wanted)
        if failed := [cell for cell in found if not found[cell]["ok"]]:
            return failed[0]
    for backbone in models.BACKBONES:
        for kind in ("edit", "low_rank", "full"):
            try:
                test_comfyui.test_diffusers_and_comfyui_give_the_same_output(
                    checkout, backbone, kind, "34x40", lambda _: (base, found), base
                )
            except AssertionError:
                return f"test_diffusers_and_comfyui_give_the_same_output[{kind}-{backbone}]"
    return None


def in_fork(copy: Path, tests: tuple[str, ...]) -> str | None:
    with open(copy / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(copy)
    ours = [str(copy), str(copy / "tests")]
    sys.path[:] = [*ours, *(path for path in sys.path if not path.startswith(str(ROOT)) or "site-packages" in path)]
    try:
        failed = by_pytest(tuple(test for test in tests if test != "comfyui")) if tests != ("comfyui",) else None
        return in_comfyui() if failed is None and "comfyui" in tests else failed
    except Exception as error:
        return f"{type(error).__name__} outside a test"


def tried(copy: Path, tests: tuple[str, ...], limit: float = LIMIT) -> str | None:
    """Runs tests in a fork, in a copy of the repository; which one failed, or None."""
    said = copy / "failed"
    said.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setsid()
        failed = in_fork(copy, tests)
        if failed is not None:
            said.write_text(failed, encoding="utf-8")
        os._exit(failed is not None)
    ended = time.monotonic() + limit
    while True:
        waited, status = os.waitpid(child, os.WNOHANG)
        if waited:
            if os.waitstatus_to_exitcode(status) == 0:
                return None
            return said.read_text(encoding="utf-8") if said.exists() else "the process"
        if time.monotonic() > ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "the time limit"
        time.sleep(0.05)


def copied(folder: Path) -> Path:
    """The repository's files as they are, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in listed.stdout.decode().rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def warm() -> None:
    """Imports for the forks to share, none of them ours, and starts no thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "EDIT_TEST_STOP": "1"}
    sys.dont_write_bytecode = True
    import diffusers
    import hypothesis
    import pytest
    import torch._dynamo.testing

    torch.set_num_threads(1)
    assert hypothesis and pytest
    assert diffusers.PixArtSigmaPipeline and diffusers.StableDiffusion3Pipeline  # imported on first use


def run(minutes: float, only: str, passing: bool) -> None:
    """Tries mutants for so long, after the tests without one, unless they are known to pass."""
    results = load(RESULTS)
    every = mutants()
    warm()
    with tempfile.TemporaryDirectory() as temporary:
        copy = copied(Path(temporary))
        os.environ["PYTHONPATH"] = str(copy)
        if not passing:
            used = tuple(test for file in TESTS if only in file for test in TESTS[file])
            assert (failed := tried(copy, used, 3600)) is None, f"{failed} fails without a mutant"
        end = time.monotonic() + 60 * minutes
        for mutant in every:
            if time.monotonic() > end:
                break
            if mutant.key in results or only not in mutant.file:
                continue
            place, started = copy / mutant.file, time.monotonic()
            place.write_text(mutant.text(), encoding="utf-8")
            failed = tried(copy, TESTS[mutant.file])
            shutil.copy2(ROOT / mutant.file, place)
            results[mutant.key] = failed
            print(f"{time.monotonic() - started:.0f} s  {mutant.key}: {failed or 'SURVIVES'}", flush=True)
            save(RESULTS, results)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, held: dict[str, Any]) -> None:
    path.write_text(json.dumps(held, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def section() -> str:
    """What docs/reliability.md says; mutants of what the code no longer holds are forgotten."""
    every = {mutant.key: mutant for mutant in mutants()}
    results = {key: failed for key, failed in load(RESULTS).items() if key in every}
    reasons = load(REASONS)
    save(RESULTS, results)
    killed = sum(failed is not None for failed in results.values())
    lines = [
        f"Of {len(every):,} mutants, {len(results)} chosen by chance were tried, and the tests killed {killed}: "
        f"**{killed / len(results):.0%}**.",
        "",
        "| file | mutants | tried | killed |",
        "|---|---|---|---|",
    ]
    all_of, of = (Counter(key.partition(",")[0] for key in keys) for keys in (every, results))
    killed_of = Counter(key.partition(",")[0] for key, failed in results.items() if failed is not None)
    lines += [f"| `{file}` | {all_of[file]} | {of[file]} | {killed_of[file]} |" for file in TESTS if all_of[file]]
    lines += ["", "What survives, and why it may:", ""]
    survivors = [every[key] for key, failed in results.items() if failed is None]
    for file, line, key in sorted((mutant.file, mutant.line(), mutant.key) for mutant in survivors):
        change = key.partition(": ")[2].replace(" -> ", " `` → `` ", 1)
        lines.append(f"- `{file}:{line}` `` {change} ``: {reasons.get(key, '**no reason yet**')}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=45, help="how long to try mutants; 0 writes the page alone")
    parser.add_argument("--only", default="", metavar="PART", help="files whose path holds this")
    parser.add_argument("--passing", action="store_true", help="the tests are known to pass without a mutant")
    options = parser.parse_args()
    os.chdir(ROOT)  # where mutmut looks for its settings
    if options.minutes:
        run(options.minutes, options.only, options.passing)
    from fill_readme import between

    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "mutants", section()), encoding="utf-8")


if __name__ == "__main__":
    main()
