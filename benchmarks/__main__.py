"""Run benchmarks, each in its own process, and print their tables.

Exits with 1 if a benchmark fails or its figures are void. A missed bar is printed and is not a
failure, since timings on a busy machine prove nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from benchmarks.printing import print_report
from benchmarks.pythons import HERE, python_of, variables
from benchmarks.registry import BENCHMARKS, Benchmark
from benchmarks.report import Report
from benchmarks.results import PAGE, keep


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument("--quick", action="store_true", help="seconds: few rounds, no peers")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--write", action="store_true", help=f"write benchmarks/{PAGE.name}")
    arguments = parser.parse_args()

    if arguments.list:
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:17} {benchmark.summary}")
        return 0
    if arguments.write and arguments.quick:
        parser.error("--write is for whole runs, without --quick")
    unknown = sorted(set(arguments.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")

    reports = []
    broken = False
    for name in arguments.names or BENCHMARKS:
        began_at = perf_counter()
        report = _run_in_child(BENCHMARKS[name], quick=arguments.quick)
        print(f"{name}: {perf_counter() - began_at:.0f} s", file=sys.stderr)
        if report is None:
            print(f"benchmark {name} broke; its error stands above", file=sys.stderr)
            broken = True
            continue
        broken = broken or bool(report.faults)
        reports.append(report)
        if not arguments.json:
            print_report(report)
        if arguments.write:
            keep(
                [report]
            )  # Write results one by one, so that an interruption keeps earlier results.
    if arguments.json:
        print(json.dumps({"reports": [report.to_dict() for report in reports]}, indent=2))
    return 1 if broken else 0


def _run_in_child(benchmark: Benchmark, *, quick: bool) -> Report | None:
    """Return the benchmark's report, or None if its process failed."""
    where = "own" if quick or python_of(benchmark.where) is None else benchmark.where
    python = python_of(where)
    assert python is not None  # this process has one
    with tempfile.TemporaryDirectory() as folder:
        result_file = Path(folder) / "report.json"
        command = [python, "-m", "benchmarks.child", benchmark.name, str(result_file)]
        finished = subprocess.run(
            [*command, "--quick"] if quick else command,
            cwd=HERE.parent,
            env=variables(where),
            stdout=sys.stderr,
            check=False,
        )
        if finished.returncode != 0:
            return None
        return Report.from_dict(json.loads(result_file.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
