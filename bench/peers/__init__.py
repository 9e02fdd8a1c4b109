"""Peers: other ways to do what the library does, each at its best. See ../README.md for what each one is."""
