"""`export`: the directory holds what the trainer had, proved by a fresh process, and says so."""

from __future__ import annotations

import filecmp
import json
import re
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from rlhf_lightning import DPO, RewardModel, RewardNetwork
from rlhf_lightning.commands.export import export_checkpoint
from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.files.seals import exported_from
from rlhf_lightning.models import probe
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.rewards.scorers import RewardScorer
from rlhf_lightning.training.callbacks import ExportBest
from rlhf_lightning.training.results import Results
from tests.training.conftest import build, build_dpo, pairs, sgd, trainer  # noqa: F401 (fixtures)
from tests.training.test_dpo import LORA


@pytest.fixture
def checkpoint(request, trainer, tmp_path):  # noqa: F811
    """Train a few steps with a builder and settings, as named by the parameter; the path of the checkpoint."""

    def make(builder: str, *callbacks, ckpt_path: str | None = None, **settings) -> str:
        save = ModelCheckpoint(tmp_path / "checkpoints", filename="last")
        module, datamodule = request.getfixturevalue(builder)(**settings)
        trainer(callbacks=[Results(), save, *callbacks], enable_checkpointing=True, max_epochs=2).fit(
            module, datamodule, ckpt_path=ckpt_path
        )
        return save.best_model_path

    return make


def response_sums(policy: CausalLM, batches) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([policy(b.input_ids, b.attention_mask, b.response_mask).sums for b in batches])


def batches_of(build_dpo, trainer):  # noqa: F811
    module, datamodule = build_dpo()
    trainer().validate(module, datamodule, verbose=False)
    return list(datamodule.val_dataloader())


@pytest.mark.parametrize("merge", [True, False, None], ids=["merged", "unmerged", "whole"])
def test_exported_log_probs_are_those_of_the_trainer(request, build_dpo, trainer, checkpoint, tmp_path, merge):  # noqa: F811
    if merge is not None:
        request.getfixturevalue("forked_proof")
    model = {} if merge is None else LORA | {"optimizer": sgd(0.05)}
    path, out = checkpoint("build_dpo", model=model), tmp_path / "exported"
    difference, unit = export_checkpoint(path, out, merge=merge is not False)
    assert unit == "nats"
    assert difference < 1e-4 if merge else difference == 0
    in_trainer = DPO.load_from_checkpoint(path, layout="padded").policy  # rounded as transformers rounds
    exported = CausalLM(AutoModelForCausalLM.from_pretrained(out))
    batches = batches_of(build_dpo, trainer)
    torch.testing.assert_close(
        response_sums(exported, batches), response_sums(in_trainer, batches), rtol=0, atol=1e-3 if merge else 0
    )
    start = build_dpo()[0]
    start.configure_model()
    assert (response_sums(exported, batches) - response_sums(start.policy, batches)).abs().max() > 0.1
    card = (out / "README.md").read_text()
    assert f"on a probe of 24 tokens is {difference:.3g} nats" in card.replace("\\\n", "")
    assert "| `rewards/accuracies` (reward accuracy) |" in card
    assert "| `kl` (log-ratio (k1)) |" in card
    assert '"pairs": 11' in card
    assert '"lr": ' in card
    assert re.search(r"\| `pairs` \| 7 \|", card)
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(start.hparams.backbone).chat_template
    )
    assert (out / "adapter_config.json").is_file() is (merge is False)
    loaded = exported.model
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight, "tied weights stay tied"


def test_a_reward_model_is_exported_too(checkpoint, tmp_path, capsys, tiny_qwen2):
    start = shutil.copytree(tiny_qwen2, tmp_path / "start")
    settings = json.loads((start / "config.json").read_text()) | {"pad_token_id": None, "attention_dropout": 0.5}
    (start / "config.json").write_text(json.dumps(settings))
    path, out = checkpoint("build", model={"backbone": str(start)}), tmp_path / "exported"
    assert main(["export", "--ckpt_path", path, "--out", str(out)]) == 0
    assert "largest difference 0 units of score" in capsys.readouterr().out
    own = RewardModel.load_from_checkpoint(path, layout="padded").network.eval()
    network = RewardNetwork.from_pretrained(out)
    rows = probe.probe_rows(900)
    with torch.no_grad():
        assert torch.equal(network(*rows), own(*rows))
    written = json.loads((out / "config.json").read_text())
    assert written["pad_token_id"] == AutoTokenizer.from_pretrained(out).pad_token_id
    assert (written["attention_dropout"], written["use_cache"]) == (0.5, settings["use_cache"])


