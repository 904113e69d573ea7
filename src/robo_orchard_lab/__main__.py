"""``python -m robo_orchard_lab``, and ``torchrun -m robo_orchard_lab``: the command line."""

import os
import sys

# -m has Python look in the folder that one starts in ahead of everything, where a file that happens
# to be named torch.py would be taken for torch.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from robo_orchard_lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
