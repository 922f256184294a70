"""What `ten-dist preflight` finds out about hosts, and what is wrong with it."""
