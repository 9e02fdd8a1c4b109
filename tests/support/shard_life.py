"""What each of two ranks does with a sharded model in tests/distributed/test_shards_life.py."""

import copy
import pickle
import tempfile
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

import hypermask_fast as hmf
from hypermask_fast.processes import local
from support import loops
from support.shards import MLPS, OPTIMISERS, TASKS, small_model, small_net, whole
from support.told import refusal

LOOPS = {
    "AdamW": lambda model: hmf.optim.AdamW(model, 1e-2, weight_decay=0.1),
    "decay": lambda model: hmf.optim.Adam(
        model, 1e-2, weight_decay=0.1, step_in_backward=model.hypernet.processes is not None
    ),
    "amsgrad": lambda model: hmf.optim.Adam(model, 1e-2, amsgrad=True),
    "foreach": lambda model: hmf.optim.Adam(model, 1e-2, foreach=True),
}


def sharded(kind="dense", seed=1, **settings):
    return hmf.distributed.shard(small_model(kind, seed=seed, **settings))


def batch(task=0, step=0):
    generator = torch.Generator().manual_seed(10 * task + step)
    x = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long()


def step(model, optimizer, task=0, number=0):
    x, y = batch(task, number)
    mask = model.mask(task)
    optimizer.zero_grad()
    (F.cross_entropy(model(x, mask), y) + model.regularizer(mask)).backward()
    optimizer.step()


def trained(kind="dense", alone=False, optimiser="default"):
    """A model within its second task, with its optimiser, after some steps on the same batches on every rank."""
    model = small_model(kind) if alone else sharded(kind)
    optimizer = OPTIMISERS[optimiser](model)
    for task in (0, 1):
        for number in range(2):
            step(model, optimizer, task, number)
    return model, optimizer


def same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = (whole(found[name]).double() - whole(value).double()).norm()
        assert difference <= tolerance * whole(value).double().norm(), (name, difference)


def any_loop(kind, optimiser, loop):
    loops.OPTIMISERS |= LOOPS
    size = {"dense": None, "chunked": 30}[kind]
    expected = loops.mlp(1, size)
    losses = loops.train(expected, "Adam" if optimiser in OPTIMISERS else optimiser, loop, alone=True)["losses"]
    model = hmf.distributed.shard(loops.mlp(1 + dist.get_rank(), size))
    found = loops.train(model, optimiser, loop)["losses"]
    if optimiser != "decay":  # which steps in backward: the loss is then told without R
        torch.testing.assert_close(found, losses, rtol=1e-8, atol=1e-9)
    same(dict(model.named_parameters()), dict(expected.named_parameters()), 1e-7)


def other_clipping():
    """torch's own is right or raises; ours is right in every norm, and refuses a layer that is stepped already."""
    one, here = small_model(), sharded()
    optimizers = [hmf.optim.Adam(model) for model in (one, here)]
    x, y = batch()
    for norm in (2.0, 1.0, float("inf"), 3.0):
        for model in (one, here):
            model.zero_grad()
            F.cross_entropy(model(x, 0), y).backward()
        found, expected = (hmf.optim.clip_grad_norm_(model, 0.01, norm) for model in (here, one))
        torch.testing.assert_close(found, expected)
        same({n: p.grad for n, p in here.named_parameters() if p.grad is not None},
             {n: p.grad for n, p in one.named_parameters() if p.grad is not None})  # fmt: skip
    try:
        torch.nn.utils.clip_grad_norm_(here.parameters(), 0.01)
    except RuntimeError as error:
        assert "mixed torch.Tensor and DTensor" in str(error)
    else:
        raise AssertionError("torch's clipping has not raised")
    del optimizers
    optimizer = hmf.optim.Adam(here, step_in_backward=True)
    optimizer.zero_grad()
    F.cross_entropy(here(x, 0), y).backward()
    assert "backward has stepped the layer already" in refusal(lambda: hmf.optim.clip_grad_norm_(here, 1.0))


