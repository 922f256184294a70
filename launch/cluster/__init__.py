"""Starting a training on several hosts, and starting it again when one of them is lost."""
