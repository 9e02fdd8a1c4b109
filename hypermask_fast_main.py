"""What the command `hypermask-fast` runs: the command line, whose import takes PyTorch's seconds, also to Control-C."""

import sys


def main() -> int:
    """`hypermask_fast.cli.main`; 130 where the user stops it while it is being imported."""
    try:
        from hypermask_fast import cli
    except KeyboardInterrupt:
        print("\nhypermask-fast: interrupted", file=sys.stderr)
        return 130
    return cli.main()
