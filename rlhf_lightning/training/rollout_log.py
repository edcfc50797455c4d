"""What is seen of rollouts: the progress bar, loggers, a picture of reward against KL, and samples."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from torch import Tensor

from rlhf_lightning.charts import RolloutPoint, reward_against_kl
from rlhf_lightning.rollouts import Responses
from rlhf_lightning.training.media import log_picture, log_table, taking_media

if TYPE_CHECKING:
    from rlhf_lightning.training.online import OnlineModule

log = logging.getLogger(__name__)

_SAMPLES = 4


class RolloutLog:
    """Shows and logs the rollouts of a module; it keeps the path of the run over KL and reward, for its picture."""

    def __init__(self, module: OnlineModule) -> None:
        self.module = module
        self.path: list[RolloutPoint] = []

    def state(self) -> list[list[float]]:
        """The path, for a checkpoint."""
        return [list(point) for point in self.path]

    def restore(self, state: list[list[float]]) -> None:
        self.path = [RolloutPoint(int(step), sqrt_kl, reward) for step, sqrt_kl, reward in state]

    def show(self, **numbers: Any) -> None:
        """In the progress bar, at once."""
        trainer = self.module.trainer
        trainer.progress_bar_metrics.update(numbers)
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar) and bar.is_enabled:
            bar._update_metrics(trainer, self.module)
        elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            bar.train_progress_bar.set_postfix(bar.get_metrics(trainer, self.module))

    def numbers(self, numbers: dict[str, float]) -> None:
        """Log the means of a rollout and of its updates as `train/NAME`; call once a rollout is learned from."""
        module, trainer = self.module, self.module.trainer
        if module.rollouts_done == 1 and numbers["missing_eos"] == 1:
            chat_format = trainer.datamodule.chat_format
            log.warning(
                "no response of the first rollout ended: the policy may not know its EOS token %r; train it "
                "with SFT first, or raise model.max_new_tokens",
                chat_format.tokenizer.convert_ids_to_tokens(chat_format.eos_id),
            )
        self.path.append(RolloutPoint(trainer.global_step, numbers["sqrt_kl"], numbers["reward"]))
        module.log_values({f"train/{name}": value for name, value in numbers.items() if name != "moved"})
        if loggers := self._loggers():
            log_picture(loggers, "reward_against_sqrt_kl", reward_against_kl(self.path), trainer.global_step)
        if not sys.stderr.isatty():
            mismatch = numbers.get("engine_mismatch")
            log.info(
                "rollout %d (step %d): reward %.4f, less penalty and KL %.4f, KL %.3f, length %.1f%s%s%s",
                *(module.rollouts_done, trainer.global_step, numbers["reward"], numbers["reward_with_kl"]),
                *(numbers["kl"], numbers["response_length"]),
                "".join(f", {words} {numbers[name]:.3f}" for name, words in module.log_line.items()),
                "" if mismatch is None else f", engine mismatch {mismatch:.4f}",
                module.time_left(),
            )

    def samples(self, responses: Responses, scores: Tensor, kl: Tensor) -> None:
        """A few responses with their rewards, as the table `responses`."""
        if not (loggers := self._loggers()):
            return
        chat_format = self.module.trainer.datamodule.chat_format
        rows = []
        for i in range(min(_SAMPLES, len(responses.rows))):
            ids, start = responses.rows[i].tolist(), responses.prompt_lengths[i]
            prompt = chat_format.tokenizer.decode(ids[:start])
            response = chat_format.decode_after(ids[:start], ids[start:])
            response += "" if responses.ended[i] else " [truncated]"
            rows.append((prompt, response, f"{scores[i]:.3f}", f"{kl[i]:.2f}"))
        columns = ("prompt", "response", "reward", "KL")
        log_table(loggers, "responses", columns, rows, self.module.trainer.global_step)

    def _loggers(self) -> list[Logger]:
        """Where pictures and texts go, every `log_every_n_steps` rollouts; nowhere in between."""
        trainer, every = self.module.trainer, self.module.trainer.log_every_n_steps
        if not trainer.is_global_zero or not every or self.module.rollouts_done % every:
            return []
        return taking_media(self.module.loggers)
