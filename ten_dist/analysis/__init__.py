"""What a network has learned, from held-out data: eigenvalues, memory, worth, condition."""

from ten_dist.analysis.analysis import Analysis, analyze
from ten_dist.analysis.condition import Condition, condition_of, gradient_norms
from ten_dist.analysis.context_length import (
    ContextLoss,
    measure_context,
    where_it_stops,
)
from ten_dist.analysis.held_out_rows import HeldOutRows
from ten_dist.analysis.influence import Influence, measure_influence
from ten_dist.analysis.places import Place, places_of
from ten_dist.analysis.spectrum import Spectrum, spectrum_of
from ten_dist.analysis.usage import Usage, UsageCounter, observe_usage
from ten_dist.analysis.worth import Worth, measure_worth, row_losses, silenced
from ten_dist.analysis.writing import Writing, measure_writing

__all__ = [
    "Analysis",
    "Condition",
    "ContextLoss",
    "HeldOutRows",
    "Influence",
    "Place",
    "Spectrum",
    "Usage",
    "UsageCounter",
    "Worth",
    "Writing",
    "analyze",
    "condition_of",
    "gradient_norms",
    "measure_context",
    "measure_influence",
    "measure_worth",
    "measure_writing",
    "observe_usage",
    "places_of",
    "row_losses",
    "silenced",
    "spectrum_of",
    "where_it_stops",
]
