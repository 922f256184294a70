"""The commands of `ten-dist` that need one machine: a module each, imported when it is used."""
