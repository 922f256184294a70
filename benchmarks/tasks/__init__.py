"""What the quality experiments train on, and how a trained model is measured."""

from benchmarks.tasks.interface import Task
from benchmarks.tasks.retrieval import AssociativeRecall, SelectiveCopying
from benchmarks.tasks.state_tracking import Parity, PermutationWords
from benchmarks.tasks.text import Characters, TokenShards

__all__ = [
    "AssociativeRecall",
    "Characters",
    "Parity",
    "PermutationWords",
    "SelectiveCopying",
    "Task",
    "TokenShards",
]
