"""One benchmark in its own process:

`python -m benchmarks.child NAME RESULT_FILE [--quick]`. A separate process keeps imports, garbage
and process-wide state (Accelerate's, for example) of other benchmarks out of the measurement, and
printed output out of the result.
"""

import argparse
import json
from pathlib import Path

from benchmarks.registry import BENCHMARKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("result_file", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    report = BENCHMARKS[arguments.name].run(quick=arguments.quick)
    arguments.result_file.write_text(json.dumps(report.to_dict()), encoding="utf-8")


if __name__ == "__main__":
    main()
