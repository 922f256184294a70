"""What all tests share."""

import os

# Ranks of a test share two cores: with more threads than cores they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
