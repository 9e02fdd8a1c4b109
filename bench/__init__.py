"""Benchmarks of hypermask_fast against its peers; `python -m bench` runs them. See README.md beside this file."""
