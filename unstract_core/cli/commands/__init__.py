"""One module for each command of `unstract-wire`."""
