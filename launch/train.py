"""What the `deepspeed` launcher starts: `ten-dist train` with the same arguments.

deepspeed launch/train.py --config nano --data DATA --output_dir RUN
"""

import sys

from ten_dist.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
