"""Whether a launcher's restart finds what the start before it has left."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


def warn_of_kept_store() -> None:
    """Warn where torchrun is to restart the job with the store that the processes meet by now.

    Processes that are started anew then find there under which addresses those were reached that
    are gone, and fail, or wait for them, as soon as they connect (torch 2.13).
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if kept and restarts not in ("", "0"):
        logger.warning(
            "torchrun may restart this job (--max-restarts=%s), and keeps its store, in which the "
            "processes then find addresses of those that are gone; start it with the environment "
            "variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and --standalone or "
            "--rdzv-backend=c10d",
            restarts,
        )
