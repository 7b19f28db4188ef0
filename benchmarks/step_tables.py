"""Tables of the training step, its phases and its start, from what step.py and startup.py write."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.kernel_tables import _hardware, _megabytes, _milliseconds, _ratio, _three_digits

__all__ = ["best_eager", "cases", "dispatch", "phases", "stages", "startup", "steps"]

Row = Mapping[str, Any]
Results = Mapping[str, Any]

_ELEMENTWISE, _GRAPH = "fused, elementwise only", "fused + graph"


def steps(results: Results) -> str:
    """A row per data set: times of a step by variant, speed-ups, rate, memory, time to compile."""
    by_data = cases(results)
    modes = list(dict.fromkeys(r["mode"] for r in results["rows"] if "mode" in r))
    on_gpu = any(_GRAPH in variants for variants in by_data.values())
    compiled = [f"compiled ({mode}), ms" for mode in modes]
    columns = ["eager, ms", *compiled, "elementwise kernels, ms", "fused, ms"]
    columns += ["fused + graph, ms"] if on_gpu else []
    columns += ["× eager", "× compiled", "images/s: eager", "fused"]
    columns += ["kernels: eager", "fused", "GPU busy: eager", "fused"] if on_gpu else []
    columns += ["memory, MB: eager", "fused", *(f"compiling ({mode}), s" for mode in modes)]
    lines = [f"| data, batch | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for (data, batch), variants in by_data.items():
        eager, last = best_eager(variants), variants.get(_GRAPH if on_gpu else "fused")
        of_modes = [variants.get(f"compile, {mode}") for mode in modes]
        best = _best(list(filter(None, of_modes)))
        shown = [eager, *of_modes, variants.get(_ELEMENTWISE), variants.get("fused")]
        cells = [_milliseconds(row) for row in (*shown, *([variants.get(_GRAPH)] * on_gpu))]
        cells += [_ratio(last, row) if last else "–" for row in (eager, best)]
        cells += [_cell(row, "images_per_second", ".0f") for row in (eager, last)]
        if on_gpu:
            cells += [_cell(row, "kernels", "d") for row in (eager, last)]
            cells += [_cell(row, "busy", ".0%").replace("%", " %") for row in (eager, last)]
        cells += [_megabytes(row) for row in (eager, last)]
        cells += [_cell(row, "compile_seconds", ".0f") for row in of_modes]
        lines.append(f"| {data}, {batch} | {' | '.join(cells)} |")
    last_name = _GRAPH if on_gpu else "fused"
    lines.append(
        f"\nMedians of the whole hybrid step, {results['precision']}, on random images; eager is the "
        f"better of contiguous and channels-last, compared with {last_name}. "
        "Memory is the most that lives at one moment of a step beside weights and optimisers; the time to "
        f"compile is that of the first step. {_hardware(results)}."
    )
    return "\n".join(lines)


def phases(results: Results) -> str:
    """A row per phase: ms of a step and its share, before and after the kernels."""
    return (
        f"{_by_phase(results)}\n\nMeans over the steps after the timed ones, and the share of their sum; "
        f"eager is the better of contiguous and channels-last. {_hardware(results)}."
    )


def dispatch(results: Results) -> str:
    """The same of steps of two images: Python and dispatch."""
    return (
        f"{_by_phase(results)}\n\nSteps of one labelled and one unlabelled image, which have next to no "
        f"arithmetic but that of the weights' updates. {_hardware(results)}."
    )


def _by_phase(results: Results) -> str:
    found = {}
    for (data, _), variants in cases(results).items():
        if "fused" in variants:
            found[f"{data}: eager"] = best_eager(variants)["phases_ms"]
            found[f"{data}: fused"] = variants["fused"]["phases_ms"]
    names = list(dict.fromkeys(name for times in found.values() for name in times))
    lines = [f"| ms of a step | {' | '.join(found)} |", f"|---{'|---:' * len(found)}|"]
    for name in names:
        cells = (_phase(times.get(name), sum(times.values())) for times in found.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    sums = (f"**{_three_digits(sum(times.values()))}**" for times in found.values())
    return "\n".join([*lines, f"| **sum** | {' | '.join(sums)} |"])


def _phase(ms: float | None, total: float) -> str:
    return "–" if ms is None else f"{_three_digits(ms)} ({ms / total:.0%})".replace("%", " %")


def stages(variants: Mapping[str, Row]) -> dict[str, Row]:
    """One technique after the other, as far as it was measured; each has those before it, too."""
    eager = variants["eager"]
    best = best_eager(variants)
    found: dict[str, Row | None] = {
        "eager": eager,
        "channels-last": best if best is not eager else None,
        "elementwise kernels": variants.get(_ELEMENTWISE),
        "conditioner kernels": variants.get("fused"),
        "CUDA graph": variants.get(_GRAPH),
    }
    return {name: row for name, row in found.items() if row is not None}


def startup(results: Results) -> str:
    """A row per way to start: seconds from the command to the end of the first step, and of each stage."""
    stages_of_all = list(results["rows"][0]["stages"])
    lines = [
        f"| start | seconds | {' | '.join(stages_of_all)} |",
        f"|---{'|---:' * (1 + len(stages_of_all))}|",
    ]
    for row in results["rows"]:
        cells = (f"{row['stages'][stage]:.2f}" for stage in stages_of_all)
        name = f"{row['variant']}, {row['start']}"
        lines.append(f"| {name} | **{row['seconds'][1]:.2f}** | {' | '.join(cells)} |")
    imports, warm = results["imports"], max(row["starts"] for row in results["rows"])
    packages = ", ".join(f"{name} {s:.2f}" for name, s in imports["packages"].items())
    lines.append(
        f"\nFrom `python -m hybridflow.train --preset {results['preset']}` to the end of its first "
        f"step. Cold: every cache empty, Python's own included, one start; warm: the next ones, the median "
        f"of {warm}. Of the first stage imports take {imports['seconds']:.2f} s: {packages}, … "
        f"{_hardware(results)}."
    )
    return "\n".join(lines)


def best_eager(variants: Mapping[str, Row]) -> Row:
    """PyTorch's better memory format."""
    return _best([r for n, r in variants.items() if n.startswith("eager")]) or variants["eager"]


def _best(rows: Sequence[Row]) -> Row | None:
    """The fastest of the right ones; of all where none is right."""
    right = [row for row in rows if not row["problems"]]
    return min(right or rows, key=lambda row: row["us"][1], default=None)


def cases(results: Results) -> dict[tuple[str, int], dict[str, Row]]:
    """Variants by name, for each data set and batch."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in results["rows"]:
        found.setdefault((row["data"], row["batch"]), {})[row["variant"]] = row
    return found


def _cell(row: Row | None, key: str, form: str) -> str:
    return "–" if row is None or row.get(key) is None else format(row[key], form)
