"""A server of droplets, for the tests of `ten-dist droplets`."""

from tests.tools.droplet_commands import droplets
from tests.tools.fleet import fleet_of

__all__ = ["droplets", "fleet_of"]
