"""Training to the end of its first step:

`python -m benchmarks.first_step MODULE BEGAN_NS`. Prints the seconds since BEGAN_NS, the machine's
clock at the start of the process.
"""

import importlib
import sys

from benchmarks.workload import Job, Settings


def main() -> None:
    module, began_ns = sys.argv[1], int(sys.argv[2])
    train = importlib.import_module(f"benchmarks.contenders.{module}").train
    job = Job(Settings(steps=2))
    train(job, 0)
    # The second forward pass begins after the end of the first step.
    sys.stdout.write(f"\nseconds {(job.model.forward_began_ns[1] - began_ns) / 1e9}\n")


if __name__ == "__main__":
    main()
