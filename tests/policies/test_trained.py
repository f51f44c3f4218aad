"""Files of trained weights: those of the package, those of other models, and what are none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny_engine import decode, read, tiny_engine, tokens
from tiny_folder import make_folder

from nearfar.cli.main import cli
from nearfar.errors import InvalidOptionError
from nearfar.policies.convolution import random_convolutions
from nearfar.policies.feature_maps import random_maps
from nearfar.policies.registry import create_policy
from nearfar.policies.trained import load_trained, save_trained
from nearfar.records import Geometry

TINY, SMOLLM2 = Geometry(2, 6, 2, 16), Geometry(30, 9, 3, 64)
MAKERS = {"less": random_maps, "lococo": random_convolutions}
every_policy = pytest.mark.parametrize("policy", MAKERS)


@pytest.fixture
def trained(policy: str, tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_trained(path, policy, TINY, MAKERS[policy](TINY, 7), {})
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    return path


@every_policy
def test_a_file_serves_its_model(policy: str, trained: Path) -> None:
    prompt, answer = tokens(80), tokens(9, seed=1)
    own = tiny_engine(policy=f"{policy}:maps={trained}", budget=20)
    untrained = tiny_engine(policy=f"{policy}:maps=random", budget=20)
    got, other = (decode(e, read(e, prompt), answer) for e in (own, untrained))
    assert torch.isfinite(got).all()
    assert (got - other).abs().max() > 0


@every_policy
def test_the_packages_own_are_for_smollm2(policy: str) -> None:
    create_policy(policy).check_model(SMOLLM2)
    tensors = load_trained(policy, "", SMOLLM2, torch.device("cpu"), MAKERS[policy])
    untrained = MAKERS[policy](SMOLLM2, 0)
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in untrained.items()}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@every_policy
def test_another_models_weights_are_refused(policy: str) -> None:
    text = (
        f"{policy} was trained for a model of 30 layers, 9 query heads, 3 KV heads, head dimension "
        "64; this one has 2 layers, 6 query heads, 2 KV heads, head dimension 16. Train it for "
        f"this model with training/train_{policy}.py and give {policy}:maps=FILE, or choose "
        "another --policy."
    )
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}$"):
        tiny_engine(policy=policy).plan(100)


@every_policy
def test_another_policys_weights_are_refused(policy: str, trained: Path) -> None:
    other = "less" if policy == "lococo" else "lococo"
    text = f"{trained} holds no weights of {other}. Train it for this model with"
    with pytest.raises(InvalidOptionError, match=f"^{re.escape(text)}"):
        create_policy(f"{other}:maps={trained}").check_model(TINY)


@every_policy
@pytest.mark.parametrize("data", [None, b"", b"not a file of tensors at all"])
def test_what_is_no_file_of_weights(policy: str, data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if data is not None:
        path.write_bytes(data)
    model = tmp_path / "model"
    make_folder(model, context=300)
    run = CliRunner().invoke(
        cli, ["generate", "the cat", "--model", str(model), "--policy", f"{policy}:maps={path}"]
    )
    assert run.exit_code == 2
    assert f"Error: Cannot read {path}: " in run.output
    assert f"training/train_{policy}.py" in run.output
    assert "Traceback" not in run.output
