"""HyperMask (arXiv 2310.00113), kernel-accelerated."""

from pathlib import Path

if (Path(__file__).parent.parent / "kernels" / "__init__.py").is_file():
    # A bare checkout: kernels/ lies beside this package, an installed copy has it inside.
    __path__.append(str(Path(__file__).parent.parent))
