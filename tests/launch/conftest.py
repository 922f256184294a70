"""A server of droplets, for the tests of `ten-dist droplets`."""

from tests.launch.droplet_commands import droplets
from tests.launch.fleet import fleet_of

__all__ = ["droplets", "fleet_of"]
