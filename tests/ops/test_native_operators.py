"""The operators of csrc as PyTorch sees them, and what they refuse before any memory is touched: those of the CPU, and
those of the GPU, run by a CPU."""

import ctypes
import mmap
import sys

import pytest
import torch
from support.arguments import NATIVE_OPERATORS, OFFSETS, native_arguments
from support.backends import EXTENSION, operators_of
from torch.library import opcheck

ALSO = {
    "cpu_isa",
    "checksum",  # the CPU's alone: see test_checksum
    "masked_weight",  # the CPU's alone, as its backward: see below
    "masked_weight_backward",
    "masked_linear",
    "chunk_masked_linear",  # these two: see test_masked_linear and test_chunk_masked_linear
    "trunk",  # the CPU's alone: see test_trunk
    "trunk_backward",
    "fused_adam",  # the CPU's alone: see test_fused_adam
    "count_steps",
}
each_device = operators_of("cpu-baseline", "emulated")
each_operator = pytest.mark.parametrize("name", NATIVE_OPERATORS)


def uncopied(operators):
    """The operators themselves, on these very tensors; the emulated GPU's run on copies of their arguments."""
    return operators if operators is EXTENSION else torch.ops.hypermask_emulated


def test_the_emulation_finds_mistakes(emulated):
    self_test = emulated.library.emulation_self_test
    self_test.restype = ctypes.c_char_p
    assert self_test() == b""


@pytest.mark.native
@each_operator
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)  # opcheck runs the ops through inductor's own paths
    opcheck(getattr(EXTENSION, name).default, native_arguments()[name])  # gradients are those of hypermask_fast.ops


@pytest.mark.native
def test_every_operator_is_checked():
    prefix = f"{EXTENSION.name}::"
    ours = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert ours == {*NATIVE_OPERATORS, *ALSO}


@each_device
@each_operator
def test_valid_arguments_are_taken(operators, name):
    getattr(operators, name)(*native_arguments()[name])


def replaced(value, how):
    """A bad version of one argument, or None where the fault does not apply."""
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        inner = replaced(value[0], how)
        return None if inner is None else [inner, *value[1:]]
    if not isinstance(value, torch.Tensor):
        return None
    if how == "dtype":
        return value.double()
    if how == "stride" and value.numel() > 1:
        return value.detach().repeat_interleave(2, dim=-1)[..., ::2]
    if how == "expanded" and value.numel() > 1:  # a small memory that claims more than 2^31 entries
        return torch.zeros(1, dtype=value.dtype).expand(2**33)
    if how == "device":
        return value.detach().to("meta")
    if how == "shape" and value.dim() > 0:
        return torch.cat([value, value], dim=-1).contiguous().detach()
    return None


def more_allowed(name, i):
    """Whether argument i are logits that may go on behind the last offset, or a weight of any width, since no other
    tensor tells their number."""
    names = [argument.name for argument in getattr(EXTENSION, name).default._schema.arguments]
    if name == "hidden_gradient":
        return names[i] == "weight"
    return names[i] == "logits" and "offsets" in names and "previous" not in names


@each_device
@pytest.mark.parametrize("how", ["dtype", "stride", "expanded", "device", "shape"])
@each_operator
def test_bad_tensors_are_refused(operators, name, how):
    valid = native_arguments()[name]
    tried = 0
    for i, value in enumerate(valid):
        bad = replaced(value, how)
        if bad is None or (name == "semi_binary_mask" and how == "shape" and i == 0):
            continue
        if how == "shape" and more_allowed(name, i):
            continue
        tried += 1
        with pytest.raises(RuntimeError) as caught:
            getattr(operators, name)(*valid[:i], bad, *valid[i + 1 :])
        message = str(caught.value).split("(origin")[0]
        assert message.startswith(name.removesuffix("_backward")) and "\n" not in message
    assert tried or how == "shape"


@each_operator
def test_tensors_on_two_gpus_are_refused(emulated, name):
    """Each tensor in turn is on the other one."""
    mark, valid = emulated.library.emulation_set_on_another_gpu, native_arguments()[name]
    flat = [t for value in valid for t in (value if isinstance(value, list) else [value])]
    tensors = {t.data_ptr(): t for t in flat if isinstance(t, torch.Tensor)}
    operator = getattr(torch.ops.hypermask_emulated, name)
    mark.argtypes = [ctypes.c_void_p]
    try:
        for address in tensors:
            mark(address)
            with pytest.raises(RuntimeError, match=r"must be on GPU [01] like the other arguments, not on GPU [01]"):
                operator(*valid)
    finally:
        mark(None)
    operator(*valid)


WITH_OFFSETS = [name for name in NATIVE_OPERATORS if OFFSETS in native_arguments()[name]]


@each_device
@pytest.mark.parametrize("name", WITH_OFFSETS)
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "at least one border"),
        ([-1, 12, 17, 18], "negative"),
        ([0, 18, 17, 18], "ascend"),
        ([0, 12, 17, 19], "beyond"),
        ([0, 12, 17, 2**40], "beyond"),
        ([0, 12, 16, 18], r"(weights|grads) 1 has 5 entries, its segment 4"),
    ],
)
def test_bad_offsets_are_refused(operators, name, offsets, message):
    if "weights" in message and name == "mask_thresholds":
        return  # it has none, and any segments will do
    valid = list(native_arguments()[name])
    valid[valid.index(OFFSETS)] = offsets
    with pytest.raises(RuntimeError, match=message):
        getattr(operators, name)(*valid)


@pytest.mark.native
def test_meta_tensors_beside_others_are_refused():
    """One suffices for the shape function to be called, whose result would be memory that nobody has written."""
    hidden, weight, bias, targets = native_arguments()["output_drift"]
    output_drift = EXTENSION.output_drift
    assert output_drift(*(t.to("meta") for t in (hidden, weight, bias, targets))).is_meta
    with pytest.raises(RuntimeError, match="one device, not on cpu and meta"):
        output_drift(hidden, weight, bias, targets.to("meta"))


@each_device
def test_other_bad_arguments_are_refused(operators):
    valid = native_arguments()
    with pytest.raises(RuntimeError, match="norm must be 1 or 2"):
        operators.weight_drift(*valid["weight_drift"][:3], 3, None, None)
    with pytest.raises(RuntimeError, match="go together"):
        operators.weight_drift(*valid["weight_drift"][:5], None)
    with pytest.raises(RuntimeError, match="2 weights but offsets of 1 segments"):
        operators.weight_drift(*valid["weight_drift"][:2], [0, 12], 1, None, None)
    with pytest.raises(RuntimeError, match="1 grads for 2 weights"):
        grads, *rest = valid["masked_weights_backward"]
        operators.masked_weights_backward(grads[:1], *rest)
    with pytest.raises(RuntimeError, match="one chunk"):
        operators.output_drift(torch.randn(3, 2, 6), *valid["output_drift"][1:])


@pytest.mark.native
def test_one_masked_weight_and_its_backward():
    torch.use_deterministic_algorithms(False)  # as in test_opcheck
    weight, logits, grad, threshold = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.3])
    calls = {"masked_weight": (weight, logits, threshold), "masked_weight_backward": (grad, weight, logits, threshold)}
    for name, args in calls.items():
        called = getattr(EXTENSION, name)
        opcheck(called.default, args)
        for i in range(len(args)):
            for how in ("dtype", "stride", "shape"):
                bad = replaced(args[i], how) if how != "shape" else args[i].new_ones(2, 2)
                if bad is not None:
                    with pytest.raises(RuntimeError, match=f"^{name}: "):
                        called(*args[:i], bad, *args[i + 1 :])


@each_device
def test_moments_in_the_same_memory_are_refused(operators):
    adam = list(native_arguments()["hypernet_adam"])
    with pytest.raises(RuntimeError, match="must not share memory"):
        uncopied(operators).hypernet_adam(*adam[:6], adam[4], *adam[7:])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is reserved in Linux's way")
@each_device
def test_a_segment_that_32_bits_cannot_count_is_refused(operators):
    """Addresses without memory behind them, which nobody may read."""
    size = 2**32
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, of Linux
    logits = torch.frombuffer(mmap.mmap(-1, 4 * size, flags=flags), dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"segment 1 has 4294967296 entries, more than 2\^32 - 1"):
        uncopied(operators).mask_thresholds(logits, [0, 0, size], torch.tensor([0, 5]))
