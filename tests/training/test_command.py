"""The command line of a training: from text files to a file that the policy takes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from running import command
from safetensors import safe_open
from tiny_folder import make_folder, text_of
from train_less import LessTrainer

from nearfar.config import SamplingConfig
from nearfar.policies.feature_maps import random_maps
from nearfar.runtime.engine.engine import Engine

SMALL = ("--length", "320", "--budgets", "4,20", "--queries", "8", "--steps", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_folder(folder)
    (folder / "a.txt").write_text(text_of(900))
    (folder / "b.txt").write_text(text_of(900, seed=1))
    return folder


def run(folder: Path, *arguments: str) -> Result:
    texts = ("--text", str(folder / "a.txt"), "--text", str(folder / "b.txt"))
    place = ("--model", str(folder), "--device", "cpu")
    less = command("less", (LessTrainer, random_maps))
    return CliRunner().invoke(less, [*texts, *place, *SMALL, *arguments])


def test_a_file_that_the_policy_takes(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "less.safetensors"
    done = run(folder, "--output", str(output), "--minutes", "1")
    assert done.exit_code == 0, done.output
    layers = re.findall(
        r"^layer (\d): 2 steps, error .*; \d+ s, about \d+ s left$", done.output, re.M
    )
    assert layers == ["0", "1", "2"]
    with safe_open(output, "pt") as file:
        about = file.metadata()
        assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
    assert (about["texts"], about["licence"]) == ("a.txt, b.txt", "Apache-2.0")
    assert about["geometry"].startswith("3 layers, 6 query heads, 2 KV heads, ")
    assert json.loads(about["setting"])["budgets"] == [4, 20]
    for errors in json.loads(about["held_out"]):
        assert set(errors) == {"less", "h2o", "h2o with as many bytes"}
        assert errors["less"] <= errors["h2o"]  # a layer that is worse was given up
    engine = Engine.from_pretrained(
        str(folder), policy=f"less:maps={output}", device="cpu", budget=16, threads=1
    )
    answer = engine.read(text_of(400)).ask("what did it do?", SamplingConfig(max_new_tokens=5))
    assert 1 <= len(answer.token_ids) <= 5


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--budgets", "4,29"), "Budgets must be between 0 and 28. Got [4, 29]."),
        (("--length", "4000"), "Three texts of 4000 tokens are needed: to train on, to decide"),
        (("--texts-used", "1"), "There are 1: give more --text"),
        (
            ("--output", "gone/less.safetensors"),
            "The folder of 'gone/less.safetensors' does not exist. Make it first.",
        ),
    ],
)
def test_what_would_fail_later_is_refused_first(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    refused = run(folder, "--output", str(tmp_path / "x"), *arguments)
    assert refused.exit_code == 2
    assert text in " ".join(refused.output.split())
    assert list(tmp_path.iterdir()) == []
