from tests.launch.fleet import fleet_of

__all__ = ["fleet_of"]
