"""`ten-dist supervise` with the same arguments.

python -m launch.supervise -- deepspeed launch/train.py --config nano --data DATA --output_dir RUN
"""

import sys

from ten_dist.cli import run_and_exit

if __name__ == "__main__":
    sys.argv.insert(1, "supervise")
    run_and_exit()
