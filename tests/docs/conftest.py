"""The built site."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "docs" / "_build" / "html"


@pytest.fixture(scope="session")
def site() -> Path:
    """Return the folder of the built site. Build the site if it is missing, which takes minutes."""
    SITE.parent.mkdir(exist_ok=True)
    with FileLock(ROOT / "docs" / "_build" / "lock"):  # other workers of pytest wait
        if not (SITE / "objects.inv").exists():
            environment = {**os.environ, "DOCS_PYTHON": sys.executable}
            command = ["bash", "scripts/docs.sh"]
            built = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            assert built.returncode == 0, built.stdout + built.stderr
    return SITE
