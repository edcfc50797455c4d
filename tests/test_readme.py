"""What README, CONTRIBUTING and the pages in docs/ say can be done, can be done; their links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from textwrap import dedent

import pytest
import torch
import yaml
from lightning import Trainer

from rlhf_lightning import (
    DPO,
    KTO,
    PPO,
    SFT,
    OnlineDPO,
    PreferenceDataModule,
    PromptDataModule,
    RewardModel,
    UnpairedDataModule,
)
from rlhf_lightning.commands.main import COMMANDS, TRAINER_COMMANDS, main
from rlhf_lightning.data import DataError, load_preferences, load_prompts, load_sft
from rlhf_lightning.functional import advantages, losses
from rlhf_lightning.models.causal_lm import Lora
from tests.test_cli import documented_scalars, logged_scalars
from tests.test_configs import ROOT

PAGES = {
    path: path.read_text(encoding="utf-8") for path in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
}
README = PAGES[ROOT / "README.md"]
TEXT = "\n".join(PAGES.values())


def blocks(language: str, text: str = TEXT) -> list[str]:
    """The fenced blocks of a language, of all pages, without the indentation of the list that they stand in."""
    return [dedent(block) for block in re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)]


EXAMPLES = (
    "def fit(",
    "RewardNetwork",
    "messages(",
    "SFT(",
    "backbone=network",
    "lambda prompts, responses",
    "AddedToken",
    "helpsteer2.jsonl",
)
"""A word that tells each Python block from the others; each is run by one test."""


def example(word: str) -> str:
    """The Python block with a word in it."""
    (block,) = [block for block in blocks("python") if word in block]
    return block


def test_every_block_is_of_a_kind_that_is_checked_here():
    languages = set(re.findall(r"^ *```(\S+)$", TEXT, re.MULTILINE))
    assert languages == {"bash", "python", "py", "yaml", "json"}
    assert sorted(example(word) for word in EXAMPLES) == sorted(blocks("python"))
    for block in blocks("py"):
        compile(block, "block", "exec")
    assert all(yaml.safe_load(block) for block in blocks("yaml"))
    assert all(json.loads(line) for block in blocks("json") for line in block.splitlines())


def commands(text: str = TEXT) -> list[list[str]]:
    """Every `rlhf-lightning COMMAND ...` of the shell blocks, without comments and continuation marks."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    found = [match for line in lines for match in re.findall(r"rlhf-lightning ([^&#]+)", line)]
    # Shell substitutions stand for a path, which the parser takes as it is.
    return [shlex.split(re.sub(r'"\$\(.*?\)"', "DIRECTORY", command)) for command in found]


def test_there_are_commands_to_check():
    assert {command[0] for command in commands()} >= {"fit", "test", "predict", "evaluate", "doctor", "plan", "export"}


@pytest.fixture
def mine(tmp_path, monkeypatch) -> None:
    """The module of the user's own functions, as the README has it."""
    (text,) = [block for block in blocks("py") if block.startswith("# mine.py")]
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_parses(capsys, monkeypatch, command):
    monkeypatch.chdir(ROOT)
    assert command[0] in COMMANDS
    if command[0] == "export":  # it has no configuration to print: only its arguments are parsed
        assert main([*command[:1], "--help"]) == 0
        assert {word for word in command if word.startswith("--")} <= {"--ckpt_path", "--out", "--merge"}
        return
    if command[0] in ("evaluate", "generate", "contrast", "judge"):
        parse = importlib.import_module(f"rlhf_lightning.commands.{command[0]}").parse
        assert parse(command[1:]) is not None
        return
    if command[0] not in TRAINER_COMMANDS:
        return
    extra = [] if {"--print_config", "--model.help", "--data.help"} & set(command) else ["--print_config"]
    if "CHECKPOINT" in command and "--config" not in command:  # a real one has its settings beside it
        command = [*command, "--config", "configs/reward_model.yaml"]
    assert main([*command, *extra]) == 0, capsys.readouterr().err


RECIPES = re.findall(r"\| `(configs/\w+\.yaml)` \| `(--.*?)` \|", PAGES[ROOT / "docs" / "papers.md"])


@pytest.mark.parametrize(("config", "keys"), RECIPES, ids=lambda text: text)
def test_the_keys_of_a_paper_make_its_model(capsys, monkeypatch, config, keys):
    monkeypatch.chdir(ROOT)
    assert main(["fit", "--config", config, *shlex.split(keys), "--print_config"]) == 0, capsys.readouterr().err
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    settings = {name: value for name, value in model["init_args"].items() if name not in ("optimizer", "backbone")}
    settings |= {"lora": settings["lora"] and Lora(**settings["lora"])} if "lora" in settings else {}
    assert resolve_name(model["class_path"])("builtin:tiny", **settings)


def test_the_python_example_scores_as_the_trainer_does(capsys, tmp_path, monkeypatch):
    """The same conversation through `predict`, which makes its token ids in another way."""
    monkeypatch.chdir(tmp_path)
    quickstart = ["--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml")]
    assert main(["fit", *quickstart, "--trainer.limit_train_batches", "3", "--trainer.max_epochs", "1"]) == 0
    capsys.readouterr()
    namespace: dict = {}
    exec(example("RewardNetwork"), namespace)
    printed = float(re.search(r"tensor\(\[(-?[\d.]+)", capsys.readouterr().out)[1])
    user, assistant = namespace["chat"]
    row = {"prompt": user["content"], "chosen": assistant["content"], "rejected": "No."}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--model.backbone", "models/quickstart_reward_model"]
    arguments += ["--data.train", "one.jsonl", "--data.val", "one.jsonl"]
    assert main(["predict", *quickstart, *arguments]) == 0
    (written,) = tmp_path.rglob("predictions.jsonl")
    assert json.loads(written.read_text())["chosen"] == pytest.approx(printed, abs=1e-4)
    with torch.no_grad():
        assert namespace["network"](namespace["batch"].input_ids, namespace["batch"].attention_mask).shape == (1,)


SHAPES = re.findall(r"^\| .* \| ([\w, ]+) \| `({.*})` \|$", PAGES[ROOT / "docs" / "data.md"], re.MULTILINE)
"""What each example row of the table in docs/data.md is read as, and the row."""


def test_the_table_of_rows_has_rows_of_every_kind():
    assert {kinds for kinds, _ in SHAPES} == {"pairs, SFT, prompts", "SFT, prompts", "prompts"}
    assert len(SHAPES) >= 26


@pytest.mark.parametrize(("kinds", "row"), SHAPES)
def test_an_example_row_is_read_as_what_the_table_says_and_as_nothing_else(tmp_path, kinds, row):
    (tmp_path / "one.jsonl").write_text(row)
    for name, load in {"pairs": load_preferences, "SFT": load_sft, "prompts": load_prompts}.items():
        if name not in kinds.split(", "):
            with pytest.raises(DataError):
                load(tmp_path / "one.jsonl")
            continue
        (found,), _ = load(tmp_path / "one.jsonl")
        assert "7" in found.prompt[-1]["content"]
        assert found.responses == {"pairs": ("Yes.", "No."), "SFT": ("Yes.",), "prompts": ()}[name]


def test_the_python_example_of_helpsteer2_makes_pairs_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rated = [("a", "good", 4), ("a", "bad", 1), ("b", "x", 2), ("b", "y", 2), ("c", "worse", 0), ("c", "better", 3)]
    rows = [{"prompt": prompt, "response": text, "helpfulness": score} for prompt, text, score in rated]
    (tmp_path / "helpsteer2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exec(example("helpsteer2.jsonl"), {})
    pairs, _ = load_preferences(tmp_path / "pairs.jsonl")
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [("good", "bad", 3), ("better", "worse", 3)]


def test_the_python_example_of_prompts_shows_a_batch_and_a_conversation(capsys):
    exec(example("messages("), {})
    assert re.fullmatch(r"\[\d+, \d+\] \[\{'role': 'user', 'content': '.+[.?]'\}\]\n", capsys.readouterr().out)


def test_the_python_example_of_a_tokenizer_keeps_line_breaks(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    core = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "[unused1]": 2}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained("bert_like")
    exec(example("AddedToken").replace("sentence-transformers/all-MiniLM-L6-v2", "bert_like"), {})
    made = PreTrainedTokenizerFast.from_pretrained("minilm_with_lines")
    assert 2 in made("a\na").input_ids
    assert 2 not in PreTrainedTokenizerFast.from_pretrained("bert_like")("a\na").input_ids


def test_the_python_example_of_training_on_rows_in_memory_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(example("SFT("), namespace)
    assert namespace["trainer"].global_step > 0
    assert len(namespace["trainer"].datamodule.pairs["val"]) > 0


def test_the_python_example_goes_from_pairs_to_ppo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Is {n} even?", "chosen": "Yes." if n % 2 else "No.", "rejected": "Maybe."} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    exec(example("def fit("), namespace := {})
    assert namespace["policy"].rollouts_done == 3
    assert all((tmp_path / "models" / f"mine_{name}" / "config.json").exists() for name in ("reward", "dpo", "ppo"))


def test_the_python_example_of_a_model_object_trains_and_exports_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(example("backbone=network"), namespace)
    assert namespace["trainer"].global_step == 4
    files = {path.name for path in (tmp_path / "models" / "mine").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


OWN = [command for command in commands() if any("mine" in word for word in command)]


@pytest.mark.usefixtures("mine", "forked_proof")
@pytest.mark.parametrize("command", OWN, ids=" ".join)
def test_functions_and_classes_of_the_users_own_train(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    command = [str(ROOT / word) if word.startswith("configs/") else word for word in command]
    small = [
        "--model.backbone",
        "builtin:tiny",
        "--trainer.limit_train_batches",
        "2",
        "--trainer.limit_val_batches",
        "1",
    ]
    small += ["--trainer.max_epochs", "1", "--data.batch_size", "4", "--trainer.callbacks", "[]"]
    small += ["--model.max_new_tokens", "6"] if "ppo" in command[2] else []
    assert main([*command, *small]) == 0, capsys.readouterr().err
    (run,) = (tmp_path / "runs").glob("quickstart_*/version_0")
    assert set() < logged_scalars(run) <= documented_scalars("PPO" if "ppo" in command[2] else "DPO")


def test_the_loss_and_the_estimator_of_contributing_do_what_they_say():
    loss, estimator = re.findall(r"```py\n(.*?)```", PAGES[ROOT / "CONTRIBUTING.md"], re.DOTALL)
    exec(loss, found := vars(losses) | {"PREFERENCE_LOSSES": {}})
    sides = torch.tensor([[-1.0, -4.0], [-3.0, -2.0], [-1.0, -4.0], [-2.0, -4.0]])
    assert found["PREFERENCE_LOSSES"]["squared_hinge"].function(*sides, beta=0.5).tolist() == [0.25, 4.0]
    exec(estimator, found := vars(advantages) | {"ADVANTAGES": {}})
    rewards, mask = torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    settings = {"group_size": 2, "gamma": 1.0, "gae_lambda": 0.95}
    made, returns = found["ADVANTAGES"]["centered"](rewards, torch.zeros(2, 2), mask, **settings)
    assert made.tolist() == [[-1.0, -1.0], [1.0, 0.0]]
    assert not returns.any()


def test_the_script_with_a_function_as_reward_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(example("lambda prompts, responses"), found)
    assert found["policy"].rollouts_done == 3
    assert found["policy"].hparams.reward_model.endswith(":<lambda>")


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    marked = README.split("<!-- test-command -->")[1].split("```")[1]
    assert "<!-- test-command -->" in script
    assert (
        marked.strip().splitlines()[-1]
        == "pip install -c .ci/constraints.txt -e '.[dev]' && mypy && python -m pytest -n 2 --dist loadfile"
    )


def tables() -> dict[str, list[str]]:
    """The first column of every printed table, line by line, by the first word of its header."""
    printed = re.findall(r"┏.*?└", TEXT, re.DOTALL)
    rows = [[row.split("│")[1].strip() for row in table.splitlines() if row.startswith("│")] for table in printed]
    return {re.search(r"┃ (\w+)", table)[1]: names for table, names in zip(printed, rows, strict=True)}


def test_the_table_of_dpo_has_the_rows_that_the_program_prints():
    from rlhf_lightning import DPO
    from rlhf_lightning.training.results import table_rows

    assert tables()["metric"] == [words for _, words in table_rows(dict.fromkeys(DPO("builtin:tiny").val_metrics, 0.0))]


def test_the_table_of_the_quickstart_has_the_targets_of_an_evaluation():
    from rlhf_lightning.evaluation.results import EvaluationResults
    from rlhf_lightning.evaluation.verdicts import verdicts

    rows = tables()["target"]
    nothing = EvaluationResults("", [], [], None, [], [], {})
    assert " ".join(filter(None, rows)) == " ".join(verdict.target for verdict in verdicts(nothing))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures that lie in the repository."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not heading or heading in anchors(file), target


def test_readme_leads_to_every_page_and_is_short():
    reached = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert set(PAGES) - reached == {ROOT / "README.md"}
    assert len(README.splitlines()) <= 200


NAMED = sorted(set(re.findall(r"`(rlhf_lightning(?:\.\w+)+(?::\w+)?)", TEXT)) - {"rlhf_lightning.json"})


@pytest.mark.parametrize("name", NAMED)
def test_names_of_the_code_are_there(name):
    """`rlhf_lightning.module:function`, or with a dot in place of the colon."""
    assert resolve_name(name) is not None


def parameters(*classes: type) -> set[str]:
    """Names of the arguments of constructors, their parents' included."""
    return {name for kind in classes for parent in kind.__mro__ for name in signature(parent.__init__).parameters}


KEYS = {
    "model": parameters(RewardModel, SFT, DPO, KTO, PPO, OnlineDPO),
    "data": parameters(PreferenceDataModule, PromptDataModule, UnpairedDataModule),
    "trainer": parameters(Trainer),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_are_those_of_the_classes(page):
    found = re.findall(r"(?:`|--)(model|data|trainer)\.(\w+)", PAGES[page])
    others = {"help", "power"}  # of the command line; of an example
    assert {(group, key) for group, key in found if key not in KEYS[group] | others} == set()
