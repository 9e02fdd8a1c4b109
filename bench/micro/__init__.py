"""Microbenchmarks by pytest-benchmark: `pytest bench/micro --benchmark-only`. See ../README.md."""
