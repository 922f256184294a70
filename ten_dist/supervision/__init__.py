"""Starting a run again and again until it is complete, or cannot be."""
