"""Command ``python -m robo_orchard_lab.cluster FOLDER``: submit the job that a folder describes."""

import sys
from pathlib import Path

from robo_orchard_lab.cluster.training_job import submit_folder

try:
    submit_folder(Path(sys.argv[1]))
except (OSError, RuntimeError, ValueError) as error:  # the last line is the reason
    sys.exit(str(error))
