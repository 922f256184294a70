"""Benchmarks: a model as lm-evaluation-harness asks it."""
