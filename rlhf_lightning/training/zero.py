"""DeepSpeed's ZeRO stages 1 and 2 through Lightning, so that a step is that of plain data-parallel training.

ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054. What the stock strategy of Lightning 2.6 gets wrong, and is put right
here: gradients divided by the accumulation count twice; optimizer steps that lose step with the trainer's at the end of
an epoch; only the last of several backward passes kept; the floating-point tensors of a batch rounded to halves;
gradients added up in bfloat16; copies through pageable memory of the host; checkpoints that mix with what lay in their
directory before; no CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.terminal import search_no_gpu
from rlhf_lightning.training.checkpoints import check_adapters, is_sharded, part_of, read_checkpoint, remove, writing
from rlhf_lightning.training.module import TrainedModule

STOCK_NAMES = {
    "deepspeed": "zero2",
    "deepspeed_stage_1": "zero1",
    "deepspeed_stage_2": "zero2",
    "deepspeed_stage_2_offload": "zero2_offload",
}
"""Lightning's names of strategies that are corrected here, and what they become."""

REFUSED_NAMES = ("deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme")

_GPU_EXTRA = "DeepSpeed is not installed; pip install 'rlhf-lightning[gpu]', or use trainer.strategy ddp"


class ZeroPrecision(DeepSpeedPrecision):
    """Lightning's, but margins and log-probs of a batch stay float32: -516.77 nats would become -517 in float16."""

    def convert_input(self, data: Any) -> Any:
        return data


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO stage 1 or 2 on CUDA devices, or on CPU processes (gloo) for tests and rehearsals.

    Arguments as `lightning.pytorch.strategies.DeepSpeedStrategy`. Under `16-mixed` and `bf16-mixed` the weights
    themselves are halves, and the optimizer holds a float32 copy of them. Raises `ConfigurationError` for stage 3.
    """

    strategy_name = "zero"

    def __init__(self, **arguments: Any) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigurationError(f"trainer.strategy: {_GPU_EXTRA}")
        search_no_gpu()
        # Pageable memory is copied from and to the device at a quarter of the speed, while the host waits.
        super().__init__(**{"pin_memory": True} | arguments)
        zero = self.config.get("zero_optimization", {})
        if zero.get("stage", 0) not in (1, 2):
            raise ConfigurationError(
                f"trainer.strategy: ZeRO stage {zero.get('stage', 0)} has not been seen to work with this program, and "
                "1 and 2 have; use zero2, and LoRA or zero2_offload where memory is short"
            )
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # for DeepSpeed's own logs of throughput alone
        if "offload_optimizer" in zero:
            # Any optimizer, so that the steps are the same as without; torch's AdamW(fused=True) is quick on a CPU.
            self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0) if self.on_cpu else super().root_device  # DeepSpeed wants an index

    @property
    def precision_plugin(self) -> DeepSpeedPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: DeepSpeedPrecision | None) -> None:
        if plugin is not None and type(plugin) is DeepSpeedPrecision:
            plugin = ZeroPrecision(plugin.precision)
        DeepSpeedStrategy.precision_plugin.fset(self, plugin)

    def _format_config(self) -> None:
        super()._format_config()
        zero = self.config["zero_optimization"]
        # bfloat16 has 8 bits: of many gradients the later ones would be lost beside the sum of the others. Not where
        # they are offloaded, since the sum would be on the device, nor in stage 1, which has another optimizer for it.
        if self.precision_plugin.precision == "bf16-mixed" and zero["stage"] == 2 and "offload_optimizer" not in zero:
            self.config.setdefault("data_types", {"grad_accum_dtype": "fp32"})

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Weights are loaded on the host, in float32: on the device they are halves from the beginning."""
        with self.precision_plugin.tensor_init_context():
            yield

    # ---- CPU processes

    def setup_environment(self) -> None:
        if not self.on_cpu:
            return super().setup_environment()
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())  # also on a machine with a GPU
        return super(DeepSpeedStrategy, self).setup_environment()  # not the check for CUDA

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            return super().setup_distributed()
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from lightning.fabric.utilities.seed import reset_seed

        reset_seed()
        self.set_world_ranks()
        # An operation for inference alone, which would be compiled for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        accelerator = get_accelerator()
        if not accelerator.is_fp16_supported():  # asks for AVX512-FP16; torch does it on any CPU, only slower
            accelerator.is_fp16_supported = lambda: True
        return self._init_deepspeed_distributed()

    # ---- gradient accumulation belongs to Lightning's loop, as for every other strategy

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, gradients are added up; the first backward pass after it ends an accumulation."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.deepspeed_engine.set_gradient_accumulation_boundary(True)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False} | kwargs)

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        self.exclude_frozen_parameters = isinstance(self.lightning_module, TrainedModule) and bool(
            self.lightning_module.lora
        )
        buffers = {name: buffer.dtype for name, buffer in self.lightning_module.named_buffers()}
        super()._initialize_deepspeed_train(model)
        _check_buffers(self.lightning_module, buffers)
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)
        _check_finite(self.lightning_module, str(self.lightning_module.trainer.precision))

    # ---- checkpoints: a directory that is there whole, or not at all

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        target = Path(self.broadcast(str(filepath)))
        with writing(target):
            if self.is_global_zero:
                remove(part_of(target))
            self.barrier()
            super().save_checkpoint(checkpoint, part_of(target), storage_options)
            self.barrier()
            if self.is_global_zero:
                remove(target)
                part_of(target).rename(target)
            self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises `ConfigurationError` as `check_checkpoint`, and for other adapters than the module's."""
        module = self.lightning_module
        self.check_checkpoint(checkpoint_path, fitting=module.trainer.state.fn == TrainerFn.FITTING)
        stored = read_checkpoint(checkpoint_path, weights=False)
        if stored["frozen_param_shapes"] is None:  # adapters alone, but for a second name of tied weights
            parameters = dict(module.named_parameters(remove_duplicate=False))
            frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
            check_adapters(module, stored["state_dict"].keys() - frozen)
            module.strict_loading = False
        return super().load_checkpoint(Path(checkpoint_path), weights_only)

    def check_checkpoint(self, path: str | Path, *, fitting: bool) -> None:
        """Raises `ConfigurationError` for a checkpoint of no DeepSpeed run, or to fit on, of other processes."""
        if not is_sharded(path):
            raise ConfigurationError(
                f"ckpt_path: {path} is no checkpoint of DeepSpeed; use the trainer.strategy of its run, or export it "
                "and give the directory as model.backbone"
            )
        before, now = read_checkpoint(path, weights=False)["dp_world_size"], self.num_processes * self.num_nodes
        if fitting and before != now:
            raise ConfigurationError(
                f"ckpt_path: {path} is of a run of {before} processes, this one has {now}; give as many devices, or "
                "export it and begin a new run with that as model.backbone"
            )


