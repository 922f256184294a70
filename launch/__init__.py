"""What starts ten_dist: on one machine, and on several that it checks, rents and watches."""
