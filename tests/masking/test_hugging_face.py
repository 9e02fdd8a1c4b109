"""Networks of `transformers`, with random weights: their outputs, attention masks, tied weights and generation."""

import pytest
import torch
from support.tolerances import assert_close

import hypermask_fast as hmf
from bench import zoo
from hypermask_fast import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SMALL = hmf.HypernetConfig(embedding=6, hidden=(8,))
TASKS = torch.tensor([2, 0, 1, 0])


def model_of(name: str) -> hmf.HyperMask:
    torch.manual_seed(0)
    try:
        net = zoo.ZOO[name].build()
    except InputError as error:
        pytest.skip(str(error))
    if hasattr(net, "generation_config"):
        net.config.use_cache = net.generation_config.use_cache = True
    return hmf.HyperMask(net, 3, 30, SMALL).eval()


def inputs(name: str, count: int = 4):
    torch.manual_seed(1)
    return zoo.ZOO[name].inputs(count)[1]


@pytest.mark.parametrize("name", ["BERT", "GPT-2 (tied)", "Llama", "T5 (tied)"])
@torch.no_grad()
def test_outputs_keep_their_type_and_attention_masks_count(name):
    model, given = model_of(name), inputs(name)
    y = model(**given, task=1)
    plain = model.export(1)
    expected = plain(**given)
    assert type(y) is type(expected) and list(y) == list(expected)
    assert_close(y.logits, expected.logits, "network")
    without = {key: value for key, value in given.items() if key != "attention_mask"}
    assert not torch.allclose(model(**without, task=1).logits, y.logits)
    last = None if y.logits.dim() == 2 else lambda y: y.logits[:, -1]
    assert model.infer_task(**given, select=last).shape == (4,)


@pytest.mark.parametrize("name", ["BERT", "GPT-2 (tied)", "Llama", "T5 (tied)"])
@torch.no_grad()
def test_mixed_tasks(name):
    model, given = model_of(name), inputs(name)
    if name != "BERT":
        given["use_cache"] = False
    found = model(**given, task=TASKS)
    for task in range(3):
        rows = (task == TASKS).nonzero()[:, 0]
        assert_close(found.logits[rows], model(**given, task=task).logits[rows], "network")


@pytest.mark.parametrize("name", ["GPT-2 (tied)", "Llama", "T5 (tied)"])
def test_generate_under_use_task(name):
    """With its cache of keys and values, greedy and by beams, as the exported network does it."""
    model, given = model_of(name), inputs(name)
    given.pop("decoder_input_ids", None)
    for how in ({"do_sample": False}, {"num_beams": 2}):
        with model.use_task(1):
            found = model.generate(**given, max_new_tokens=5, min_new_tokens=5, **how)
        assert torch.equal(found, model.export(1).generate(**given, max_new_tokens=5, min_new_tokens=5, **how))
    with pytest.raises(InputError, match="on its own has no mask|read|outside"):
        model.generate(**given, max_new_tokens=2)


def test_a_step_with_labels_and_gradient_checkpointing():
    model = model_of("GPT-2 (tied)").train()
    given = inputs("GPT-2 (tied)")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.net.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**given, labels=given["input_ids"], use_cache=False, task=1).loss.backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, "network")


def test_tied_weights_are_one_segment_and_stay_tied_in_the_export():
    model = model_of("GPT-2 (tied)")
    names = [row.name for row in model.layout.rows]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    plain = model.export(1)
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert model.config is model.net.config
