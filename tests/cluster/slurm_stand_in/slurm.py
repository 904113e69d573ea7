"""Stand-in for SLURM's commands: jobs are processes of this machine, with files as their states.

Files in the folder $SLURM_STAND_IN, for each job: ``ID.state``, ``ID.requeue`` after a request,
``ID.pids`` of its tasks, ``ID.daemon``. With $SLURM_STAND_IN_HOLD, jobs stay in the queue.
"""

import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def sbatch(script: str) -> None:
    job = str(1001 + len([*FOLDER.glob("*.state")]))
    _set_state(job, "PENDING")
    if "SLURM_STAND_IN_HOLD" not in os.environ:
        command = [sys.executable, __file__, "run", job, script]
        null = subprocess.DEVNULL
        daemon = subprocess.Popen(command, start_new_session=True, stdout=null, stderr=null)
        (FOLDER / f"{job}.daemon").write_text(str(daemon.pid))
    print(f"Submitted batch job {job}")


def run(job: str, script: str) -> None:
    found = re.search(r"^#SBATCH --nodes=(\d+)$", Path(script).read_text(), re.MULTILINE)
    nodes = "1" if found is None else found[1]
    starts = 0
    while True:
        _set_state(job, "RUNNING")
        variables = {
            "SLURM_JOB_ID": job,
            "SLURM_JOB_NUM_NODES": nodes,
            "SLURM_NTASKS": nodes,
            "SLURM_JOB_NODELIST": ",".join(["localhost"] * int(nodes)),
            "SLURM_RESTART_COUNT": str(starts),
        }
        code = subprocess.run(["bash", script], env={**os.environ, **variables}).returncode
        requeue = FOLDER / f"{job}.requeue"
        if not requeue.exists():
            break
        requeue.unlink()
        starts += 1
        _set_state(job, "PENDING")
    if _state(job) != "CANCELLED":
        _set_state(job, "FAILED" if code else "COMPLETED")


def srun(*arguments: str) -> None:
    at = arguments.index("--output")
    job, tasks = os.environ["SLURM_JOB_ID"], []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        output = arguments[at + 1].replace("%j", job).replace("%t", str(task))
        ids = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0"}
        with open(output, "ab") as log:
            command = arguments[at + 2 :]
            env = {**os.environ, **ids}
            tasks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    (FOLDER / f"{job}.pids").write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max([task.wait() != 0 for task in tasks]))


def scontrol(action: str, job: str) -> None:
    assert action == "requeue"
    (FOLDER / f"{job}.requeue").touch()


def scancel(*arguments: str) -> None:
    [job] = [argument for argument in arguments if argument.isdecimal()]
    name = next((a.partition("=")[2] for a in arguments if a.startswith("--signal=")), None)
    if name is None:
        _set_state(job, "CANCELLED")
    pids = FOLDER / f"{job}.pids"
    for pid in pids.read_text().split() if pids.exists() else ():
        os.kill(int(pid), signal.Signals[f"SIG{name or 'TERM'}"])


def sacct(*arguments: str) -> None:
    print("JobID|State|NodeList")
    for option, job in pairwise(arguments):
        if option == "-j":
            print(f"{job}|{_state(job)} by 0|localhost")
            print(f"{job}.batch|RUNNING|localhost")


def _state(job: str) -> str:
    return (FOLDER / f"{job}.state").read_text()


def _set_state(job: str, state: str) -> None:
    (FOLDER / f"{job}.state").write_text(state)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
