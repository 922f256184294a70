"""Optimizers of our own: Muon, whose updates of matrices are orthogonal."""
