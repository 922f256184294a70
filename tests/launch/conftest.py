from tests.launch.digitalocean import droplets
from tests.launch.fleet import fleet_of

__all__ = ["droplets", "fleet_of"]