@pytest.mark.usefixtures("forked_proof")
@pytest.mark.parametrize("head", ["mlp", "linear"])
@pytest.mark.parametrize("template", [None, "after the end"])
def test_the_card_of_a_reward_model_loads_it_with_our_score(checkpoint, tmp_path, monkeypatch, head, template):
    """Also with a template that writes a line end after the token that ends a response, as most do."""
    data = {}
    if template:
        file = tmp_path / "mine.jinja"
        file.write_text(
            "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        )
        data = {"chat_template": str(file)}
    path, out = checkpoint("build", model={"head": head}, data=data), tmp_path / "exported"
    export_checkpoint(path, out)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    card = (out / "README.md").read_text()
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], namespace)
    user, assistant = namespace["conversation"]
    (ours,) = RewardScorer(str(out))([[user]], [assistant["content"]])
    assert namespace["score"] == pytest.approx(ours.score, abs=1e-5)
    line = re.search(r"`(pipeline\(.*?\))\(text, (.*?)\)`", card)
    (found,) = eval(f"{line[1]}(text, {line[2]})", namespace | {"pipeline": pipeline})
    assert found["score"] == pytest.approx(ours.score, abs=1e-5)
    assert namespace["text"].endswith("<|im_end|>")
    pair = [{"role": "query", "content": user["content"]}, {"role": "document", "content": assistant["content"]}]
    assert namespace["tokenizer"].apply_chat_template(pair, tokenize=False) == namespace["text"]
    with_trust = "trust_remote_code=True" in card
    assert with_trust is (head == "mlp")


@pytest.mark.parametrize("merge", [True, False])
def test_export_best_writes_the_best_checkpoint(checkpoint, tmp_path, build_dpo, trainer, merge):  # noqa: F811
    callback = ExportBest(str(tmp_path / "best"), merge=merge)
    path = checkpoint("build_dpo", callback, model=LORA | {"optimizer": sgd(0.05)})
    assert (tmp_path / "best" / "adapter_config.json").is_file() is not merge
    exported = CausalLM(AutoModelForCausalLM.from_pretrained(tmp_path / "best"))
    batches = batches_of(build_dpo, trainer)
    own = response_sums(DPO.load_from_checkpoint(path).policy, batches)
    torch.testing.assert_close(
        response_sums(exported, batches), own, rtol=0 if merge else 1e-6, atol=1e-3 if merge else 0
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "best").chat_template


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_model_that_is_replaced_is_named_by_the_checkpoint_that_it_came_from(checkpoint, tmp_path, build, caplog):  # noqa: F811
    caplog.set_level("INFO")
    first, resumed = ExportBest(str(tmp_path / "best")), ExportBest(str(tmp_path / "best"))
    path = checkpoint("build", first)
    assert checkpoint("build", resumed, ckpt_path=path) == path
    for callback in (first, resumed):
        assert (callback.exported, callback.remark) == (True, "")
    again = ExportBest(str(tmp_path / "best"))
    newer = checkpoint("build", again)
    assert newer != path
    assert again.remark == f" (replaced the one from {path})"
    assert any(path in message and "will be replaced" in message for message in caplog.messages)
    assert exported_from(tmp_path / "best") == newer


@pytest.mark.usefixtures("forked_proof")
def test_the_command_names_what_it_replaces(checkpoint, tmp_path, capsys):
    path, export = checkpoint("build"), tmp_path / "exported"
    for replaced in ("", f" (replaced the one from {path})"):
        assert main(["export", "--ckpt_path", path, "--out", str(export)]) == 0
        assert capsys.readouterr().out.startswith(f"model:       {export}{replaced}\n")


