"""What the tests share. Imported as `from support.tolerances import assert_close`.

    tolerances   how far a result may be from the float64 reference: one table, and the comparison by it
    comparing    an op beside its definition, results and every gradient; random tensors, thresholds, kernel launches
    backends     the ops by each backend, for the fixtures `backend`, `operators`, `emulated`
    chunks       a chunked hypernetwork, and the logits that it generates
    arguments    valid arguments of every op and operator, by name
    analysed     models whose masks are known; command_line: runs of it that are over in a moment
    optimising   small models that Adam trains; training: what tests of the Trainer give it
    life         models whose tasks come and go
    memory       uninitialised memory that is NaN
    datasets     small data sets in the formats of the real ones
    networks     small networks, models and scenarios
    modules      networks and modules of every kind; module_kinds: models around them, and what a pass is by definition
    few_rows     csrc/cuda's masked_linear and chunk_masked_linear run by a CPU, and arguments for them
    segments     weights, logits, thresholds and previous weights of several segments
    forging      checkpoints that are altered and given the right digests again
    dense        the dense output layer with hidden vectors, targets and moments
    ranks        what each of two processes does
    launching    processes forked from one that has imported PyTorch: ranks as torchrun starts them, a command alone
    loops        loops of several gloo ranks, and of one process with the whole batch
    told         what a call is told that is refused
    framework    runs an example in a process of its own
    internals    what tests reach into the registry for
    emulation    csrc/cuda compiled for the CPU, out of cuda_emulation/

Fixtures are in tests/conftest.py and tests/ops/conftest.py only; this package holds what they do.
"""
