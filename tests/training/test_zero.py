"""DeepSpeed ZeRO-2 on the CPU, for real: the steps of plain training, accumulated, clipped, in half precision."""

from __future__ import annotations

import os
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.precision import move
from rlhf_lightning.training import references
from rlhf_lightning.training.checkpoints import fault_of, read_checkpoint, restored_module, shard_files
from rlhf_lightning.training.step_watch import StepWatch
from rlhf_lightning.training.trial import TrialStep
from rlhf_lightning.training.zero import ZeroStrategy, corrected, register
from tests.training.conftest import weights

pytest.importorskip("deepspeed")
register()
# One process group stays open for the whole session; then Lightning warns of plain trainers too.
pytestmark = pytest.mark.filterwarnings("ignore:It is recommended to use `self.log:UserWarning")

HALVES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
# 7 batches in an epoch: the last optimizer step has 1 of 3.
SETTINGS = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "max_epochs": 2}


@pytest.fixture(autouse=True, scope="module")
def environment_of_its_own():
    """DeepSpeed leaves its process group, and the address of it to every process begun later; and a seed that another
    test left would be set again by distributed strategies alone."""
    before = dict(os.environ)
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.modules["deepspeed.comm.comm"].cdb = None
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def with_val(pairs):
    """14 training pairs: 11, and 3 of them again. 7 batches of 2."""
    source = {"source": str(pairs / "train.jsonl"), "weight": 14 / 11}
    return {"train": [source], "val": str(pairs / "val.jsonl")}