def gradients_asked_for():
    """Gradients of some tensors alone leave the layer where it is, with step_in_backward too."""
    model = sharded()
    optimizer = hmf.optim.Adam(model, step_in_backward=True)
    optimizer.zero_grad()
    before, loss = whole(model.hypernet.output.weight).clone(), model.mask(0).logits.square().sum()
    weight, embedding = model.hypernet.output.weight, model.hypernet.embeddings[0]
    (of_weight,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    (of_embedding,) = torch.autograd.grad(loss, [embedding])
    one = small_model()
    leaves = [one.hypernet.output.weight, one.hypernet.embeddings[0]]
    expected = torch.autograd.grad(one.mask(0).logits.square().sum(), leaves)
    same(dict(enumerate((of_weight, of_embedding))), dict(enumerate(expected)))
    assert torch.equal(whole(weight), before)


def zeroed_and_scaled():
    model, optimizer = trained()
    x, y = batch()
    F.cross_entropy(model(x, 1), y).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(whole(p.grad).abs().sum() == 0 for p in model.parameters() if p.grad is not None)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(F.cross_entropy(model(x, 1), y)).backward()
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    try:
        scaler.step(optimizer)
    except RuntimeError as error:
        assert "mixed torch.Tensor and DTensor" in str(error)
    else:
        raise AssertionError("a GradScaler has not raised")
    same(dict(model.named_parameters()), before, 0)


def life_of_tasks(kind):
    one, here = trained(kind, alone=True), trained(kind)
    for model, optimizer in (one, here):
        torch.manual_seed(5 if model is one[0] else 5 + dist.get_rank())
        model.add_task(optimizer)
        model.remove_task(0)
        step(model, optimizer, 1, 2)
        model.freeze_task(1)
        step(model, optimizer, 2)
        step(model, optimizer, TASKS)
    same(dict(here[0].named_parameters()), dict(one[0].named_parameters()), 1e-7)
    same(here[0].state_dict(), one[0].state_dict(), 1e-7)


def states(kind):
    """Whole states into shards, those of shards into shards and wholes, with anchor and moments."""
    (one, of_one), (here, of_here) = trained(kind, alone=True), trained(kind)
    held = here.state_dict()
    anchor: Any = here.anchor
    assert type(anchor.targets[0]).__name__ == type(held["state.anchor.targets.0"]).__name__ == "DTensor"
    same(held, one.state_dict())
    ends = []
    for model, state, moments in (
        (sharded(kind, seed=3), one.state_dict(), of_one.state_dict()),
        (sharded(kind, seed=4), held, of_here.state_dict()),
        (small_model(kind, seed=5), held, of_here.state_dict()),
    ):
        optimizer = hmf.optim.Adam(model, 1e-3)
        model.load_state_dict(state)
        optimizer.load_state_dict(copy.deepcopy(moments))  # which torch.optim.Adam takes as its own
        step(model, optimizer, 1, 3)
        ends.append(model.state_dict())
    step(one, of_one, 1, 3)
    for end in ends:
        same(end, one.state_dict())


def copies(kind):
    here, optimizer = trained(kind)
    copied, of_copy = copy.deepcopy((here, optimizer))
    before = {name: whole(p).clone() for name, p in here.named_parameters()}
    step(copied, of_copy, 1, 3)
    same(dict(here.named_parameters()), before, 0)
    step(here, optimizer, 1, 3)
    same(dict(copied.named_parameters()), dict(here.named_parameters()), 0)
    assert "a sharded model can't be pickled" in refusal(lambda: pickle.dumps(here))
    assert here.double().float()(batch()[0].float(), 1).dtype == torch.float32


def folders(kind):
    (one, _), (here, _) = trained(kind, alone=True), trained(kind)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    here.save_pretrained(folder[0])
    back = hmf.HyperMask.from_pretrained(folder[0], small_net(2))
    same(back.state_dict(), one.state_dict())
    same(hmf.distributed.shard(back).state_dict(), one.state_dict())
    path = here.export(1, "safetensors", Path(folder[0]) / "net.safetensors")
    dist.barrier()
    assert path.exists()
    torch.testing.assert_close(here.export(1)(batch()[0]), one.export(1)(batch()[0]))
    nowhere = refusal(lambda: here.save_pretrained("/proc/nowhere"))
    assert "rank 0: cannot write" in nowhere


def evaluation(kind):
    (one, _), (here, _) = trained(kind, alone=True), trained(kind)
    x, _ = batch()
    tasks = torch.arange(12) % TASKS
    with torch.no_grad():
        for ask in (
            lambda model: model(x, tasks),
            lambda model: model.eval()(x, torch.tensor(2)),
            lambda model: model.forward_all_tasks(x),
            lambda model: model.infer_task(x),
            lambda model: model(x[:0], tasks[:0]),
        ):
            torch.testing.assert_close(ask(here), ask(one))
    apart = torch.arange(12) % (1 + dist.get_rank())  # other tasks on each rank
    torch.testing.assert_close(here(x, apart), one(x, apart))
    assert "masks of different tasks" in refusal(lambda: here.mask(dist.get_rank()))
    assert "masks of different tasks" in refusal(lambda: here.train().mask(torch.tensor(dist.get_rank())))


def compiled(kind):
    one, here = small_model(kind), sharded(kind)
    x, _ = batch()
    for call in (one, torch.compile(here, backend="aot_eager")):
        call(x, 0).square().sum().backward()
    torch.testing.assert_close(torch.compile(here, backend="aot_eager")(x, 0), one(x, 0))
    same({n: p.grad for n, p in here.named_parameters() if p.grad is not None},
         {n: p.grad for n, p in one.named_parameters() if p.grad is not None})  # fmt: skip


@contextmanager
def sent():
    """Bytes that this rank sends another in the collectives of the block, by name."""
    found, before = {}, {name: getattr(dist, name) for name in ("all_to_all_single", "all_reduce")}
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def all_to_all(output, tensor, outputs, inputs, **kwargs):
        count = (sum(inputs) - inputs[rank]) * tensor.element_size()
        found["all_to_all"] = found.get("all_to_all", 0) + count
        return before["all_to_all_single"](output, tensor, outputs, inputs, **kwargs)

    def all_reduce(tensor, *args, **kwargs):
        count = 2 * (ranks - 1) * tensor.numel() * tensor.element_size() // ranks
        found["all_reduce"] = found.get("all_reduce", 0) + count
        return before["all_reduce"](tensor, *args, **kwargs)

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
    try:
        yield found
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def bytes_sent(kind, optimiser):
    """Of one step in the second task: what the hypernetwork sends, and the mean of all other gradients."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    settings = {"chunked": {"chunk_size": 50}, "by_tensor": {"chunk_size": 50, "by_tensor": True}}.get(kind, {})
    config = hmf.HypernetConfig(embedding=8, hidden=(16,), chunk_embedding=4, **settings)
    model = hmf.HyperMask(net, 2, 20, config, beta=0.5)
    entries = model.layout.size
    model = hmf.distributed.replicate(model) if kind == "replica" else hmf.distributed.shard(model)
    optimizer = OPTIMISERS[optimiser](model)
    model.begin_task(1)
    x, y = torch.randn(12, 64), torch.randint(10, (12,))
    with sent() as found:
        mask = model.mask(1)
        optimizer.zero_grad()
        (F.cross_entropy(model(x, mask), y) + model.regularizer(mask)).backward()
        optimizer.step()
    small = sum(p.numel() for name, p in model.hypernet.named_parameters() if name != "chunk_embeddings")
    return sum(found.values()) / (4 * entries), small / entries if settings else 0.0


def memory(kind):
    """This rank's part of the sliced parameters and their moments, of what one process holds of them."""
    model, optimizer = trained(kind)
    held = whole_size = 0
    for parameter in model.parameters():
        for tensor in (parameter, *optimizer.state[parameter].values()) if hasattr(parameter, "to_local") else ():
            if hasattr(tensor, "to_local"):
                held += local(tensor).untyped_storage().nbytes()
                whole_size += tensor.numel() * tensor.element_size()
    assert whole_size > 0
    return held / whole_size


def second_model_on(mesh):
    return refusal(lambda: hmf.distributed.shard(small_model(), mesh))


def refusals():
    rank, said = dist.get_rank(), {}
    said["twice"] = refusal(lambda: hmf.distributed.shard(sharded()))
    said["replicated"] = refusal(lambda: hmf.distributed.shard(hmf.distributed.replicate(small_model())))
    said["then replicated"] = refusal(lambda: hmf.distributed.replicate(sharded()))
    said["no model"] = refusal(lambda: hmf.distributed.shard(torch.nn.Linear(2, 2)))
    said["no mesh"] = second_model_on("cpu")
    said["names"] = second_model_on(init_device_mesh("cpu", (2,), mesh_dim_names=("data",)))
    said["order"] = second_model_on(init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "replicate")))
    held = small_model()
    optimizer = torch.optim.Adam(held.parameters())
    said["held"] = refusal(partial(hmf.distributed.shard, held))
    del optimizer, held
    torch.manual_seed(1)
    few = hmf.HyperMask(torch.nn.Linear(2, 2), 1, hypernetwork=hmf.HypernetConfig(chunk_size=6))
    said["few"] = refusal(lambda: hmf.distributed.shard(few))
    net = torch.nn.Linear(3, 2 + rank)
    said["shapes"] = refusal(lambda: hmf.distributed.shard(hmf.HyperMask(net, 1)))
    said["tasks"] = refusal(lambda: hmf.distributed.shard(hmf.HyperMask(torch.nn.Linear(3, 2), 1 + rank)))
    said["sparsity"] = refusal(lambda: hmf.distributed.shard(hmf.HyperMask(torch.nn.Linear(3, 2), 1, 10.0 * rank)))
    other = small_model(dtype=torch.float64 if rank else torch.float32)
    said["replicas"] = refusal(lambda: hmf.distributed.replicate(hmf.HyperMask(torch.nn.Linear(3, 2), 1 + rank)))
    said["dtype"] = refusal(lambda: hmf.distributed.shard(other))
    mixed = small_model()
    if rank:
        next(mixed.net.children()).to("meta")
    said["devices"] = refusal(lambda: hmf.distributed.shard(mixed))
    assert mixed.hypernet.processes is None
    return said


WORK = {
    **{
        f"{kind}, {optimiser}, {loop}": (any_loop, kind, optimiser, loop)
        for kind in ("dense", "chunked")
        for optimiser, loop in (
            *((optimiser, "plain") for optimiser in LOOPS),
            *(("default", loop) for loop in ("accumulate", "clip", "mixed")),
            ("SGD", "plain"),
        )
    },
    **{
        f"{work.__name__}, {kind}": (work, kind)
        for work in (life_of_tasks, states, copies, folders, evaluation)
        for kind in MLPS
    },
    "compiled": (compiled, "dense"),
    **{work.__name__: (work,) for work in (other_clipping, gradients_asked_for, zeroed_and_scaled)},
}
COUNTS = [(kind, optimiser) for kind in (*MLPS, "replica") for optimiser in OPTIMISERS]


def everything():
    """Of all of WORK what went wrong, and everything that was counted and refused."""
    found = {}
    for name, (work, *arguments) in WORK.items():
        try:
            work(*arguments)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    found |= {("sent", *case): bytes_sent(*case) for case in COUNTS}
    found |= {("held", kind): memory(kind) for kind in MLPS}
    return {**found, "refusals": refusals()}
