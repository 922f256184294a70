"""Configuration: what a model is and what a run does with it, as fields that are options."""
