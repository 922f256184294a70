"""What the `deepspeed` launcher starts: `ten-dist train` with the same arguments.

deepspeed launch/train.py --config nano --data DATA --output_dir RUN
"""

import os
import sys
from pathlib import Path

from launch.cluster.rank_logs import RANK_LOGS, redirect_output
from ten_dist.cli import run_and_exit

if __name__ == "__main__":
    if RANK_LOGS in os.environ:
        redirect_output(Path(os.environ[RANK_LOGS]), int(os.environ["RANK"]))
    sys.argv.insert(1, "train")
    run_and_exit()
