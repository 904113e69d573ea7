"""Functions run in the processes of test_resume_worker.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any


def do(order: dict[str, Any]) -> None:
    what = order["what"]
    print(f"process {os.getpid()} is to {what}", flush=True)
    if what == "tell":
        print(os.getcwd(), os.environ.get("FORKED"), os.environ.get("HOME"), flush=True)
    elif what == "fail":
        raise ValueError("it is to fail")
    elif what == "exit":
        sys.exit(order["code"])
    elif what == "start others":
        subprocess.Popen(["sleep", "60"])
        threading.Thread(target=lambda: print("from a thread", flush=True)).start()
    elif what == "sleep":
        time.sleep(60)