def _check_finite(module: nn.Module, precision: str) -> None:
    """Weights beyond 65,504 are infinite in float16, and training would go on without a word. Raises `ModelError`."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"{name}: a weight is not finite under {precision}; use bf16-mixed or 32-true, or mend the model"
            )


def _check_buffers(module: nn.Module, before: Mapping[str, torch.dtype]) -> None:
    """Rotary frequencies as halves are 1.8 rad off at position 1,024 in bfloat16. Raises `ConfigurationError`."""
    rounded = [name for name, buffer in module.named_buffers() if buffer.dtype != before.get(name, buffer.dtype)]
    if rounded:
        raise ConfigurationError(
            f"trainer.strategy: this DeepSpeed has rounded {rounded[0]} to half precision, which spoils long rows; "
            "pip install 'deepspeed>=0.19.2'"
        )


def register() -> None:
    """Make the strategies known by their names: `zero1`, `zero2`, `zero2_offload`."""
    for name, arguments in {
        "zero1": {"stage": 1},
        "zero2": {"stage": 2},
        "zero2_offload": {"stage": 2, "offload_optimizer": True},
    }.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ZeroStrategy, description=f"DeepSpeed ZeRO, {arguments}", **arguments)


def corrected(given: Any) -> tuple[Any, str | None]:
    """A trainer's `strategy` with Lightning's own DeepSpeed strategies replaced, and what to tell the user of it.

    `given` is a name, a class path with its arguments, or anything else, which stays. Raises `ConfigurationError` for
    stage 3.
    """
    if isinstance(given, str) and given in REFUSED_NAMES:
        raise ConfigurationError(
            f"trainer.strategy: {given} has not been seen to work with this program; use zero2, or zero2_offload"
        )
    if isinstance(given, str) and given in STOCK_NAMES:
        ours = STOCK_NAMES[given]
        return (
            ours,
            f"trainer.strategy: {given} became {ours}, which does not divide gradients by the accumulation twice",
        )
    if isinstance(given, Mapping) and str(given.get("class_path", "")).endswith(".DeepSpeedStrategy"):
        path = f"{ZeroStrategy.__module__}.{ZeroStrategy.__name__}"
        line = "trainer.strategy: DeepSpeedStrategy became ZeroStrategy, which does not divide gradients twice"
        return type(given)(**dict(given) | {"class_path": path}), line
    return given, None
