"""An exported directory: whole at every moment, whatever kills its writer, damaged weights told, replies ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.files import seals
from rlhf_lightning.files.seals import check_seal
from rlhf_lightning.models import storage as directories
from rlhf_lightning.models.backbones import load_backbone
from rlhf_lightning.models.causal_lm import CausalLM, Lora
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.models.storage import check_free, end_at, replaced_model
from rlhf_lightning.tiny import resolve_model
from tests.training.killer import signal_at_line


def write(directory: Path, number: int) -> None:
    """Stands for a model of several files that belong together."""
    with replaced_model(directory) as made:
        for shard in ("model-1.safetensors", "model-2.safetensors"):
            save_file({"w": torch.full((4,), float(number))}, made / shard)
        (made / "config.json").write_text(json.dumps({"number": number}))


def number_of(directory: Path) -> int:
    """Which model a directory holds; fails for a mixture of two."""
    check_seal(directory)
    numbers = {load_file(file)["w"][0].item() for file in directory.glob("*.safetensors")}
    assert len(list(directory.glob("*.safetensors"))) == 2
    numbers.add(float(json.loads((directory / "config.json").read_text())["number"]))
    (number,) = numbers
    return int(number)


def killed_at(line: int, function, *arguments) -> bool:
    """Call a function in a process that kills itself before the given line of `directories` or `seals` that it runs.

    Returns False where it came to its end before.
    """
    child = os.fork()
    if child == 0:
        signal_at_line((directories.__file__, seals.__file__), line)
        function(*arguments)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0
    return os.WIFSIGNALED(ended)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_writer_killed_anywhere_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(directories, "_exchange", lambda *_: False)
    directory = tmp_path / "model"
    write(directory, 1)
    (directory / "notes").mkdir()
    (directory / "notes" / "mine.txt").write_text("mine")
    seen, line = [], 0
    while killed_at(line := line + (3 if in_one_step else 1), write, directory, 2):
        assert in_one_step is False or number_of(directory) in (1, 2)
        assert check_free(directory) is True, "the next one is not refused"
        seen.append(number_of(directory))
        assert (directory / "notes" / "mine.txt").read_text() == "mine"
        assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left"
        if seen[-1] == 2:
            write(directory, 1)
    assert seen[0] == 1
    assert seen[-1] == 2
    assert len(seen) > (15 if in_one_step else 60)


def test_the_writer_of_another_process_is_left_alone_while_it_lives(tmp_path):
    with replaced_model(tmp_path / "model") as made:
        (made / "config.json").write_text("{}")
        child = os.fork()
        if child == 0:
            check_free(tmp_path / "model")
            os._exit(not made.is_dir())
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "model").mkdir(mode=0o750)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    write(tmp_path / "model", 1)
    assert (tmp_path / "model").is_symlink()
    assert number_of(tmp_path / "disk" / "model") == 1
    assert (tmp_path / "disk" / "model").stat().st_mode & 0o777 == 0o750
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"model"}


def test_where_a_directory_cannot_be_renamed_its_files_are_replaced(tmp_path, monkeypatch):
    """As where another file system is mounted there."""
    write(tmp_path / "model", 1)
    (tmp_path / "model" / "model-3.safetensors").write_text("of a larger model")
    monkeypatch.setattr(directories, "_exchange", lambda *_: False)
    rename = Path.rename

    def busy(path, target):
        if path.name == "model" and "part" not in str(path):
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    write(tmp_path / "model", 2)
    assert number_of(tmp_path / "model") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_of_this_program_without_its_settings_is_replaced(tmp_path):
    """As versions before left it that were killed while they replaced it file by file."""
    write(tmp_path / "model", 1)
    (tmp_path / "model" / "config.json").unlink()
    assert check_free(tmp_path / "model") is True
    (tmp_path / "model" / "rlhf_lightning.json").unlink()
    with pytest.raises(ConfigurationError, match="holds files that are no model"):
        check_free(tmp_path / "model")


# ---- damaged weights


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_flipped_bit_in_settings_or_tokenizer_is_refused_and_the_model_card_may_be_edited(tmp_path, tiny_qwen2, name):
    with replaced_model(tmp_path / "model") as made:
        CausalLM.from_pretrained(str(tiny_qwen2)).save_pretrained(made)
        load_tokenizer(str(tiny_qwen2)).save_pretrained(made)
        (made / "README.md").write_text("a card")
    (tmp_path / "model" / "README.md").write_text("another card")
    for load in (load_config, load_tokenizer):
        load(str(tmp_path / "model"))
    flip(tmp_path / "model" / name)
    for load in (load_config, load_tokenizer, CausalLM.from_pretrained):
        with pytest.raises(ModelError, match=rf"{name}: damaged.*remove rlhf_lightning\.json"):
            load(str(tmp_path / "model"))


def test_a_damaged_builtin_model_in_the_cache_is_made_anew(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = Path(resolve_model("builtin:tiny"))
    whole = {file.name: file.read_bytes() for file in directory.iterdir()}
    flip(directory / "config.json")
    assert resolve_model("builtin:tiny") == str(directory)
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == whole
    assert f"{directory}: this model in the cache is damaged, so it is made again" in caplog.text


@pytest.mark.parametrize("kind", ["policy", "backbone", "reward", "adapters"])
def test_a_flipped_bit_in_written_weights_is_refused_until_the_mark_is_removed(tmp_path, tiny_qwen2, kind):
    directory = tmp_path / "model"
    if kind == "reward":
        RewardNetwork.from_backbone(str(tiny_qwen2)).save_pretrained(directory)
    elif kind == "adapters":
        CausalLM.from_pretrained(str(tiny_qwen2), lora=Lora(r=2)).save_pretrained(directory, merge=False)
    else:
        CausalLM.from_pretrained(str(tiny_qwen2)).save_pretrained(directory)
    load = {
        "policy": CausalLM.from_pretrained,
        "backbone": load_backbone,
        "reward": RewardNetwork.from_pretrained,
        "adapters": CausalLM.from_pretrained,
    }[kind]
    load(str(directory))
    (file,) = directory.glob("*.safetensors")
    flip(file)
    with pytest.raises(ModelError, match=rf"{file.name}: damaged.*remove rlhf_lightning\.json"):
        load(str(directory))
    (directory / "rlhf_lightning.json").unlink()
    load(str(directory))


@pytest.mark.parametrize("harm", ["shard gone", "mark cut"])
def test_a_part_that_is_missing_is_named(tmp_path, harm):
    write(tmp_path / "model", 1)
    mark = tmp_path / "model" / "rlhf_lightning.json"
    if harm == "shard gone":
        (tmp_path / "model" / "model-2.safetensors").unlink()
    else:
        mark.write_text(mark.read_text()[:40])
    with pytest.raises(ModelError, match="model-2" if harm == "shard gone" else "rlhf_lightning.json: cannot be read"):
        check_seal(tmp_path / "model")


# ---- generation settings


@pytest.mark.parametrize(("before", "after"), [(None, 7), (5, [7, 5]), ([5, 6], [7, 5, 6]), (7, 7), ([6, 7], [6, 7])])
def test_replies_end_where_training_ended_them_and_where_they_did_before(tmp_path, before, after):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": before, "top_p": 0.9}))
    end_at(tmp_path, 7)
    assert json.loads(path.read_text()) == {"eos_token_id": after, "top_p": 0.9}


def test_what_is_no_language_model_stays_as_it_is(tmp_path):
    end_at(tmp_path, 7)
    assert not list(tmp_path.iterdir())
