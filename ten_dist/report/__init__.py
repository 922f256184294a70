"""One page that compares runs: `ten-dist report`."""
