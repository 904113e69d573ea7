"""Entry point of ``python -m robo_orchard_lab`` and ``torchrun -m robo_orchard_lab``."""

import os
import sys

# -m puts the working directory first on the path: a file named torch.py would replace torch.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from robo_orchard_lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
