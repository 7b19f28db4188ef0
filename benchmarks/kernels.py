"""Measure every operation and write the results file: `python -m benchmarks.kernels`.

Runs the suites in a process of their own, then condenses what pytest-benchmark recorded. Exit status: 0 if
everything was measured and right, 1 if not; the results are written either way and say what is missing.
With --minutes the suites are interrupted after that time: the row being measured is lost, no other.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measuring import command, quantiles

__all__ = ["commit", "condense", "main", "speed_up"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MARKS = {"block", "calls", "bytes"}  # of one turn, not of a row
_QUIET_LOAD = 0.25  # of the cores, before the run
_QUIET_OTHERS = 0.05  # of the processor time, during it
_GRACE = 15  # seconds for pytest to write what it has


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--out", type=Path, help="results file; default benchmarks/results/kernels-<device>.json")
    add("--quick", action="store_true", help="a rehearsal of tiny shapes; needs --out")
    add("--only", metavar="EXPRESSION", help="rows that pytest -k selects; needs --out")
    add("--minutes", type=float, help="stop then, with what was measured; needs --out")
    args = parser.parse_args(argv)
    if args.out is None and (args.quick or args.only or args.minutes):
        parser.error("--out: want a file: --quick, --only and --minutes do not make full results")
    out = args.out or RESULTS / f"kernels-{args.device}.json"
    load = os.getloadavg()[0] / _cores()
    if load > _QUIET_LOAD:
        print(f"warning: the machine is not quiet: load {load:.2f} a core", file=sys.stderr)
    seconds = None if args.minutes is None else 60 * args.minutes
    raw, not_measured, others, stopped = _run_suites(args.device, args.quick, args.only, seconds)
    if others > _QUIET_OTHERS:
        print(f"warning: others took {others:.0%} of the processor time", file=sys.stderr)
    header = {
        "command": command("benchmarks.kernels", argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "quick": args.quick,
        "load": {"before": round(load, 2), "others": round(others, 3)},
        "stopped": stopped,
    }
    results = header | condense(raw) | {"not_measured": not_measured}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    problems = complaints(results)
    print("\n".join([*problems, f"results: {out}"]))
    return 1 if problems else 0


def _run_suites(
    device: str, quick: bool, only: str | None, seconds: float | None
) -> tuple[dict[str, Any], dict[str, str], float, bool]:
    """What pytest-benchmark recorded, tests that gave nothing with the reason, `_others`, and whether
    the time was up before the end."""
    with tempfile.TemporaryDirectory() as folder:
        recorded, outcomes = Path(folder) / "benchmarks.json", Path(folder) / "outcomes.xml"
        command = [
            *(sys.executable, "-m", "pytest", "benchmarks/suites", "-q", "--tb=short"),
            *("-p", "no:cacheprovider", "--benchmark-quiet", "--benchmark-disable-gc"),
            *(f"--benchmark-json={recorded}", f"--junitxml={outcomes}", f"--device={device}"),
            *(["--quick"] if quick else []),
            *(["-k", only] if only else []),
        ]
        before = _processor_seconds()
        stopped = _run_until(command, seconds)
        others = _others(before, _processor_seconds())
        text = recorded.read_text() if recorded.exists() else ""
        if not text:
            raise SystemExit("the suites recorded nothing: see the output above")
        return json.loads(text), _not_measured(outcomes), others, stopped


# glibc gives large freed blocks back to the system, and the next result pays a page fault for each 4 kB,
# now in one variant, now in another. It is told to keep them, as the allocators that PyTorch's tuning
# guide recommends do.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"}


def _run_until(command: Sequence[str], seconds: float | None) -> bool:
    """Run pytest; after `seconds` interrupt it, which lets it write. Whether that was necessary."""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored, it would be so in pytest too
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, **_MALLOC}) as suites:
        try:
            suites.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            suites.send_signal(signal.SIGINT)
        try:
            suites.wait(_GRACE)
        except subprocess.TimeoutExpired:
            suites.kill()
        return True


# --- the machine's other work --------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor_seconds() -> tuple[float, float, float]:
    """On the clock, of the whole machine, and of our own processes."""
    busy = 0.0
    if Path("/proc/stat").exists():
        user, nice, system, _, _, irq, soft, steal, *_ = map(
            int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        )
        busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.monotonic(), busy, sum(u.ru_utime + u.ru_stime for u in used)


def _others(before: tuple[float, ...], after: tuple[float, ...]) -> float:
    """Share of the machine's processor time that went to other processes."""
    elapsed, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# --- results -------------------------------------------------------------------------------------


