"""Machines of a run, rented from DigitalOcean: `ten-dist droplets`.

What the API lists is the truth: every droplet has tags with its run and its expiry from
the request that creates it, and nothing is kept on this machine. So any machine with the
token can continue what another has begun, and can end it.
"""
