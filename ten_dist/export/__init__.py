"""Models for the tools of others."""
