"""Everything that needs an NVIDIA GPU, in one command and one results file; see README.md.

Queue and stages are standard library only, so that they start on a bare machine: whatever needs torch
runs in processes of its own (`gpu_workers.py`, pytest, the suites), each with a time bound, after the
install stage has made the checkout importable.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_queue import CHECKOUT, Context, Results, Stage, run_queue
from benchmarks.gpu_stages import STAGES, copy_suites, first_gpu, git_commit

__all__ = ["main"]

_RESERVE = 8.0  # seconds kept back for stopping processes and writing the results


def summary_table(results: Results) -> str:
    """Stages, speed-ups and the results file, as text for the end of the output."""
    lines = [f"{'stage':12} {'status':8} {'seconds':>7}  summary"]
    for name, result in results.stages.items():
        what = str(result.get("summary", ""))[:600]
        lines.append(f"{name:12} {result['status']:8} {result['seconds']:7.1f}  {what}")
    op = results.stages.get("op", {})
    compared = [*op.get("speedups", []), *op.get("autotune", [])]
    compared = [row for row in compared if row["launch"] == "graph" or "library" in row]
    if compared:
        lines += ["", "fused, p50, operations within CUDA graphs; times faster than other variants"]
    for row in compared:
        over = ", ".join(f"{name} {factor}x" for name, factor in row["over"].items())
        name = " ".join(filter(None, (row.get("op"), row.get("library"), row.get("note"))))
        shape = f"{'x'.join(map(str, row['shape']))} {row.get('dtype', '')}"
        share = f"{row['of_copy']:4.0%} of copy  " if "of_copy" in row else ""
        lines.append(f"{name:40} {shape:21} {row['us'][1]:9.2f} us  {share}{over}")
    return "\n".join([*lines, "", f"results: {results.path}"])


def _folder(value: str) -> Path:
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"got {value!r}, want an existing folder")
    return path


def _path(value: str) -> Path:
    return Path(value).expanduser().resolve()


def _minutes(value: str) -> float:
    try:
        minutes = float(value)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"got {value!r}, want a positive number")
    return minutes


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="gpu.py", description="Run the checks and measurements that need an NVIDIA GPU."
    )
    add = parser.add_argument
    add("--minutes", type=_minutes, required=True, help="time for all stages together")
    add("--wheels", type=_folder, help="folder of wheels that may be missing on this machine")
    add("--data-dir", type=_folder, help="folder that holds mnist/; without it: the digits preset")
    add(
        "--out",
        type=_path,
        help="results file; default results.json in --state, or without that "
        "benchmarks/results/gpu-<name>-<date>.json",
    )
    add("--only", nargs="+", choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}")
    add(
        "--state", type=_path, help="folder that a later call goes on with; default a temporary one"
    )
    return parser.parse_args(argv)


def default_out(gpu_name: str, date: datetime) -> Path:
    """The results file that is named after the GPU and the day."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return CHECKOUT / "benchmarks" / "results" / f"gpu-{slug}-{date:%Y-%m-%d}.json"


_FOLDERS = ("benchmarks", "hybridflow", "kernels", "tests")
_SUFFIXES = (".cpp", ".h", ".json", ".py")


def sources_digest() -> str:
    """SHA-256 over names and bytes of what the stages run of the checkout, which may be without git."""
    files = (path for folder in _FOLDERS for path in (CHECKOUT / folder).rglob("*"))
    names = (path.relative_to(CHECKOUT) for path in files if path.suffix in _SUFFIXES)
    digest = hashlib.sha256()
    for name in sorted(name for name in names if "results" not in name.parts):
        data = (CHECKOUT / name).read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def earlier_calls(path: Path, of: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls that a results file records; none if it is not there.

    Raises:
        ValueError: it is of other sources or of another card.
    """
    if not path.exists():
        return []
    header = json.loads(path.read_text())
    for name in ("gpu", "sources"):
        if header.get(name) != of[name]:
            got, want = (f"{h.get(name)} (commit {h.get('commit')})" for h in (of, header))
            raise ValueError(
                f"--state: {path} is of another checkout or card: {name} is {got} here, "
                f"{want} there; want a new folder"
            )
    return header["calls"]


def main(argv: Sequence[str]) -> int:
    """Command line. Status: 0 if every stage passed, 1 if not, 2 for bad arguments, no GPU, or a
    state that is not of this checkout and this card."""
    args = _arguments(argv)
    gpu = first_gpu()
    if gpu is None:
        print("error: no NVIDIA GPU here: nvidia-smi is missing or lists none", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    now = datetime.now().astimezone()
    call = {
        "command": ["benchmarks/gpu.py", *argv],
        "date": now.isoformat(timespec="seconds"),
        "minutes": args.minutes,
    }
    header: dict[str, Any] = call
    out = args.out or default_out(gpu["name"], now)
    if args.state:
        out = args.out or args.state / "results.json"
        header = {"gpu": gpu["name"], "commit": git_commit(), "sources": sources_digest()}
        try:
            header["calls"] = [*earlier_calls(out, header), call]
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    results = Results(out, header)
    with tempfile.TemporaryDirectory(
        prefix="hybridflow-gpu-", ignore_cleanup_errors=True
    ) as folder:
        scratch = Path(folder)
        context = Context(gpu, scratch, args.state or scratch, out, args.wheels, args.data_dir)
        stages = _pending(results, context)
        if args.only is not None:
            stages = [stage for stage in STAGES if stage.name in args.only]
        copy_suites(context)
        try:
            passed = run_queue(
                stages, context, results, 60 * args.minutes - _RESERVE, resumable=bool(args.state)
            )
        finally:
            print(f"\n{summary_table(results)}", flush=True)
    return 0 if passed else 1


def _pending(results: Results, context: Context) -> list[Stage]:
    """What no earlier call passed, that which failed last; the environment is looked at in every
    call, and an installation that is gone is made anew."""
    lost = {"environment"} if context.target.exists() else {"environment", "install"}
    todo = [s for s in STAGES if s.name in lost or results.status(s.name) != "passed"]
    setup = ("environment", "install")
    return sorted(todo, key=lambda s: s.name not in setup and results.status(s.name) == "failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
