"""Whether a run fits: the arithmetic of the copies, the advice, the refusal, and the overlays that promise to fit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from jsonargparse import Namespace
from transformers import LlamaConfig

from rlhf_lightning.commands.main import main
from rlhf_lightning.commands.plan import plan
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.models.causal_lm import Lora
from rlhf_lightning.planning import planning
from rlhf_lightning.planning.memory import CONTEXT, GPUS, Estimator, Run, host_temporary, optimizer_bytes
from rlhf_lightning.planning.planning import Machine, judge, machine_of
from rlhf_lightning.planning.sampling import SamplingShape, SideModel
from rlhf_lightning.planning.simulation import Shape, count_weights
from tests.test_configs import LLAMA, ROOT

LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
WEIGHTS = 8_030_261_248
GPU_OF = {"a100": "A100-80GB", "4xa10": "4xA10", "h200": "H200"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The shape of Llama-3-8B, without weights: all that a plan needs."""
    directory = tmp_path_factory.mktemp("llama")
    LlamaConfig(**LLAMA_3_8B, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    return directory


def run(**settings) -> Run:
    shape = {"policy": True, "rows": 2, "tokens": 64} | settings.pop("shape", {})
    plain = {
        "eval_rows": 2,
        "reference": "none",
        "strategy": "zero2",
        "offload": False,
        "half": True,
        "processes": 1,
        "processes_per_machine": 1,
        "accumulate": 4,
        "rows_per_pair": 2,
        "on_cpu": False,
        "sample_tokens": 0,
        "optimizer_bytes": 8.0,
        "optimizer_temporary": 4.0,
    }
    return Run(shape=Shape(**shape), **plain | settings)


@pytest.fixture(scope="module")
def estimator():
    return Estimator(LlamaConfig(**LLAMA_3_8B | {"num_hidden_layers": 2}))


@pytest.fixture(scope="module")
def weights(estimator):
    return estimator.footprint(run()).weights.total


def without_passes(footprint, phase: str) -> float:
    return footprint.phases[phase] - (footprint.device["evaluation batch"] if phase == "validation" else 0)


@pytest.mark.parametrize(
    ("settings", "resident", "at_the_step"),
    [  # bytes per weight: weights, float32 copies, two moments; with float32 gradients and what the step makes
        ({}, 2 + 4 + 8, 14 + 8),
        ({"processes": 4}, 2 + 12 / 4, 5 + 8 / 4),
        ({"strategy": "zero1", "processes": 4}, 2 + 12 / 4, 5 + 8 / 4),
        ({"offload": True}, 2, 2),
        ({"strategy": "single", "half": False}, 4 + 8, 12 + 4 + 4),
        ({"strategy": "ddp", "half": False, "processes": 2}, 4 + 8, 12 + 4 + 4 + 4),
        ({"reference": "copy"}, 2 + 4 + 8 + 2, 16 + 8),
    ],
    ids=["zero2", "zero2 on 4", "zero1 on 4", "offload", "plain", "ddp", "with a reference"],
)
def test_the_copies_of_the_weights_are_the_arithmetic_of_the_strategy(
    estimator, weights, settings, resident, at_the_step
):
    footprint = estimator.footprint(run(**settings))
    assert without_passes(footprint, "validation") == pytest.approx(resident * weights, rel=1e-6)
    assert footprint.phases["optimizer step"] == pytest.approx(at_the_step * weights, rel=1e-6)


def test_validation_counts_activations_and_a_layer_in_float32(estimator, weights):
    """One layer of Llama-3-8B and the last norm, or the output layer, beside halves; nothing beside float32 weights."""
    half, full = (estimator.footprint(run(strategy="zero2", half=half)) for half in (True, False))
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert half.weights.widened == layer + 4096
    assert half.weights.output_layer == 4096 * 128256
    more = half.device["evaluation batch"] - full.device["evaluation batch"]
    assert 4 * half.weights.widened <= more <= 4 * half.weights.output_layer


def test_gradients_are_divided_by_stage_2_alone(estimator, weights):
    gradients = [
        estimator.footprint(run(strategy=name, processes=4)).device["gradients"] for name in ("zero1", "zero2")
    ]
    assert gradients == [2 * weights, 2 * weights / 4]


@pytest.mark.parametrize("pooling", ["last", "layers"])
def test_a_frozen_backbone_leaves_the_gradients_and_states_of_the_head(estimator, pooling):
    """The head reads the states of one layer, or of the embeddings and both layers; none of them is kept for long."""
    read = 4096 * (3 if pooling == "layers" else 1)
    head = 4096 * read + 4096 + 4096 + 1
    shape = {"policy": False, "head": {"pooling": pooling}, "freeze_backbone": True}
    footprint = estimator.footprint(run(shape=shape, reference="none"))
    assert footprint.weights.trained == head
    assert footprint.device["gradients"] == 2 * head
    assert footprint.device["optimizer states"] == 8 * head
    learning = estimator.footprint(run(shape=shape | {"freeze_backbone": False}, reference="none"))
    assert learning.weights.total == footprint.weights.total == learning.weights.trained
    assert footprint.device["activations"] < learning.device["activations"] / 20


def test_adapters_leave_the_gradients_and_states_of_adapters(estimator, weights):
    footprint = estimator.footprint(run(shape={"lora": Lora(r=8)}, reference="adapter"))
    trained = footprint.weights.trained
    assert trained < weights / 100
    assert footprint.device["optimizer states"] == 8 * trained
    assert footprint.device["gradients"] == 2 * trained
    assert footprint.device["reference model"] == 0
    assert footprint.checkpoint == (2 + 8 + 4) * trained


def test_adapters_on_a_list_of_layers_are_counted(estimator):
    """r (inputs + outputs) each, in two layers; each norm that is trained whole has a weight for each input."""

    def trained(**lora) -> int:
        return estimator.footprint(run(shape={"lora": Lora(r=8, **lora)}, reference="adapter")).weights.trained

    assert trained(target_modules=["q_proj", "v_proj"]) == 2 * 8 * ((4096 + 4096) + (4096 + 1024))
    assert trained(modules_to_save=["norm"]) - trained() == 5 * 4096  # peft takes every name that ends so


def test_the_host_holds_what_is_offloaded_and_what_is_loaded(estimator, weights):
    """Page-locked: two float32 copies and a half; beside them two moments, and what a step on the host makes."""
    on_four = {"offload": True, "processes": 4, "processes_per_machine": 4}
    each, locked = weights / 4, 2 * 2 ** math.ceil(math.log2(weights)) + 2 ** math.ceil(math.log2(weights / 2))
    for settings, expected in (
        ({"accumulate": 1}, 8 * each),
        ({"accumulate": 1, "host_temporary": 8.0}, 16 * each),
        ({"accumulate": 2}, 8 * each + 2 * weights),
    ):
        footprint = estimator.footprint(run(**on_four, **settings))
        assert footprint.host["optimizer, float32 weights and gradients"] == pytest.approx(4 * (locked + expected))
    assert footprint.host["loading, float32"] == 4 * weights * 4


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (lambda params: torch.optim.AdamW(params), 8),
        (lambda params: torch.optim.AdamW(params, fused=True), 0),
        (lambda params: torch.optim.SGD(params, lr=0.1), 0),
    ],
    ids=["AdamW", "fused", "SGD"],
)
def test_what_a_step_on_the_host_makes_besides_is_measured(factory, expected):
    assert host_temporary(factory) == expected


