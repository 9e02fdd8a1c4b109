"""training.moments = bfloat16: in runs, their checkpoints and what they may be resumed with."""

import math
import shutil

import pytest
import torch
from support import sharding
from support.launching import ranks
from support.moments import small_model
from support.networks import blob_model, blob_scenario

from hypermask_fast import InputError
from hypermask_fast.data import Scenario
from hypermask_fast.training import checkpoint, needs, run
from hypermask_fast.training.config import RunConfig, TrainingConfig, load_preset
from hypermask_fast.training.interrupt import Stopped
from hypermask_fast.training.resume import resumed_config
from hypermask_fast.training.trainer import Trainer

ROUNDED = {"training.moments": "bfloat16"}
WEIGHT = "optimizer.hypernet.output.weight/"


def config() -> RunConfig:
    return sharding.config_of("dense").with_values(ROUNDED)


def stopped(folder, at=11) -> None:
    asked = iter(range(1, 100))
    with pytest.raises(Stopped):
        run.train(config(), folder, stop=lambda: next(asked) == at)


def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path):
    run.train(config(), tmp_path / "straight")
    stopped(tmp_path / "stopped")
    tensors = checkpoint.load(tmp_path / "stopped").tensors
    assert {tensors[WEIGHT + name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    assert tensors["optimizer.hypernet.output.bias/exp_avg"].dtype == torch.float32
    run.train(config(), tmp_path / "stopped", resume=True)
    folders = [checkpoint.load(tmp_path / name).tensors for name in ("straight", "stopped")]
    assert folders[0].keys() == folders[1].keys()
    for name, value in folders[0].items():
        assert torch.allclose(value, folders[1][name], 0, 0, equal_nan=True), name


@pytest.mark.parametrize("mesh", [(2,), (2, 2)], ids=str)
def test_a_sharded_checkpoint_of_them_is_loaded_and_consolidated(tmp_path, mesh):
    single, parts = tmp_path / "single", tmp_path / "parts"
    stopped(single)
    shutil.copytree(single, parts)
    ended = ranks(math.prod(mesh), sharding.in_group, sharding.save_again, parts, mesh)
    assert all(rank.code == 0 for rank in ended), ended
    slices = checkpoint.manifest.read(parts)[0].sharded
    assert slices[WEIGHT + "exp_avg"].dtype == slices[WEIGHT + "exp_avg_sq"].dtype == torch.bfloat16
    (rank, *_) = ranks(2, sharding.in_group, sharding.differences, [parts], single, (2,))
    assert rank.code == 0 and rank.result["parts"][0] == []
    checkpoint.consolidate(parts)
    (one,), (other,) = (list(folder.glob("checkpoint-*.safetensors")) for folder in (single, parts))
    assert one.read_bytes() == other.read_bytes()


def test_settings_that_differ_in_moments_give_other_numbers(tmp_path):
    stopped(tmp_path / "run")
    base = sharding.config_of("dense")
    assert config().digest() != base.digest()
    with pytest.raises(InputError, match="training.moments=float32 contradicts the run"):
        resumed_config(tmp_path / "run", base, {"training.moments": "float32"})
    path = tmp_path / "run/config.toml"
    path.write_text(path.read_text().replace('moments = "bfloat16"', 'moments = "float32"'))
    with pytest.raises(InputError, match="saved under other settings"):
        run.train(RunConfig.load(path), tmp_path / "run", resume=True)


def test_a_trainers_checkpoint_of_the_other_dtype_is_refused(tmp_path):
    def trainer(moments, **settings):
        length = TrainingConfig(iterations=8, moments=moments)
        return Trainer(blob_model(), blob_scenario(), length, run_dir=tmp_path / "run", progress=False, **settings)

    asked = iter(range(1, 100))
    with pytest.raises(Stopped):
        trainer("bfloat16", stop=lambda: next(asked) == 4).fit()
    with pytest.raises(InputError, match=r"exp_avg is bfloat16 .*, not float32"):
        trainer("float32").fit(resume=True)


def test_a_trainer_refuses_them_of_a_chunked_hypernetwork(tmp_path):
    model = small_model(chunk_size=50, tasks=3)
    with pytest.raises(InputError, match="this hypernetwork generates in chunks"):
        Trainer(model, blob_scenario(), TrainingConfig(iterations=8, moments="bfloat16"), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_refused():
    with pytest.raises(InputError, match="training.moments = bfloat16 needs a factored gradient"):
        load_preset("split-mnist").with_values(ROUNDED | {"training.gradient": "dense"})
    with pytest.raises(InputError, match="training.moments = bfloat16 needs a dense hypernetwork"):
        load_preset("split-mnist").with_values(ROUNDED | {"hypernet.chunk_size": 100})
    with pytest.raises(InputError, match="moments"):
        load_preset("split-mnist").with_values({"training.moments": "float16"})


def test_the_layer_takes_two_thirds_of_the_memory(tmp_path):
    scenario: Scenario = sharding.scenario()
    plain, rounded = (needs.needs(c, scenario)[0] for c in (sharding.config_of("dense"), config()))
    assert plain.what == rounded.what and rounded.size * 3 == plain.size * 2
