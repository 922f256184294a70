"""Training under DeepSpeed. Nothing outside this package imports deepspeed."""
