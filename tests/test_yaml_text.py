"""What aliases may expand a configuration to: all files here are a few hundred bytes, and no bound is above that."""

from __future__ import annotations

import pytest
import yaml

from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.files import yaml_text
from rlhf_lightning.files.yaml_text import check_configurations, check_yaml, write_configuration

ALIASES = "a: &a [xxxx, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"
"""6 values and characters in a, 19 with the list in b, 58 in c; with the keys and the mapping 6 + 19 + 58 + 3 + 1."""


def test_an_expansion_is_counted_and_refused_beyond_the_bound():
    check_yaml(ALIASES, largest=87)
    with pytest.raises(ConfigurationError, match="line 3: aliases expand it to more than 86 characters"):
        check_yaml(ALIASES, largest=86)


def test_a_text_without_aliases_may_be_as_long_as_it_is():
    check_yaml("- " + "x" * 500 + "\n- [a, b, {c: d}]\n", largest=10)


def test_merged_mappings_count_too():
    check_yaml("a: &a {k: v, l: w}\nb: {<<: *a, m: n}\n", largest=100)
    with pytest.raises(ConfigurationError, match="line 2"):
        check_yaml("a: &a {k: vvvvvvvvvvvvvvvvvvvvvvv}\nb: {<<: [*a, *a, *a, *a]}\n", largest=60)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a: &a [*a]", r"\*a holds itself"), ("[" * 101 + "]" * 101, "more than 100 deep"), ("- " * 101, "100 deep")],
)
def test_what_holds_itself_or_nests_without_end_is_refused(text, reason):
    with pytest.raises(ConfigurationError, match=f"line 1: .*{reason}"):
        check_yaml(text)


def test_a_text_that_is_no_yaml_is_left_to_its_reader():
    with pytest.raises(yaml.YAMLError):
        check_yaml("a: [")
    check_yaml("a: *nobody")


@pytest.mark.parametrize("command", ["fit", "evaluate", "pipeline", "doctor", "plan"])
def test_every_command_refuses_such_a_file_by_its_name(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(yaml_text.check_yaml, "__kwdefaults__", {"largest": 60, "deepest": 20})
    (tmp_path / "aliases.yaml").write_text(ALIASES)
    (tmp_path / "broken.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    for file, reason in (("aliases.yaml", "line 3: aliases expand it"), ("broken.yaml", "not valid YAML")):
        assert main([command, "--config", file]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{file}: {reason}" in line


def test_a_file_below_a_configuration_is_held_to_it_as_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(yaml_text.check_yaml, "__kwdefaults__", {"largest": 60, "deepest": 20})
    (tmp_path / "model.yaml").write_text(ALIASES)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--model", "model.yaml"]) == 2
    assert "aliases expand it" in capsys.readouterr().err


def test_a_configuration_that_a_run_wrote_is_named_when_it_was_changed(tmp_path, caplog):
    file = tmp_path / "config.yaml"
    write_configuration(file, "# a comment\nlr: 0.001\nname: déjà vu\n")
    check_configurations(["--config", str(file)])
    assert caplog.text == ""
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["lr"] == 0.001
    file.write_text(file.read_text(encoding="utf-8").replace("0.001", "0.003"), encoding="utf-8")
    check_configurations([f"--config={file}"])
    assert f"{file}: is not as its run wrote it" in caplog.text


@pytest.mark.parametrize("text", ["", "# a comment\n\n  # another"])
def test_a_configuration_in_which_nothing_stands_is_refused_by_its_name(text, tmp_path):
    (tmp_path / "cut.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"cut\.yaml: is empty"):
        check_configurations(["--config", str(tmp_path / "cut.yaml")])
