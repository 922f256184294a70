"""What the `deepspeed` launcher starts: `ten-dist train` with the same arguments.

deepspeed launch/train.py --config nano --data DATA --output_dir RUN
"""

import sys

from ten_dist.cli import run_and_exit

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    run_and_exit()