def condense(raw: Mapping[str, Any]) -> dict[str, Any]:
    """pytest-benchmark's record as machine, copy and rows; a row joins the turns of one variant."""
    rows: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    medians: dict[str, list[float]] = {}
    for benchmark in raw["benchmarks"]:
        turn = benchmark["extra_info"]
        row = {name: value for name, value in turn.items() if name not in _MARKS}
        key = json.dumps({k: v for k, v in row.items() if k not in ("errors", "problems")})
        rows.setdefault(key, row | {"bytes": turn.get("bytes")})
        us = [1e6 * seconds / turn.get("calls", 1) for seconds in benchmark["stats"]["data"]]
        times.setdefault(key, []).extend(us)
        medians.setdefault(key, []).append(median(us))
    for key, row in rows.items():
        row["us"] = [round(us, 3) for us in quantiles(times[key])]
        row["turns_us"] = [round(us, 3) for us in medians[key]]
        row["rounds"] = len(times[key])
        errors = row.pop("errors", {})
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            row |= {"error": float(f"{errors[worst]:.2g}"), "worst": worst}
        if moved := row.pop("bytes"):
            row["gb_s"] = round(moved / row["us"][1] / 1e3, 2)
            row["bytes"] = moved
    suites: dict[str, list[dict[str, Any]]] = {"copy": [], "ops": [], "models": [], "memory": []}
    for row in rows.values():
        suites[row.pop("suite")].append(row)
    copy = suites.pop("copy")
    for row in suites["ops"] if copy else []:
        row["of_copy"] = round(row["gb_s"] / copy[0]["gb_s"], 3)
    return {
        "machine": raw["machine_info"]["hybridflow"],
        "copy": copy[0] if copy else None,
        **suites,
    }


def _not_measured(outcomes: Path) -> dict[str, str]:
    """Tests that were skipped, could not run, or found their variant wrong, with the reason."""
    found = {}
    for test in ET.parse(outcomes).iter("testcase"):
        for kind in ("skipped", "failure", "error"):
            for element in test.iter(kind):
                reason = element.get("message") or kind
                found[str(test.get("name"))] = f"{kind}: {reason.splitlines()[0][:300]}"
    return found


def speed_up(row: Mapping[str, Any], over: Mapping[str, Any] | None) -> list[float] | None:
    """How many times faster `row` is than `over`: [low, median, high]; None if either is wrong.

    The ends are the most careful: p20 of the one over p80 of the other, and the reverse.
    """
    if over is None or row["problems"] or over["problems"]:
        return None
    (fast, middle, slow), (fast_over, middle_over, slow_over) = row["us"], over["us"]
    return [fast_over / slow, middle_over / middle, slow_over / fast]


def _title(row: Mapping[str, Any]) -> str:
    kind = row.get("op") or row.get("library") or f"memory of {row['couplings']} couplings"
    shape = "×".join(map(str, row["shape"]))
    return " ".join(filter(None, (kind, row.get("note"), shape, row.get("dtype"))))


def complaints(results: Mapping[str, Any]) -> list[str]:
    """What is wrong or missing, a line each."""
    wrong = [
        f"wrong: {_title(row)}, {row['variant']}: {problem}"
        for suite in ("ops", "models", "memory")
        for row in results[suite]
        for problem in row["problems"]
    ]
    missing: dict[str, list[str]] = {}
    for name, reason in results["not_measured"].items():
        if not reason.startswith("failure: AssertionError"):  # a wrong variant: already said
            missing.setdefault(reason, []).append(name)
    unmeasured = [
        f"not measured: {names[0]}"
        + (f" and {len(names) - 1} more" if names[1:] else "")
        + f": {why}"
        for why, names in missing.items()
    ]
    stopped = ["the time was up: not everything was measured"] if results["stopped"] else []
    return [*wrong, *unmeasured, *stopped]


if __name__ == "__main__":
    sys.exit(main())
