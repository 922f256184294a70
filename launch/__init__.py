"""What starts ten_dist: the training script for `deepspeed`, the quickstart and the set-up."""
