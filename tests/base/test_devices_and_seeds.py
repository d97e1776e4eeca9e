"""Seeds are the same for ever; a device is chosen by name."""

import hashlib

import pytest
import torch

from fairway.base.devices import choose, generator, seed_for
from fairway.base.errors import RecipeError


def test_seeds_are_the_same_for_ever() -> None:
    """Golden: another number here would change every run of every recipe."""
    assert seed_for(0, "init") == 32010704297077034
    assert seed_for(1337, "train/batches") == 59321235549794830


def test_a_seed_is_the_head_of_a_hash_of_number_and_purpose() -> None:
    digest = hashlib.sha256(b"42/init").hexdigest()
    assert seed_for(42, "init") == int.from_bytes(bytes.fromhex(digest)[:7], "little") < 2**56


def test_purposes_do_not_disturb_one_another() -> None:
    seeds = {seed_for(seed, purpose) for seed in range(50) for purpose in ("init", "batches", "1/init", "")}
    assert len(seeds) == 200


def test_a_generator_begins_at_its_seed() -> None:
    again = torch.Generator().manual_seed(seed_for(3, "x"))
    assert torch.equal(torch.rand(5, generator=generator(3, "x")), torch.rand(5, generator=again))


def test_the_processor_computes_in_float32_eagerly() -> None:
    device = choose("cpu")
    assert (device.torch.type, device.compute, device.compile) == ("cpu", torch.float32, False)
    facts = device.describe()
    assert facts["torch"] == torch.__version__
    assert facts["compute"] == "float32"


@pytest.mark.parametrize("name", ["gpu", "", "cuda:0"])
def test_an_unknown_device_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(RecipeError, match="choices: auto, cpu, cuda"):
        choose(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_where_there_is_none_and_auto_takes_the_processor() -> None:
    with pytest.raises(RecipeError, match="use --device cpu"):
        choose("cuda")
    assert choose("auto") == choose("cpu")
