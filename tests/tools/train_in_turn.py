"""Several trainings one after the other in the same ranks, which start only once.

    python tests/tools/train_in_turn.py ARGUMENTS [ARGUMENTS ...]

Each ARGUMENTS are those of one `ten-dist train`, as a JSON list. Each training meets the fault
in FAULT, one of tests/tools/faulty_train.py, if there is one.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from ten_dist.cli import main
    from tests.tools.faulty_train import inject

    if "FAULT" in os.environ:
        inject(os.environ["FAULT"])
    status = 0
    for arguments in sys.argv[1:]:
        status = status or main(["train", *json.loads(arguments)])
    sys.stdout.flush()
    sys.stderr.flush()
    # As ten_dist.cli.run_and_exit does, for the same reason.
    os._exit(status)