def test_float32_gradients_take_four_bytes_and_nccl_half_a_gigabyte(estimator, weights):
    assert estimator.footprint(run(float32_gradients=True)).device["gradients"] == 4 * weights
    contexts = [{}, {"strategy": "single"}, {"strategy": "ddp", "processes": 2}, {"on_cpu": True}]
    assert [run(**each).context for each in contexts] == [1.5e9, 1e9, 1.5e9, 1e9]


def test_frozen_linear_layers_below_adapters_are_halves_where_their_files_are(estimator):
    adapters = {"shape": {"lora": Lora(r=8), "tokens": 512}, "strategy": "single", "reference": "adapter"}
    half, full = (estimator.footprint(run(**adapters, stored_as_halves=stored)) for stored in (True, False))
    size = 2 * half.weights.quantizable
    assert full.device["weights"] - half.device["weights"] == size
    kept = full.device["activations"] - half.device["activations"]
    assert kept == pytest.approx(size, rel=0.1), "autocast's copies for the backward pass"
    assert half.device["evaluation batch"] > full.device["evaluation batch"], "which is float32"


def test_a_reference_that_runs_beside_the_policy_is_in_the_peak(estimator):
    alone, beside = (estimator.footprint(run(reference=name)) for name in ("none", "copy"))
    copy = beside.device["reference model"]
    assert beside.phases["training batch"] >= alone.phases["training batch"] + copy
    before = estimator.footprint(run(reference="precomputed"))
    assert before.phases["training batch"] == alone.phases["training batch"]
    assert before.phases["reference pass"] > before.phases["validation"] + 0.9 * copy


