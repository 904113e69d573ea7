"""Run a command once per node of a job, all on this machine, and forward signals."""

import os
import signal
import subprocess
import sys

command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
nodes = [
    subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node)})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]


def forward_signal(number: int, frame: object) -> None:
    for node in nodes:
        node.send_signal(number)


for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward_signal)
sys.exit(max(abs(node.wait()) for node in nodes))
