"""The test suites of other libraries, plain and with `fuse` applied to every layer they build:
`python -m benchmarks.peer_suites --suite NAME=PATH ...`.

NAME is the package that the suite tests, PATH the folder that its tests are run from. Each suite runs
twice under pytest, from the same seeds; the second time every module of the library is fused as soon as
it is constructed. This file is also the pytest plugin that does so.
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "peer-suites.json"
OUTCOMES = ("passed", "failed", "skipped")


def main() -> int:
    """Command line; 1 if a test passes plain and does not pass fused, or no layer was fused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--out", type=Path, default=OUT, help="results file")
    parser.add_argument("--backend", choices=("native", "triton", "reference"), help="force one")
    args = parser.parse_args()
    suites = [suite.partition("=") for suite in args.suite]
    records = []
    for library, _, path in suites:
        records.append(compare(library, Path(path), args.backend))
        print(line(records[-1]), flush=True)
        for test in records[-1]["differing"]:
            print(f"  {test['test']}: {test['plain']}, fused {test['fused']}")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    names = [f"--suite {library}=PATH" for library, _, _ in suites]
    result = {
        "command": " ".join(["python -m benchmarks.peer_suites", *names]),
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "suites": records,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(record["broken"] or not record["fused_layers"] for record in records))


def compare(library: str, path: Path, backend: str | None) -> dict[str, Any]:
    """Both runs of one suite."""
    plain, fused = (run(library, path, fuse, backend) for fuse in (False, True))
    before, after = plain["tests"], fused["tests"]
    differing = [
        {"test": test, "plain": before.get(test, "absent"), "fused": after.get(test, "absent")}
        for test in sorted(before.keys() | after.keys())
        if before.get(test) != after.get(test)
    ]
    return {
        "library": library,
        "version": fused["version"],
        "backend": backend or "by device",
        "plain": counts(before),
        "fused": counts(after),
        "fused_layers": fused["fused"],
        "left_layers": fused["left"],
        "failing_plain": sorted(test for test in before if before[test] == "failed"),
        "differing": differing,
        "broken": sum(test["plain"] == "passed" for test in differing),
    }


def counts(tests: dict[str, str]) -> dict[str, int]:
    """How many tests had each outcome."""
    return {outcome: list(tests.values()).count(outcome) for outcome in OUTCOMES}


def line(record: dict[str, Any]) -> str:
    """A suite's record in one line."""
    plain, fused = (
        "/".join(str(record[kind][outcome]) for outcome in OUTCOMES) for kind in ("plain", "fused")
    )
    layers = sum(record["fused_layers"].values())
    return (
        f"{record['library']} {record['version']}: {'/'.join(OUTCOMES)} {plain} plain, "
        f"{fused} with {layers} layers fused"
    )


def run(library: str, path: Path, fuse: bool, backend: str | None) -> dict[str, Any]:
    """One run of a suite in a process of its own: outcomes of its tests, and what was fused."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        plugin = ["-p", "benchmarks.peer_suites", "--peer-report", str(report)]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin]
        command += ["--peer-library", library]
        command += ["--peer-fuse"] if fuse else []
        command += ["--peer-backend", backend] if backend else []
        # The suite's folder first, for suites that lie inside the library they test.
        paths = [str(path.resolve()), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        finished = subprocess.run(
            command, cwd=path, env=environment, capture_output=True, text=True, check=False
        )
        if not report.exists():
            raise RuntimeError(f"pytest did not run in {path}:\n{finished.stdout}{finished.stderr}")
        return json.loads(report.read_text())


# --- the plugin ----------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options that `run` sets."""
    parser.addoption("--peer-report", type=Path)
    parser.addoption("--peer-library")
    parser.addoption("--peer-fuse", action="store_true")
    parser.addoption("--peer-backend")


def pytest_configure(config: pytest.Config) -> None:
    """Start the report; with --peer-fuse, have modules fused when constructed."""
    config.pluginmanager.register(Watch(config), "peer-watch")


class Watch:
    """What happens to the tests and to the layers of one run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tests: dict[str, str] = {}
        self.fused: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.backend = ExitStack()
        library = config.getoption("peer_library")
        self.version = self.prepare(library)
        seed()
        if config.getoption("peer_fuse"):
            for cls in module_classes(library):
                cls.__init__ = self.then_fuse(cls)

    def prepare(self, library: str) -> str:
        from hybridflow.kernels import _backend

        if backend := self.config.getoption("peer_backend"):
            self.backend.enter_context(_backend.using(backend))
        for part in ("", ".flows", ".transforms", ".modules"):
            try:
                importlib.import_module(library + part)
            except ModuleNotFoundError as error:
                if error.name != library + part or not part:
                    raise
        return importlib.metadata.version(library)

    def then_fuse(self, cls: type[nn.Module]) -> Callable[..., None]:
        """The class's constructor, followed by `fuse` of the module if it is of that very class."""
        from hybridflow.kernels import fuse

        construct = cls.__init__

        @functools.wraps(construct)
        def constructed(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            construct(module, *args, **kwargs)
            if type(module) is cls:
                report = fuse(module)
                if "" in report.swapped:
                    self.fused[report.swapped[""]] += 1
                if "" in report.left:
                    self.left[f"{cls.__name__}: {report.left['']}"] += 1

        return constructed

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        seed()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = "failed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.backend.close()
        record = {"version": self.version, "tests": self.tests}
        record |= {"fused": dict(self.fused), "left": dict(self.left)}
        self.config.getoption("peer_report").write_text(json.dumps(record))


def seed() -> None:
    """The same random numbers for a test whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what the libraries draw from
    torch.manual_seed(0)


def module_classes(library: str) -> list[type[nn.Module]]:
    """The library's module classes that are imported, bases before derived."""
    found, pending = [], [nn.Module]
    while pending:
        cls = pending.pop(0)
        pending += [sub for sub in cls.__subclasses__() if sub not in found and sub not in pending]
        found.append(cls)
    return [cls for cls in found if cls.__module__.partition(".")[0] == library]


if __name__ == "__main__":
    sys.exit(main())