class Norms(pl.Callback):
    """The norm of the gradient of each optimizer step, before clipping."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not isinstance(trainer.strategy, ZeroStrategy):
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    def on_train_batch_end(self, trainer, *_):
        if isinstance(trainer.strategy, ZeroStrategy) and len(self.norms) < trainer.global_step:
            self.norms.append(float(trainer.strategy.deepspeed_engine.get_global_grad_norm()))


@pytest.mark.parametrize("kind", ["build", "build_dpo"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero2_offload"])
def test_steps_are_those_of_plain_training_accumulated_and_clipped(request, trainer, with_val, kind, strategy):
    results = []
    for name in ("auto", strategy):
        module, datamodule = request.getfixturevalue(kind)(data=with_val)
        norms = Norms()
        run = trainer(strategy=name, callbacks=[norms], **SETTINGS)
        run.fit(module, datamodule=datamodule)
        results.append((weights(module), norms.norms, {k: float(v) for k, v in run.callback_metrics.items()}))
        assert run.global_step == 6
    assert run.strategy.deepspeed_engine.global_steps == 6
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-6)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)
    assert max(results[0][1]) > 0.5, "clipping does something"
    assert results[1][2] == pytest.approx(results[0][2], rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("precision", HALVES)
def test_half_precision_trains_close_to_float32_and_begins_at_ln_2(build_dpo, trainer, with_val, precision):
    """`check_start` would stop the run if the frozen reference were not the policy, bit for bit as rounded."""
    results = []
    for strategy, bits in (("auto", "32-true"), ("zero2", precision)):
        module, datamodule = build_dpo(data=with_val)
        trainer(strategy=strategy, precision=bits, **SETTINGS).fit(module, datamodule=datamodule)
        results.append(weights(module).float())
    assert (
        next(module.policy.parameters()).dtype == {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}[precision]
    )
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.01)


def test_policy_and_frozen_reference_are_equal_bit_for_bit_in_half_precision(build_dpo, trainer, with_val):
    module, datamodule = build_dpo(data=with_val)
    seen = []
    step = module.losses
    module.losses = lambda policy, reference: seen.append((policy, reference)) or step(policy, reference)
    trainer(strategy="zero2", precision="16-mixed", max_steps=1, limit_val_batches=0).fit(module, datamodule=datamodule)
    policy, reference = seen[0]
    assert torch.equal(policy.chosen, reference.chosen)
    assert torch.equal(policy.rejected, reference.rejected)
    buffers = dict(module.reference.network.named_buffers())
    assert {b.dtype for name, b in buffers.items() if "inv_freq" in name} == {torch.float32}
    assert {b.dtype for name, b in module.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_frozen_reference_is_moved_once_before_the_policy_is_loaded(build_dpo, trainer, with_val, monkeypatch):
    """The host never holds it beside the policy, or beside an optimizer that is offloaded."""
    moved, held = [], []
    monkeypatch.setattr(references, "move", lambda *given: moved.append(given[1:]) or move(*given))
    module, datamodule = build_dpo(data=with_val)
    build = module.build_network
    module.build_network = lambda: held.extend({p.dtype for p in module.reference.network.parameters()}) or build()
    trainer(strategy="zero2", precision="16-mixed", max_steps=3).fit(module, datamodule=datamodule)
    assert [dtype for _, dtype in moved] == [torch.float16]
    assert held == [torch.float16]


@pytest.mark.parametrize(("precision", "dtype"), HALVES.items())
def test_validation_is_float32_arithmetic_on_the_weights_as_held(build_dpo, trainer, with_val, precision, dtype):
    """Of half precision there is the rounding of the weights alone, of policy and reference."""
    found = []
    for strategy, bits in (("auto", "32-true"), ("zero2", precision)):
        module, datamodule = build_dpo(data=with_val)
        module.configure_model()
        reference = CausalLM.from_pretrained(module.hparams.backbone)
        generator = torch.Generator().manual_seed(5)
        for parameter in module.policy.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        if strategy == "auto":
            for parameter in (*module.policy.parameters(), *reference.parameters()):
                parameter.data = parameter.data.to(dtype).float()
        module.reference.network = reference.eval().requires_grad_(False)
        run = trainer(strategy=strategy, precision=bits)
        found += run.validate(module, datamodule=datamodule, verbose=False)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert found[1] == pytest.approx(found[0], rel=1e-6, abs=2e-5)


def test_floating_point_tensors_of_a_batch_stay_float32(build, trainer, with_val):
    module, datamodule = build(data=with_val, model={"use_margin": True})
    seen: list[PreferenceBatch] = []
    step = module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch) or step(batch, batch_idx)
    trainer(strategy="zero2", precision="16-mixed", max_steps=3, limit_val_batches=0).fit(module, datamodule=datamodule)
    assert {batch.margin.dtype for batch in seen} == {batch.weight.dtype for batch in seen} == {torch.float32}
    assert any((batch.margin != batch.margin.half()).any() for batch in seen), "margins that float16 cannot hold"


class Manual(pl.LightningModule):
    """Several backward passes before each step, as PPO makes them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(
            torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1)), batch_size=2
        )

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        *first, last = batch.unbind(dim=1)
        for part in first:
            if isinstance(self.trainer.strategy, ZeroStrategy):
                with self.trainer.strategy.block_backward_sync():
                    self.manual_backward(self.layer(part).square().mean())
            else:
                self.manual_backward(self.layer(part).square().mean())
        self.manual_backward(self.layer(last).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def test_every_one_of_several_backward_passes_counts(trainer):
    results = []
    for strategy in ("auto", "zero2"):
        module = Manual()
        trainer(strategy=strategy, use_distributed_sampler=False).fit(module)
        results.append(weights(module))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


class Weight(pl.LightningModule):
    """One weight, whose gradients are the numbers that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(8))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.tensor([256.0, *[1.0] * 7]), batch_size=1)

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()


def test_gradients_of_bfloat16_weights_are_added_up_in_float32(trainer):
    """256 + 1 is 256 in bfloat16."""
    module = Weight()
    run = trainer(strategy="zero2", precision="bf16-mixed", accumulate_grad_batches=8, use_distributed_sampler=False)
    run.fit(module)
    (master,) = run.strategy.deepspeed_engine.optimizer.single_partition_of_fp32_groups
    assert master.flatten()[:8].tolist() == [-(256 + 7) / 8] * 8


def test_what_is_offloaded_lies_in_page_locked_memory():
    offloaded = ZeroStrategy(stage=2, offload_optimizer=True).config["zero_optimization"]["offload_optimizer"]
    assert offloaded["pin_memory"] is True


# ---- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [{"lora": {"r": 4}}, {"gradient_checkpointing": True}], ids=["LoRA", "checkpointing"])
def test_a_trial_over_the_longest_rows_leaves_no_gradient_behind(build_dpo, trainer, with_val, model):
    ends = []
    for callbacks in ([], [TrialStep(on_cpu=True)]):
        module, datamodule = build_dpo(data=with_val, model=model)
        run = trainer(strategy="zero2", precision="16-mixed", accumulate_grad_batches=2, callbacks=callbacks)
        run.fit(module, datamodule=datamodule)
        ends.append(weights(module))
    assert torch.equal(*ends)


def test_weights_that_float16_cannot_hold_stop_the_run(build, trainer, with_val):
    module, datamodule = build(data=with_val)
    module.configure_model()
    with torch.no_grad():
        module.network.score[0].weight[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"score\.0\.weight.*not finite under 16-mixed; use bf16-mixed"):
        trainer(strategy="zero2", precision="16-mixed").fit(module, datamodule=datamodule)


def test_a_deepspeed_that_rounds_the_rotary_frequencies_is_refused(build_dpo, trainer, with_val, monkeypatch):
    initialize = DeepSpeedStrategy._initialize_deepspeed_train

    def rounding(self, model):
        initialize(self, model)
        model.half()

    monkeypatch.setattr(DeepSpeedStrategy, "_initialize_deepspeed_train", rounding)
    module, datamodule = build_dpo(data=with_val)
    with pytest.raises(ConfigurationError, match=r"inv_freq.*deepspeed>=0\.19\.2"):
        trainer(strategy="zero2", precision="16-mixed").fit(module, datamodule=datamodule)


def test_steps_that_are_skipped_in_a_row_stop_the_run_with_a_diagnosis(build, trainer, with_val):
    """A loss that float16 gradients cannot follow at any scale is caught before DeepSpeed gives up."""
    module, datamodule = build(data=with_val)
    step = module.training_step

    def infinite_gradient(batch, batch_idx):
        loss = step(batch, batch_idx)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    module.training_step = infinite_gradient
    run = trainer(strategy="zero2", precision="16-mixed", max_epochs=9, callbacks=[StepWatch()], limit_val_batches=0)
    with pytest.raises(TrainingError, match=r"float16 gradients were not finite in the last 15 steps"):
        run.fit(module, datamodule=datamodule)


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("deepspeed", "zero2"),
        ("deepspeed_stage_1", "zero1"),
        ("deepspeed_stage_2", "zero2"),
        ("deepspeed_stage_2_offload", "zero2_offload"),
        ("ddp", "ddp"),
        ("auto", "auto"),
    ],
)
def test_lightning_s_own_names_become_the_corrected_strategy_with_a_line(given, becomes):
    strategy, line = corrected(given)
    assert strategy == becomes
    assert (line is None) == (given == becomes)


@pytest.mark.parametrize("module", [DeepSpeedStrategy.__module__, "lightning.pytorch.strategies"])
def test_lightning_s_own_class_becomes_the_corrected_one(module):
    given = {"class_path": f"{module}.DeepSpeedStrategy", "init_args": {"stage": 1}}
    strategy, line = corrected(given)
    assert strategy == given | {"class_path": "rlhf_lightning.training.zero.ZeroStrategy"}
    assert "ZeroStrategy" in line


@pytest.mark.parametrize("name", ["deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"])
def test_stage_3_is_refused_with_the_reason(name):
    with pytest.raises(ConfigurationError, match=rf"{name} has not been seen to work"):
        corrected(name)


@pytest.mark.parametrize("arguments", [{"stage": 3}, {"stage": 0}, {"zero_optimization": False}])
def test_other_stages_are_refused(arguments):
    with pytest.raises(ConfigurationError, match="ZeRO stage"):
        ZeroStrategy(**arguments)


def test_without_deepspeed_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'rlhf-lightning\[gpu\]'"):
        ZeroStrategy()


# ---- checkpoints --------------------------------------------------------------------------------------------


def saved(build, trainer, data, path, *, precision="16-mixed", **model):
    module, datamodule = build(data=data, model=model)
    run = trainer(strategy="zero2", precision=precision, max_epochs=1)
    run.fit(module, datamodule=datamodule)
    run.save_checkpoint(path)
    return module, run


def test_a_checkpoint_holds_the_optimizer_s_float32_weights_with_tied_ones_tied(build_dpo, trainer, with_val, tmp_path):
    module, _ = saved(build_dpo, trainer, with_val, tmp_path / "a.ckpt")
    restored = restored_module(type(module), tmp_path / "a.ckpt")
    exact = weights(restored)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.half(), weights(module)), "the halves are the rounded float32 weights"
    assert not torch.equal(exact, weights(module).float())
    model = restored.policy.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any("frozen" in name for name in read_checkpoint(tmp_path / "a.ckpt")["state_dict"])


@pytest.mark.parametrize("precision", ["32-true", *HALVES])
def test_a_loaded_checkpoint_gives_the_same_numbers(build_dpo, trainer, with_val, tmp_path, precision):
    _, run = saved(build_dpo, trainer, with_val, tmp_path / "a.ckpt", precision=precision)
    module, datamodule = build_dpo(data=with_val)
    test = trainer(strategy="zero2", precision=precision)
    (metrics,) = test.test(module, datamodule=datamodule, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    before = {
        name.removeprefix("val/"): float(v) for name, v in run.callback_metrics.items() if name.startswith("val/")
    }
    assert {name.removeprefix("test/"): value for name, value in metrics.items()} == before


def test_a_checkpoint_of_adapters_holds_them_alone_and_refuses_others(build_dpo, trainer, with_val, tmp_path):
    lora = {
        "lora": {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.0, "target_modules": ["q_proj"], "modules_to_save": None}
    }
    module, run = saved(build_dpo, trainer, with_val, tmp_path / "a.ckpt", **lora)
    names = set(read_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    assert names == {name for name, p in module.named_parameters() if p.requires_grad}
    same, datamodule = build_dpo(data=with_val, model=lora)
    test = trainer(strategy="zero2", precision="16-mixed")
    (metrics,) = test.test(same, datamodule=datamodule, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert metrics["test/loss"] == float(run.callback_metrics["val/loss"])
    restored = restored_module(type(module), tmp_path / "a.ckpt")
    for name, parameter in restored.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter.half(), module.get_parameter(name))
    other = {"lora": lora["lora"] | {"target_modules": ["v_proj"]}}
    wrong, datamodule = build_dpo(data=with_val, model=other)
    with pytest.raises(ConfigurationError, match=r"other weights than the adapters of model\.lora"):
        trainer(strategy="zero2").test(wrong, datamodule=datamodule, ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_of_a_frozen_backbone_holds_it(build, trainer, with_val, tmp_path):
    module, run = saved(build, trainer, with_val, tmp_path / "a.ckpt", freeze_backbone=True, pooling="layers")
    restored = restored_module(type(module), tmp_path / "a.ckpt")
    for name, parameter in module.network.named_parameters():
        # Of what is not trained there are no float32 copies; the halves are what training saw.
        assert torch.equal(restored.network.get_parameter(name).half(), parameter), name
    same, datamodule = build(data=with_val, model={"freeze_backbone": True, "pooling": "layers"})
    test = trainer(strategy="zero2", precision="16-mixed")
    (metrics,) = test.test(same, datamodule=datamodule, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert metrics["test/loss"] == float(run.callback_metrics["val/loss"])


def test_saving_over_a_checkpoint_leaves_nothing_of_it(build, trainer, with_val, tmp_path):
    _, run = saved(build, trainer, with_val, tmp_path / "a.ckpt")
    stale = tmp_path / "a.ckpt" / "checkpoint" / "zero_pp_rank_7_mp_rank_00_optim_states.pt"
    stale.write_text("of another run")
    assert fault_of(tmp_path / "a.ckpt") == "has 2 of the 1 files of its processes"
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert not stale.exists()
    assert fault_of(tmp_path / "a.ckpt") is None
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


@pytest.mark.parametrize("which", ["model", "process"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_recognised(build, trainer, with_val, tmp_path, which, harm):
    saved(build, trainer, with_val, tmp_path / "a.ckpt")
    model_states, (process,) = shard_files(tmp_path / "a.ckpt")
    file = model_states if which == "model" else process
    content = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    assert fault_of(tmp_path / "a.ckpt") is not None


def test_checkpoints_of_other_kinds_and_other_processes_are_refused(build, trainer, with_val, tmp_path, monkeypatch):
    saved(build, trainer, with_val, tmp_path / "a.ckpt")
    module, datamodule = build(data=with_val)
    plain = trainer()
    plain.fit(module, datamodule=datamodule)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ConfigurationError, match="is no checkpoint of DeepSpeed"):
        trainer(strategy="zero2").test(*build(data=with_val), ckpt_path=tmp_path / "plain.ckpt")
    monkeypatch.setattr(ZeroStrategy, "num_processes", 2)
    with pytest.raises(ConfigurationError, match="is of a run of 1 processes, this one has 2"):
        ZeroStrategy().check_checkpoint(tmp_path / "a.ckpt", fitting=True)


def test_a_checkpoint_that_cannot_be_written_says_so_and_leaves_the_old_one(
    build, trainer, with_val, tmp_path, monkeypatch
):
    _, run = saved(build, trainer, with_val, tmp_path / "a.ckpt")

    def full(*arguments, **named):
        (tmp_path / ".a.ckpt.part").mkdir()
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3")

    monkeypatch.setattr(run.strategy.deepspeed_engine, "save_checkpoint", full)
    with pytest.raises(ConfigurationError, match="could not be written"):
        run.save_checkpoint(tmp_path / "a.ckpt")
    assert fault_of(tmp_path / "a.ckpt") is None
    assert not (tmp_path / ".a.ckpt.part").exists()
