"""Submit training to Slurm from a checkout, as `mmtard submit` does; --help lists the flags."""

import sys
from pathlib import Path

# The checkout before anything installed: a Python on a login node may have nothing of this project.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmtard.launch.submit import main

if __name__ == "__main__":
    raise SystemExit(main())
