"""What the user sees of a run: a start that fits a screen, a line a log interval, metrics.jsonl.

Rank 0 prints; under pipeline parallelism the loss lives on the last stage and is sent to it. What
Megatron itself prints is kept by training/transcript.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_smlp import __version__
from megatron_smlp.accounting import ModelShape, model_cost, training_flops_per_token
from megatron_smlp.errors import NonFiniteLossError
from megatron_smlp.training.checkpoints import write_model_flags
from megatron_smlp.training.plan import summary
from megatron_smlp.training.step import ForwardStep
from megatron_smlp.training.transcript import terminal

# Dense bf16 peaks of one device in TFLOP/s, from the vendor's data sheets (no sparsity).
DENSE_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}

PERPLEXITY_LIMIT = 700.0  # exp() of a loss above this overflows


class Reporter:
    """Prints and records the run; the `Observer` that platform/hooks.py calls.

    Args:
        step: knows whether a loss of the step was not finite, and how long it waited for data.
    """

    def __init__(self, args: argparse.Namespace, *, step: ForwardStep) -> None:
        self.args = args
        self.step = step
        shape = ModelShape.from_args(args)
        self.flops_per_token = training_flops_per_token(model_cost(shape), shape)
        self.first_rank = args.rank == 0
        self.console = Console(file=terminal(), highlight=False, soft_wrap=True)
        self.metrics = MetricsFile(args.log_dir) if self.first_rank else None
        self.peak_tflops = args.peak_tflops or device_peak_tflops()
        self.clock = StepClock()
        self.progress: Progress | None = None
        self.task: Any = None
        self.last_saved: int | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """From the start screen to the last word; on a terminal with a progress bar."""
        self._introduce()
        with contextlib.ExitStack() as stack:
            if self.first_rank and self.console.is_terminal:
                self.progress = stack.enter_context(self._bar())
            try:
                yield
            except SystemExit:  # how Megatron's loop ends on a signal or an exit flag
                self.say(self._farewell())
                raise

    def _introduce(self) -> None:
        args = self.args
        lines = [f"megatron_smlp {__version__} on Megatron-Core {megatron_version}"]
        lines += summary(args, ModelShape.from_args(args))
        if args.platform_changes:
            lines.append("platform    CPU: GPU-only defaults are off (docs/architecture.md)")
        lines.append(f"data        {'mock' if args.mock_data else ' '.join(data_words(args))}")
        lines.append(f"start       {'from ' + args.load if args.load else 'from scratch'}")
        if args.log_dir:
            lines.append(f"logs        {args.log_dir}: metrics.jsonl, megatron.log")
        else:
            lines.append("logs        none are kept: give --log-dir or --save")
        for line in lines:
            self.say(line)

    def _farewell(self) -> str:
        where = f"saved to {self.args.save}" if self.last_saved else "nothing was saved"
        again = "; the same command goes on from there" if self.last_saved else ""
        return f"stopped at iteration {self.args.curr_iteration + 1}: {where}{again}"

    def _bar(self) -> Progress:
        progress = Progress(
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            redirect_stdout=False,  # what Megatron prints is kept in its log, not shown here
            redirect_stderr=False,
        )
        self.task = progress.add_task("train", total=self.args.train_iters or 1, note="starting")
        return progress

    def say(self, text: str) -> None:
        """One line on rank 0's terminal, above the bar where there is one."""
        if self.first_rank:
            self.console.print(text, markup=False)

    # Observer

    def built(self, model: list[Any], optimizer: Any) -> None:
        iteration = self.args.iteration
        if self.metrics:
            self.metrics.drop_after(iteration)
        if iteration:
            self.say(f"resumed from iteration {iteration} of {self.args.load}")
        self.clock.restart()

    def may_update(self) -> bool:
        """All ranks agree whether this step's losses were finite.

        Raises:
            NonFiniteLossError: on every rank, where --nonfinite-loss is stop.
        """
        rank = torch.distributed.get_rank()
        bad = torch.tensor(
            [rank + 1 if self.step.take_nonfinite() else 0], device=torch.cuda.current_device()
        )
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if not bad.item():
            return True
        message = (
            f"non-finite loss on rank {bad.item() - 1} at iteration {self.args.curr_iteration + 1}"
        )
        if self.args.nonfinite_loss == "stop":
            raise NonFiniteLossError(
                f"{message}: stopped before the update (--nonfinite-loss stop). Lower --lr or "
                "--clip-grad, check the data there, or go on without such steps by "
                "--nonfinite-loss skip."
            )
        self.say(f"{message}: this step's update is skipped")
        return False

    def stepped(
        self,
        losses: dict[str, torch.Tensor],
        *,
        iteration: int,
        learning_rate: float | None,
        grad_norm: float | None,
        skipped: bool,
        loss_scale: float,
    ) -> None:
        self.clock.step()
        args = self.args
        if iteration % args.log_interval and iteration != args.train_iters:
            return
        numbers = _to_first_rank(losses)
        if not self.first_rank:
            return
        loss = numbers.pop("lm loss")
        record = {
            "iteration": iteration,
            "loss": loss,
            "perplexity": perplexity(loss),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "skipped": skipped,
            "loss_scale": loss_scale,
            "consumed_samples": args.consumed_train_samples,
            "consumed_tokens": args.consumed_train_samples * args.seq_length,
            **numbers,
            **self._speed(iteration),
        }
        assert self.metrics is not None
        self.metrics.write(record)
        self.say(self._line(record))
        if self.progress is not None:
            self.progress.update(self.task, completed=iteration, note=f"loss {loss:.4f}")

    def _speed(self, iteration: int) -> dict[str, float | None]:
        steps = max(1, self.clock.steps)
        seconds = self.clock.take_seconds_per_step()
        tokens = get_current_global_batch_size() * self.args.seq_length / seconds
        tflops = tokens * self.flops_per_token / 1e12 / self.args.world_size
        return {
            "seconds_per_iteration": seconds,
            "tokens_per_second": tokens,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "data_wait_share": self.step.take_data_seconds() / steps / seconds,
            "eta_seconds": (self.args.train_iters - iteration) * seconds,
        }

    def _line(self, record: dict[str, Any]) -> str:
        norm = record["grad_norm"]
        mfu = record["mfu"]
        words = [
            f"iteration {record['iteration']}/{self.args.train_iters}",
            f"loss {record['loss']:.4f}",
            f"ppl {record['perplexity']:.2f}",
            f"lr {record['learning_rate']:.3g}",
            f"grad norm {norm:.3f}" if norm is not None else "grad norm n/a",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['tflops_per_device']:.3f} TFLOP/s",
            f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a",
            f"ETA {duration(record['eta_seconds'])}",
        ]
        return " | ".join(words + (["skipped"] if record["skipped"] else []))

    def validated(
        self, losses: dict[str, torch.Tensor], *, iteration: int, title: str, seconds: float
    ) -> None:
        self.clock.exclude(seconds)
        numbers = _to_first_rank(losses)
        if not self.first_rank:
            return
        loss = numbers.pop("lm loss")
        assert self.metrics is not None
        self.metrics.write(
            {
                "iteration": iteration,
                f"{title}_loss": loss,
                f"{title}_perplexity": perplexity(loss),
                **{f"{title}_{name}": value for name, value in numbers.items()},
                "seconds": seconds,
            }
        )
        self.say(
            f"iteration {iteration} {title} | loss {loss:.4f} | ppl {perplexity(loss):.2f} | "
            f"{seconds:.1f} s"
        )

    def saved(self, *, iteration: int, seconds: float) -> None:
        self.clock.exclude(seconds)
        self.last_saved = iteration
        if self.first_rank:
            write_model_flags(self.args, iteration)
        self.say(f"iteration {iteration} saved to {self.args.save} | {seconds:.1f} s")


class StepClock:
    """Wall time of training steps alone: what was spent on validating and saving is left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.excluded = 0.0
        self.steps = 0

    def step(self) -> None:
        self.steps += 1

    def exclude(self, seconds: float) -> None:
        self.excluded += seconds

    def take_seconds_per_step(self) -> float:
        """Seconds a step since the last call."""
        seconds = time.perf_counter() - self.start - self.excluded
        steps = max(1, self.steps)
        self.restart()
        return seconds / steps


class MetricsFile:
    """metrics.jsonl: an object a line; a missing folder means that nothing is kept."""

    def __init__(self, folder: str | None) -> None:
        self.path = Path(folder) / "metrics.jsonl" if folder else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def drop_after(self, iteration: int) -> None:
        """Forget what a run wrote after the checkpoint that this run goes on from."""
        if self.path is None or not self.path.exists():
            return
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8").splitlines()
            if _iteration_of(line) <= iteration
        ]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)

    def write(self, record: dict[str, Any]) -> None:
        if self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")


def _iteration_of(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, from a run that was killed while it wrote


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is written as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _to_first_rank(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """The numbers of the last pipeline stage, on every rank; keys have one order everywhere."""
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return {name: float(value) for name, value in losses.items()}
    last = torch.distributed.get_world_size() - 1
    box = [{name: float(value) for name, value in losses.items()}]
    torch.distributed.broadcast_object_list(box, src=last)
    return box[0]


def data_words(args: argparse.Namespace) -> list[str]:
    """The data flags that were given, as they were given."""
    names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    given = [getattr(args, name) for name in names if getattr(args, name)]
    return [str(word) for words in given for word in words] or [str(args.data_args_path)]


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats a token."""
    return math.exp(loss) if loss < PERPLEXITY_LIMIT else math.inf


def duration(seconds: float) -> str:
    """1h02m, 3m20s, 12s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def device_peak_tflops() -> float | None:
    """Dense bf16 peak of this device in TFLOP/s, or None where it is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for key, peak in DENSE_PEAK_TFLOPS.items() if key in name), None)