def test_a_template_of_the_run_is_exported_with_the_model_and_with_the_arguments_it_had(
    checkpoint, tmp_path, monkeypatch
):
    template = (
        "{{ tone | default('') }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (tmp_path / "mine.jinja").write_text(template)
    options = {"chat_template": str(tmp_path / "mine.jinja"), "chat_template_kwargs": {"tone": "Be kind."}}
    path = checkpoint("build_dpo", data=options)
    (tmp_path / "mine.jinja").unlink()
    own = DPO.load_from_checkpoint(path).policy
    outputs = probe.log_probs(own.model, own.config.vocab_size)  # the fresh process costs time
    monkeypatch.setattr("rlhf_lightning.commands.export._reloaded_outputs", lambda *_: outputs)
    export_checkpoint(path, tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "Be kind.[user] Hi<|im_end|>\n"


# ---- what is refused ---------------------------------------------------------------------------------------


def test_a_directory_that_does_not_give_the_trainers_outputs_is_called_so(checkpoint, tmp_path, monkeypatch):
    path = checkpoint("build_dpo")
    own = DPO.load_from_checkpoint(path).policy
    outputs = probe.log_probs(own.model, own.config.vocab_size)
    monkeypatch.setattr("rlhf_lightning.commands.export._reloaded_outputs", lambda *_: outputs + 0.01)
    with pytest.raises(ModelError, match=r"its outputs differ by 0\.01 nats from the trainer's"):
        export_checkpoint(path, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.usefixtures("forked_proof")
def test_what_was_exported_before_stays_until_the_new_one_is_proved(checkpoint, tmp_path, monkeypatch):
    path, out = checkpoint("build_dpo"), tmp_path / "exported"
    export_checkpoint(path, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr("rlhf_lightning.commands.export._reloaded_outputs", lambda *_: torch.zeros(1))
    with pytest.raises(ModelError, match="nothing was written"):
        export_checkpoint(path, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


@pytest.mark.parametrize("key", ["backbone", "reference"])
def test_no_model_is_written_over_one_that_its_run_needs(checkpoint, build_dpo, trainer, tmp_path, tiny_qwen2, key):  # noqa: F811
    needed = shutil.copytree(tiny_qwen2, tmp_path / "needed")
    (needed / "rlhf_lightning.json").write_text("{}")  # even one that this program wrote
    path = checkpoint("build_dpo", model={key: str(needed)})
    with pytest.raises(ConfigurationError, match=rf"needed: is model\.{key} of this run"):
        export_checkpoint(path, needed)
    module, datamodule = build_dpo(model={key: str(needed)})
    with pytest.raises(ConfigurationError, match=rf"needed: is model\.{key} of this run"):
        trainer(callbacks=[ExportBest(str(needed))]).fit(module, datamodule)
    assert filecmp.cmp(needed / "model.safetensors", tiny_qwen2 / "model.safetensors", shallow=False)


def test_a_model_that_this_program_did_not_write_is_not_replaced(checkpoint, tmp_path, tiny_llama):
    theirs = shutil.copytree(tiny_llama, tmp_path / "theirs")
    with pytest.raises(ConfigurationError, match="holds a model that this program did not write"):
        export_checkpoint(checkpoint("build_dpo"), theirs)
    assert filecmp.cmp(theirs / "model.safetensors", tiny_llama / "model.safetensors", shallow=False)


def test_adapters_are_asked_for_only_where_there_are_some(checkpoint, tmp_path):
    with pytest.raises(ConfigurationError, match="has no adapters"):
        export_checkpoint(checkpoint("build_dpo"), tmp_path / "exported", merge=False)


def test_a_directory_that_does_not_load_is_called_so(checkpoint, tmp_path, monkeypatch):
    def broken(self, directory, **settings):
        (directory / "config.json").write_text("{}")

    path = checkpoint("build_dpo")
    monkeypatch.setattr(DPO, "export", broken)
    with pytest.raises(ModelError, match="does not load in a fresh process"):
        export_checkpoint(path, tmp_path / "exported")


@pytest.mark.parametrize("held", ["a file", "files that are no model"])
def test_a_directory_that_holds_something_else_is_refused(checkpoint, tmp_path, held):
    target = tmp_path / "taken"
    if held == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigurationError, match="taken"):
        export_checkpoint(checkpoint("build_dpo"), target)
    assert "mine" in (target.read_text() if held == "a file" else (target / "thesis.tex").read_text())


@pytest.mark.usefixtures("forked_proof")
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_on_four_bits_are_exported_alone_or_merged(checkpoint, build_dpo, trainer, tmp_path, merge):  # noqa: F811
    """The merged model is not quantized, and gives what the 4-bit model gives with its adapters."""
    pytest.importorskip("bitsandbytes")
    callback = ExportBest(str(tmp_path / "best"), merge=merge)
    path = checkpoint("build_dpo", callback, model=LORA | {"load_in_4bit": True, "optimizer": sgd(0.05)})
    assert callback.exported
    difference, _ = export_checkpoint(path, tmp_path / "exported", merge=merge)
    assert difference < 1e-4
    if not merge:
        assert (tmp_path / "best" / "adapter_config.json").is_file()
        return
    batches = batches_of(build_dpo, trainer)
    own = response_sums(DPO.load_from_checkpoint(path).policy, batches)
    for directory in (tmp_path / "best", tmp_path / "exported"):
        config = json.loads((directory / "config.json").read_text())
        assert "quantization_config" not in config
        merged = AutoModelForCausalLM.from_pretrained(directory)
        assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
        torch.testing.assert_close(response_sums(CausalLM(merged), batches), own, rtol=0, atol=1e-3)
    start = DPO.load_from_checkpoint(path).policy
    with start.adapters_off():
        assert (response_sums(start, batches) - own).abs().max() > 0.1, "or the adapters do nothing"


def test_a_checkpoint_without_its_origin_is_refused(checkpoint, tmp_path):
    path = checkpoint("build_dpo")
    stored = torch.load(path, weights_only=True)
    for origin in (None, {"class": "os.system"}):
        torch.save(stored | {"rlhf_lightning": origin} if origin else _without(stored), tmp_path / "old.ckpt")
        with pytest.raises(ConfigurationError, match=r"Mine\.load_from_checkpoint"):
            export_checkpoint(tmp_path / "old.ckpt", tmp_path / "exported")


def _without(stored: dict) -> dict:
    return {name: value for name, value in stored.items() if name != "rlhf_lightning"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "x"], ["--ckpt_path", "required"]),
        (["--ckpt_path", "absent.ckpt", "--out", "x"], ["absent.ckpt", "no checkpoint"]),
        (["--ckpt_path", "a", "--out", "x", "--merge", "maybe"], ["--merge", "maybe"]),
        (["--ckpt_path", "a", "--out", "x", "--merg", "true"], ["--merg"]),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("rlhf-lightning: error: ")
    assert "\n" not in line
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []
