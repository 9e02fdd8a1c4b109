"""What loops do with gradients and steps: change them, read them, scale them, leave them out."""

import torch
from torch import Tensor, nn

import hypermask_fast as hmf

from ..loop import Loop, feature


@feature("nothing in between")
def plain(loop: Loop) -> None:
    loop.backward()
    loop.optimizer.step()


# -- gradients changed or read -----------------------------------------------------------------------------------------


@feature("torch's clip_grad_norm_", waits=True)
def clip_norm(loop: Loop) -> None:
    loop.backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
    loop.optimizer.step()


@feature("hmf.optim.clip_grad_norm_", waits=True)
def clip_norm_of_ours(loop: Loop) -> None:
    loop.backward()
    hmf.optim.clip_grad_norm_(loop.model, 0.05)
    loop.optimizer.step()


@feature("clip_grad_norm_ by the largest entry", waits=True)
def clip_largest(loop: Loop) -> None:
    loop.backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 1e-3, norm_type=float("inf"))
    loop.optimizer.step()


@feature("clip_grad_value_", settings={"lr": 1e-3}, waits=True)  # at larger rates rounding errors grow
def clip_value(loop: Loop) -> None:
    loop.backward()
    nn.utils.clip_grad_value_(loop.model.parameters(), 3e-3)
    loop.optimizer.step()


@feature("gradients read and multiplied, tensor by tensor", waits=True)
def by_hand(loop: Loop) -> None:
    loop.backward()
    for p in loop.model.parameters():
        if p.grad is not None:
            p.grad = 0.5 * p.grad + 0.1 * p.grad.sign()
    loop.optimizer.step()


@feature("noise added to .grad in place", waits=True)
def noise(loop: Loop) -> None:
    loop.backward()
    assert loop.weight.grad is not None
    loop.weight.grad.add_(torch.sin(torch.arange(loop.weight.numel())).view_as(loop.weight).to(loop.weight), alpha=0.01)
    loop.optimizer.step()


@feature("accumulation of two batches", waits=True)
def accumulate(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    for rows in (slice(0, 20), slice(20, 32)):
        (loop.loss(rows) / 2).backward()
    loop.optimizer.step()


@feature("accumulation, then clip_grad_norm_", waits=True)
def accumulate_and_clip(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    for rows in (slice(0, 20), slice(20, 32)):
        loop.loss(rows).backward()
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
    loop.optimizer.step()


@feature("zero_grad(set_to_none=False), accumulation over the steps", waits=True)
def zeros(loop: Loop) -> None:
    loop.optimizer.zero_grad(set_to_none=False)
    loop.loss().backward()
    loop.loss(slice(0, 9)).backward()
    loop.optimizer.step()


@feature("two backward passes through one graph", waits=True)
def retained(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss()
    loss.backward(retain_graph=True)
    (2 * loss).backward()
    loop.optimizer.step()


# -- GradScaler --------------------------------------------------------------------------------------------------------


def scaler_of(loop: Loop) -> torch.amp.GradScaler:
    return loop.keep("scaler", lambda: torch.amp.GradScaler("cpu", growth_interval=5))


@feature("GradScaler", waits=True)
def scaled(loop: Loop) -> None:
    scaler = scaler_of(loop)
    loop.optimizer.zero_grad()
    scaler.scale(loop.loss()).backward()
    scaler.step(loop.optimizer)
    scaler.update()


@feature("GradScaler, an overflow in every third step", waits=True)
def overflowing(loop: Loop) -> None:
    scaler = scaler_of(loop)
    loop.optimizer.zero_grad()
    (scaler.scale(loop.loss()) * (float("inf") if loop.step % 3 == 1 else 1)).backward()
    scaler.step(loop.optimizer)
    scaler.update()


@feature("GradScaler, unscale_ and clip_grad_norm_", waits=True)
def unscaled(loop: Loop) -> None:
    scaler = scaler_of(loop)
    loop.optimizer.zero_grad()
    scaler.scale(loop.loss()).backward()
    scaler.unscale_(loop.optimizer)
    nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
    scaler.step(loop.optimizer)
    scaler.update()


# -- steps left out, steps twice ---------------------------------------------------------------------------------------


@feature("every third step skipped after backward", waits=True)
def skipped(loop: Loop) -> None:
    loop.backward()
    if loop.step % 3 != 1:
        loop.optimizer.step()


@feature("a NaN loss, skipped after backward", waits=True)
def not_a_number(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss() * (float("nan") if loop.step % 4 == 2 else 1)
    loss.backward()
    if loss.isfinite():
        loop.optimizer.step()


@feature("SAM: two backward passes, the first at perturbed weights", waits=True)
def sharpness(loop: Loop) -> None:
    loop.backward()
    with torch.no_grad():
        grads = [(p, p.grad) for p in loop.model.parameters() if p.grad is not None]
        norm = torch.stack([g.norm(p=2) for _, g in grads]).norm(p=2)
        moves = [(p, 0.05 * g / (norm + 1e-12)) for p, g in grads]
        for p, move in moves:
            p.add_(move)
    loop.optimizer.zero_grad()
    loop.loss().backward()
    with torch.no_grad():
        for p, move in moves:
            p.sub_(move)
    loop.optimizer.step()


@feature("a closure")
def closure(loop: Loop) -> None:
    def compute() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss()
        loss.backward()
        return loss

    assert loop.optimizer.step(compute).isfinite()


@feature("torch.autograd.grad of one embedding on the way")
def one_embedding(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss()
    (grad,) = torch.autograd.grad(loss, loop.model.hypernet.embeddings[loop.task], retain_graph=True)
    (loss * (1 + grad.norm().detach())).backward()
    loop.optimizer.step()


@feature("torch.autograd.grad of all parameters, put into .grad")
def all_parameters(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    parameters = list(loop.model.parameters())
    for p, grad in zip(parameters, torch.autograd.grad(loop.loss(), parameters, allow_unused=True), strict=True):
        p.grad = grad
    loop.optimizer.step()
