"""What the tests share. Imported as `from support.tolerances import assert_close`.

    tolerances   how far a result may be from the float64 reference: one table, and the comparison by it
    comparing    an op beside its definition, results and every gradient; random tensors, thresholds, kernel launches
    backends     the ops by each backend, for the fixtures `backend`, `operators`, `emulated`
    arguments    valid arguments of every op and operator, by name
    memory       uninitialised memory that is NaN
    networks     small networks, models and scenarios
    emulation    csrc/cuda compiled for the CPU, out of cuda_emulation/

Fixtures are in tests/conftest.py and tests/ops/conftest.py only; this package holds what they do.
"""
