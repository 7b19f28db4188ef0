"""Render the results files as the tables and the pictures of the README: `python -m benchmarks.report`.

A table stands in the README between `<!-- NAME -->` and `<!-- /NAME -->`; nothing else is touched. A
picture stands beside the results files that it is made from, and carries their digest. With --check nothing
is written, and the exit status says whether tables and pictures are up to date.
"""

import argparse
import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import kernel_tables, pictures, run_tables, step_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _of_kernels(table: Callable[[Any], str]) -> Callable[[list[dict[str, Any]]], str]:
    def of_only(records: list[dict[str, Any]]) -> str:
        return table(records[0])

    return of_only


TABLES: dict[str, tuple[Callable[[list[dict[str, Any]]], str], tuple[str, ...]]] = {
    "digits-ablation": (run_tables.ablation, ("digits-ablation",)),
    "pinwheel-bridges": (run_tables.bridges, ("pinwheel-bridges",)),
    "digits-best": (run_tables.best, ("digits-best",)),
    "digits-sweeps": (run_tables.sweeps, ("digits-beta", "digits-nll")),
    "published": (run_tables.published, ("mnist-small",)),
    "small-runs": (run_tables.small_runs, ("mnist-small", "fashion-mnist-small", "cifar10-small")),
} | {
    f"kernels-{device}{name}": (_of_kernels(table), (f"kernels-{device}",))
    for device in ("cpu", "cuda")
    for name, table in (
        ("", kernel_tables.operations),
        ("-priors", kernel_tables.priors),
        ("-models", kernel_tables.models),
        ("-memory", kernel_tables.memory),
    )
}
TABLES |= {
    "conditioners-cpu": (_of_kernels(kernel_tables.conditioners), ("conditioners-cpu",)),
    **{
        name: (_of_kernels(kernel_tables.flows), (name,))
        for name in ("flows-cpu", "flows-cpu-high", "flows-cpu-bf16")
    },
    "time-to-accuracy": (run_tables.time_to_accuracy, ("time-to-accuracy",)),
    "dispatch-cpu": (_of_kernels(step_tables.dispatch), ("dispatch-cpu",)),
} | {
    f"{source}-{device}{name}": (_of_kernels(table), (f"{source}-{device}",))
    for device in ("cpu", "cuda")
    for source, name, table in (
        ("step", "", step_tables.steps),
        ("step", "-phases", step_tables.phases),
        ("startup", "", step_tables.startup),
    )
}
PICTURES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    f"{name}-{device}": (picture, tuple(f"{source}-{device}" for source in sources))
    for device in ("cpu", "cuda")
    for name, picture, sources in (
        ("kernels", kernel_tables.picture, ("kernels",)),
        ("step", pictures.waterfall, ("step",)),
        ("scaling", pictures.scaling, ("scaling",)),
    )
} | {
    "pinwheel-bridges": (pictures.bridges, ("pinwheel-bridges",)),
    "roofline-cpu": (pictures.roofline, ("kernels-cpu", "flows-cpu", "conditioners-cpu")),
}
"""By name: what draws it from the contents of its results files, a path and their digest."""


def render(readme: str, results: Path) -> str:
    """The README with every table made anew from the results files.

    What was never measured has no file, and then no place in the README either.
    """
    for name, (table, sources) in TABLES.items():
        pattern = re.compile(f"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        place, files = pattern.search(readme), [results / f"{source}.json" for source in sources]
        if not any(file.exists() for file in files):
            if place:
                raise SystemExit(f"README.md: there are no results for the table {name}")
            continue
        if not place:
            raise SystemExit(f"README.md: no place for the table {name}")
        block = f"<!-- {name} -->\n{table(_records(files))}\n<!-- /{name} -->"
        readme = pattern.sub(lambda _, block=block: block, readme)
    return readme


def _records(files: list[Path]) -> list[dict[str, Any]]:
    """What those files that exist hold: a list of records each, or one."""
    contents = [json.loads(file.read_text()) for file in files if file.exists()]
    return [r for c in contents for r in (c if isinstance(c, list) else [c])]


def outdated_pictures(results: Path) -> dict[Path, str]:
    """Pictures that do not show their results files, and the digest of these.

    A picture one of whose files does not exist is none.
    """
    found = {}
    for name, (_, sources) in PICTURES.items():
        files, picture = [results / f"{source}.json" for source in sources], results / f"{name}.png"
        if all(file.exists() for file in files):
            digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            if not picture.exists() or png_text(picture.read_bytes()).get("Source") != digest:
                found[picture] = digest
    return found


def draw(picture: Path, digest: str) -> None:
    """Make a picture anew from the results files beside it."""
    function, sources = PICTURES[picture.stem]
    files = (picture.with_name(f"{source}.json") for source in sources)
    function(*(json.loads(file.read_text()) for file in files), picture, digest)


def png_text(png: bytes) -> dict[str, str]:
    """The texts that a PNG file carries."""
    texts, at = {}, 8
    while at < len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"tEXt":
            key, _, value = png[at + 8 : at + 8 + length].partition(b"\0")
            texts[key.decode("latin-1")] = value.decode("latin-1")
        at += 12 + length
    return texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if out of date"
    )
    args = parser.parse_args()
    path = ROOT / "README.md"
    old = path.read_text()
    new = render(old, RESULTS)
    pictures = outdated_pictures(RESULTS)
    if args.check:
        stale = (["README.md"] if new != old else []) + [picture.name for picture in pictures]
        if stale:
            raise SystemExit(
                f"{', '.join(stale)}: not what benchmarks/results says: python -m benchmarks.report"
            )
        return
    path.write_text(new)
    for picture, digest in pictures.items():
        draw(picture, digest)


if __name__ == "__main__":
    main()
