"""Stand-in for SLURM's commands: jobs are processes of this machine, with files as their states.

Jobs have numbers from $SLURM_STAND_IN_FIRST. Files of each job in $SLURM_STAND_IN: ``ID.state``,
``ID.requeue`` after a request, ``ID.pids`` of its tasks, ``ID.daemon``. With
$SLURM_STAND_IN_HOLD, jobs stay in the queue.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # accelerate brings it

FOLDER = Path(os.environ["SLURM_STAND_IN"])


def sbatch(script: str) -> None:
    job = str(int(os.environ["SLURM_STAND_IN_FIRST"]) + len([*FOLDER.glob("*.state")]))
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
    assert "--kill-on-bad-exit=1" in arguments
    pattern = arguments[arguments.index("--output") + 1]
    command = arguments[arguments.index(sys.executable) :]
    job, tasks = os.environ["SLURM_JOB_ID"], []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        ids = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0"}
        with open(pattern.replace("%j", job).replace("%t", str(task)), "ab") as log:
            env = {**os.environ, **ids}
            tasks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    (FOLDER / f"{job}.pids").write_text(" ".join(str(task.pid) for task in tasks))
    while None in (codes := [task.poll() for task in tasks]) and not any(codes):
        time.sleep(0.05)
    for child in psutil.Process().children(recursive=True):  # of other nodes
        with suppress(psutil.NoSuchProcess):
            child.kill()
    sys.exit(any(task.wait() for task in tasks))


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
