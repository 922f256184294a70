"""`python -m ten_dist COMMAND`: `ten-dist` where its console script is not on PATH."""

from ten_dist.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