@pytest.mark.parametrize(
    ("factory", "foreach", "expected"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1), True, (0, 0)),
        (lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), False, (4, 0)),
        (lambda params: torch.optim.AdamW(params), True, (8, 4)),
        (lambda params: torch.optim.AdamW(params), False, (8, 0)),
        (lambda params: torch.optim.AdamW(params, fused=True), True, (8, 0)),
        (lambda params: torch.optim.AdamW(params, amsgrad=True), True, (12, 4)),
    ],
)
def test_an_optimizer_s_bytes_are_measured(factory, foreach, expected):
    assert optimizer_bytes(factory, foreach=foreach) == expected


class EightBits(torch.optim.SGD):
    """Keeps what bitsandbytes' AdamW8bit does: two numbers of 8 bits a weight, their scales, and two tables."""

    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            for number in (1, 2):
                scales = torch.zeros(-(-weight.numel() // 256))
                own = {
                    "state": torch.zeros(weight.shape, dtype=torch.uint8),
                    "absmax": scales,
                    "qmap": torch.zeros(256),
                }
                self.state[weight] |= {f"{name}{number}": value for name, value in own.items()}


EIGHT_BITS = (2 + 2 * 4 / 256, 0.0)


def test_what_an_8_bit_optimizer_keeps_for_each_tensor_is_no_part_of_its_bytes_per_weight():
    assert optimizer_bytes(lambda params: EightBits(params, lr=0.1), foreach=False) == EIGHT_BITS


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"])
def test_bitsandbytes_optimizers_are_counted_as_they_are(name):
    """And over a large weight they take that many bytes, tables and all."""
    optimizers = pytest.importorskip("bitsandbytes").optim
    counted, temporary = optimizer_bytes(getattr(optimizers, name), foreach=True)
    assert (counted, temporary) == ({"PagedAdamW32bit": 8.0, "Lion8bit": EIGHT_BITS[0] / 2}.get(name, EIGHT_BITS[0]), 0)
    weight = torch.nn.Parameter(torch.zeros(2**20))
    optimizer = getattr(optimizers, name)([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    taken = sum(value.nbytes for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert taken / 2**20 == pytest.approx(counted, rel=2e-3)


def test_the_advice_fits_and_none_of_its_changes_can_be_left_out(estimator):
    big = run(shape={"rows": 16, "tokens": 2048}, strategy="single", half=False, reference="copy", accumulate=1)
    limit = estimator.footprint(run(shape={"lora": Lora(), "rows": 2, "tokens": 2048}, reference="adapter")).peak * 1.2
    found = estimator.nearest(big, lambda footprint: footprint.peak <= limit)
    assert found.footprint.peak <= limit < estimator.footprint(big).peak
    assert "model.load_in_4bit" not in found.keys, "mildest first"
    mild = estimator.nearest(big, lambda footprint: footprint.peak < estimator.footprint(big).peak)
    assert mild.keys == {"model.gradient_checkpointing": "true"}
    assert estimator.nearest(big, lambda footprint: False) is None


def test_smaller_batches_keep_the_pairs_of_an_optimizer_step(estimator):
    big = run(shape={"rows": 12, "tokens": 1024, "lora": Lora(), "gradient_checkpointing": True}, accumulate=5)
    small = estimator.footprint(replace(big, shape=replace(big.shape, rows=4))).phases["training batch"]
    found = estimator.nearest(big, lambda footprint: footprint.phases["training batch"] <= small)
    assert found.keys == {"data.batch_size": "2", "trainer.accumulate_grad_batches": "15"}


def trainer_settings(**given) -> Namespace:
    plain = {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    return Namespace(**plain | {"accumulate_grad_batches": 1} | given)


def test_machines_have_names_numbers_and_sizes():
    four = machine_of(trainer_settings(num_nodes=2), gpu="4xA10")
    assert (four.devices, four.machines, four.device_memory) == (4, 2, GPUS["A10"] * 2**30)
    assert machine_of(trainer_settings(devices=3), gpu="48GB").devices == 3
    assert machine_of(trainer_settings(), gpu="48GB").device_memory == 48e9
    two = machine_of(trainer_settings(accelerator="cpu", devices=2))
    assert two.on_cpu
    assert two.device_memory == two.host_memory / 2


def test_a_number_of_gpus_that_the_settings_contradict_is_refused():
    with pytest.raises(ConfigurationError, match=r"trainer.devices is 1; set it to 4"):
        machine_of(trainer_settings(devices=1), gpu="4xA10")


def test_a_max_length_beyond_the_positions_of_the_model_counts_as_those(capsys):
    code, printed = plan_of(capsys, *QUICKSTART, "--data.max_length", "1000000", "--gpu", "A10", "--no_data")
    assert code == 0
    assert "rows of 2048 tokens" in printed


@pytest.mark.parametrize("name", ["A11", "GB", "-3GB", "nanGB", "0xA10", ""])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(name):
    with pytest.raises(ConfigurationError, match="--gpu"):
        machine_of(trainer_settings(), gpu=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_here_must_be_named():
    with pytest.raises(ConfigurationError, match="--gpu"):
        machine_of(trainer_settings(accelerator="gpu"))


def test_what_fits_only_into_the_reserve_is_tight(estimator):
    footprint = estimator.footprint(run())
    needed = footprint.peak + footprint.context

    def verdict(memory: float):
        return judge(footprint, Machine("x", 1, 1, memory, float("inf"), on_cpu=False))

    assert [(v.fits, v.tight) for v in map(verdict, (needed * 1.1, needed * 1.01, needed * 0.99))] == [
        (True, False),
        (True, True),
        (False, False),
    ]


@pytest.mark.parametrize("path", [ROOT / "configs" / "dpo.yaml", *LLAMA], ids=lambda path: path.stem)
def test_a_run_of_llama_fits_with_the_numbers_of_its_header(path, llama, monkeypatch):
    monkeypatch.setattr(Estimator, "other_checkpointing", lambda *_: 0.0)  # seconds for a number of which none is here
    arguments = ["--config", str(ROOT / "configs" / "dpo.yaml"), "--config", str(path), "--model.backbone", str(llama)]
    made = plan(arguments, gpu=GPU_OF.get(path.stem.split("_")[0], "A100-80GB"), read_data=False)
    assert made.verdict.fits
    assert not made.verdict.tight
    peak, host = re.search(r"peak of the device: (\S+) GB +host: (\S+) GB", path.read_text()).groups()
    assert f"{made.footprint.peak / 1e9:.1f}" == peak
    assert f"{made.footprint.host_peak / 1e9:.3g}" == f"{float(host):.3g}"
    assert made.run.accumulate * made.run.processes * made.run.shape.rows // 2 == 64, "pairs of an optimizer step"


@pytest.mark.parametrize("gpu", ["H200", "4xA10"])  # what one H200 does not hold, a smaller one does not
def test_all_weights_of_llama_in_16_mixed_do_not_fit(gpu, llama):
    machine = machine_of(trainer_settings(), gpu=gpu)
    config = LlamaConfig.from_pretrained(llama)
    processes = {"processes": machine.devices, "processes_per_machine": machine.devices}
    footprint = Estimator(config).footprint(run(shape={"gradient_checkpointing": True}, **processes))
    assert footprint.weights.total == WEIGHTS
    assert not judge(footprint, machine).fits


def plan_of(capsys, *arguments) -> tuple[int, str]:
    code = main(["plan", *arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


QUICKSTART = ("--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml"))


def test_the_quickstart_fits_and_its_steps_are_counted(capsys, tmp_path):
    code, printed = plan_of(capsys, *QUICKSTART, "--json", str(tmp_path / "plan.json"))
    assert code == 0
    assert "verdict:     fits" in printed
    assert "600 pairs, 8 a step, 375 optimizer steps" in printed
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["steps"]["steps"] == 375
    assert numbers["footprint"]["weights"]["total"] == 140_801


@pytest.mark.parametrize(
    ("key", "value", "head"),
    [("head", "linear", 64), ("hidden_size", "9", 64 * 9 + 9 + 9 + 1)],
    ids=["linear", "narrow"],
)
def test_the_plan_counts_the_head_that_is_trained(capsys, tmp_path, key, value, head):
    arguments = (*QUICKSTART, f"--model.{key}", value, "--json", str(tmp_path / "plan.json"))
    assert plan_of(capsys, *arguments)[0] == 0
    footprint = json.loads((tmp_path / "plan.json").read_text())["footprint"]
    assert footprint["weights"]["total"] == 140_801 - (64 * 64 + 64 + 64 + 1) + head


def test_the_plan_of_a_frozen_backbone_counts_its_head(capsys):
    """Of 64 times 3 states of width 64, the embeddings' and those of two layers, to 64 and to 1."""
    frozen = ("--model.freeze_backbone", "true", "--model.pooling", "layers")
    code, printed = plan_of(capsys, *QUICKSTART, *frozen)
    assert (code, f"{64 * 3 * 64 + 64 + 64 + 1:,} of them trained" in printed) == (0, True)
    again = plan_of(capsys, *QUICKSTART, *frozen, "--model.gradient_checkpointing", "true")[1]
    without_room = [re.sub(r"[\d.]+ \w?B free", "", text) for text in (printed, again)]  # of the disk: it changes
    assert without_room[0] == without_room[1], "there is nothing to recompute"


def test_a_run_that_does_not_fit_is_told_what_would(capsys, tmp_path):
    shallow = LLAMA_3_8B | {"num_hidden_layers": 3}
    LlamaConfig(**shallow, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    dpo = ("--config", str(ROOT / "configs" / "dpo.yaml"), "--model.backbone", str(tmp_path), "--no_data")
    dpo += ("--model.lora", "null", "--model.reference", "null", "--trainer.strategy", "auto")
    code, printed = plan_of(capsys, *dpo, "--gpu", "24GB")
    assert code == 1
    assert "does not fit" in printed
    assert "it fits with --trainer.strategy zero2_offload" in printed
    code, printed = plan_of(capsys, *dpo, "--gpu", "2GB")
    assert code == 1
    assert "cannot" in printed


def test_data_that_cannot_be_read_is_said_and_rows_count_as_max_length(capsys):
    code, printed = plan_of(capsys, *QUICKSTART, "--data.train", "nowhere.jsonl")
    assert code == 0
    assert "16 rows of 256 tokens (max_length; nowhere.jsonl" in printed
    assert "steps:" not in printed


@pytest.mark.parametrize("arguments", [(), ("--gpu",), (*QUICKSTART, "--gpu", "A11"), (*QUICKSTART, "--nonsense", "1")])
def test_what_plan_cannot_use_is_one_line_and_code_2(capsys, arguments):
    code, printed = plan_of(capsys, *arguments)
    assert code == 2
    assert printed.startswith("rlhf-lightning: error:")
    assert printed.count("\n") == 1


def test_models_and_methods_that_are_not_counted_are_said_in_one_line(capsys, tmp_path):
    from transformers import MixtralConfig

    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 500}
    MixtralConfig(**small, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    sft = ("--config", str(ROOT / "configs" / "sft.yaml"), "--model.backbone", str(tmp_path), "--no_data")
    code, printed = plan_of(capsys, *sft, "--gpu", "A10")
    assert (code, printed.count("\n")) == (2, 1)
    assert "mixtral" in printed


SCORER = SideModel(LlamaConfig(**LLAMA_3_8B | {"num_hidden_layers": 1, "vocab_size": 1000}), {"head": "linear"})
PLAIN = {"strategy": "single", "half": False}


def sampling(**settings) -> SamplingShape:
    return SamplingShape(**{"slots": 0, "scored": 1, "rewards": (), "value": None, "reference": False} | settings)


def test_a_run_that_samples_holds_what_it_samples_and_scores_with(estimator, weights):
    alone = estimator.footprint(run(**PLAIN, sampling=sampling()))
    made = estimator.footprint(
        run(**PLAIN, sampling=sampling(slots=3, rewards=(SCORER, SCORER), value=SCORER, reference=True))
    )
    scorer = count_weights(SCORER.config, Shape(policy=False, rows=1, tokens=64, head=SCORER.head)).total
    held = {
        "reference model": 4 * weights,
        "reward models": 2 * 4 * scorer,
        "value model": 4 * scorer,
        "its gradients and optimizer states": 12 * scorer,
    }
    assert {name: made.device[name] for name in held} == held
    always = alone.device["weights"] + alone.device["optimizer states"] + sum(held.values())
    keys_and_values = 2 * 2 * 8 * 128 * 4 * 3 * 64  # layers, both, heads, their size, float32, slots, tokens
    assert made.phases["responses"] == always + keys_and_values + 3 * 4 * 3 * LLAMA_3_8B["vocab_size"]
    assert made.phases["scoring"] > always
    assert made.phases["optimizer step"] - alone.phases["optimizer step"] == sum(held.values()) + 4 * scorer
    assert made.phases["training batch"] > alone.phases["training batch"] + sum(held.values())


def test_zero_divides_a_value_model_and_an_engine_of_its_own_takes_no_cache(estimator):
    scorer = count_weights(SCORER.config, Shape(policy=False, rows=1, tokens=64, head=SCORER.head)).total
    for processes, offload, expected in ((1, False, 14.0), (4, False, 3.5), (4, True, 0.0)):
        four = {"processes": processes, "processes_per_machine": processes, "offload": offload}
        made = estimator.footprint(run(**four, sampling=sampling(value=SCORER)))
        assert made.device["value model"] == 2 * scorer
        assert made.device["its gradients and optimizer states"] == expected * scorer
        assert made.phases["responses"] == made.phases["validation"] - made.device["evaluation batch"]


def test_the_advice_for_a_run_that_samples_is_in_its_own_keys(estimator):
    both = sampling(slots=64, scored=64, reference=True)
    described = run(**PLAIN, shape={"rows": 8}, eval_rows=64, rows_per_pair=1, sampling=both)
    one = estimator.footprint(run(**PLAIN, shape={"rows": 1, "gradient_checkpointing": True}, eval_rows=1)).device

    def fits(footprint) -> bool:
        batches = all(footprint.device[name] <= one[name] for name in ("activations", "evaluation batch"))
        return batches and not footprint.device["reference model"]

    expected = {"model.micro_batch_size": "1", "model.generation_micro_batch_size": "1", "model.reference": "adapter"}
    found = estimator.nearest(described, fits)
    assert expected.items() <= found.keys.items()
    assert not {"data.batch_size", "data.eval_batch_size"} & found.keys.keys()


@pytest.mark.parametrize(
    ("config", "estimator", "rows", "value"),
    [("ppo", "gae", 4, True), ("ppo", "grpo", 4, False), ("online_dpo", "", 8, False)],
)
def test_the_plan_of_a_run_that_samples_reads_its_models(config, estimator, rows, value, tmp_path):
    LlamaConfig(**LLAMA_3_8B | {"num_hidden_layers": 1}, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    settings = ["--config", str(ROOT / "configs" / f"{config}.yaml"), "--model.backbone", str(tmp_path)]
    settings += ["--model.reward_model", str(tmp_path), "--model.micro_batch_size", "4"]
    settings += [
        "--data.max_prompt_length",
        "40",
        "--model.max_new_tokens",
        "24",
        "--model.generation_micro_batch_size",
        "16",
    ]
    if config == "ppo":
        settings += ["--model.advantage_estimator", estimator, "--model.value_model", "null"]
        settings += ["--model.num_generations", "2"] if estimator == "grpo" else []
    made = plan(settings, gpu="A100-80GB", read_data=False)
    assert (made.run.shape.rows, made.run.shape.tokens, made.run.eval_rows) == (rows, 64, 16)
    assert (made.run.sampling.slots, len(made.run.sampling.rewards)) == (16, 1)
    assert (made.run.sampling.value is not None) == value
    assert made.footprint.device["reward models"] > 0


def test_the_steps_of_a_run_that_samples_are_those_of_its_rollouts():
    settings = ["--config", str(ROOT / "configs" / "ppo.yaml"), "--model.backbone", "builtin:tiny"]
    settings += [
        "--model.reward_model",
        "rlhf_lightning.data.courtesy.rule:brevity",
        "--data.train",
        "builtin:courtesy",
    ]
    settings += ["--data.batch_size", "20", "--model.num_ppo_epochs", "3", "--model.num_mini_batches", "2"]
    made = plan(settings, gpu="A10")
    assert made.steps.kind == "prompts"
    assert (made.steps.pairs, made.steps.per_step) == (107, 20)
    assert made.steps.steps == 6 * 6  # six batches of 20 prompts, the last of 7
    assert not made.footprint.device["reward models"]


def test_fit_refuses_what_cannot_fit_before_loading_it_and_force_runs_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "host_memory", lambda: CONTEXT + 5e6)
    short = ("--trainer.max_steps", "1", "--trainer.limit_val_batches", "1", "--trainer.callbacks", "[]")
    assert main(["fit", *QUICKSTART, *short]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot fit" in line
    assert "--data.batch_size" in line
    assert "--force" in line
    assert not (tmp_path / "runs").exists(), "nothing was written"
    assert main(["fit", *QUICKSTART, *short, "--force"]) == 0
