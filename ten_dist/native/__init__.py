"""Operators in C++ for CPUs, compiled for the processor at hand when first needed."""

from ten_dist.native.build import unavailable

__all__ = ["unavailable"]
