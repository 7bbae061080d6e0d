"""The reports of a run: a line a log interval on the console, the same numbers in metrics.jsonl.

Rank 0 reports; under pipeline parallelism the loss lives on the last stage and is sent to it. The
terminal is training/console.py, what the routers did is put into words by router_report.py.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.checkpoints.claim import PreviousOwner
from megatron_smlp.checkpoints.folders import tracked_iteration
from megatron_smlp.collectives import from_first_rank, from_rank
from megatron_smlp.data.blending import has_data
from megatron_smlp.megatron_patches import tensorboard
from megatron_smlp.routers.base import other_evaluation, update_prices
from megatron_smlp.routers.collapse import CollapseWatch
from megatron_smlp.systems import SCORING
from megatron_smlp.training.compute import Compute
from megatron_smlp.training.console import RunConsole
from megatron_smlp.training.curves import run_curves, to_writers
from megatron_smlp.training.metrics_file import MetricsFile
from megatron_smlp.training.parameter_count import check_parameters
from megatron_smlp.training.restart_report import Restart, restart, restart_line
from megatron_smlp.training.router_report import (
    Loads,
    router_records,
    router_texts,
    write_scalars,
)
from megatron_smlp.training.slow_hosts import SlowHosts
from megatron_smlp.training.slow_paths import SlowPaths
from megatron_smlp.training.speed import (
    StepClock,
    device_peak_tflops,
    duration,
    speed_fields,
)
from megatron_smlp.training.step import ForwardStep

PERPLEXITY_LIMIT = 700.0  # exp() of a loss above this overflows


class Tasks(Protocol):
    """Zero-shot tasks that are scored during training. Every method is collective."""

    def built(self, model: list[Any], optimizer: Any) -> None: ...

    def is_due(self, iteration: int) -> bool: ...

    def scores(self) -> tuple[dict[str, dict[str, float | None]], list[str]]:
        """Score them all.

        Returns:
            numbers by task for metrics.jsonl, and a text for each task.
        """


class Reporter:
    """Prints and records the run; the `Observer` that megatron_patches/training_loop.py calls.

    Args:
        step: knows whether a loss of the step was not finite, how long it waited for data, and what
            the routers did.
        tasks: to score during training.
        reached: is called with the number of each step that is done.
        begins: is called on every rank when all are ready for the first step.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        step: ForwardStep,
        tasks: Tasks | None = None,
        reached: Callable[[int], None] = lambda iteration: None,
        begins: Callable[[], None] = lambda: None,
    ) -> None:
        self.args = args
        self.reached, self.begins = reached, begins
        self.before: PreviousOwner | None = None
        self.restart: Restart | None = None
        self.slow_hosts: SlowHosts | None = None
        self.slow_paths: SlowPaths | None = SlowPaths()
        """Until they are told, after the first step."""
        self.step = step
        self.tasks = tasks
        self.statistics = step.statistics
        self.collapse = CollapseWatch(fixed=() if args.token_router in SCORING else ("token",))
        self.compute = Compute(ModelShape.from_args(args))
        self.first_rank = args.rank == 0
        self.screen = RunConsole(args)
        self.say = self.screen.say
        self.metrics = MetricsFile(args.log_dir) if self.first_rank else None
        self.peak_tflops = args.peak_tflops or device_peak_tflops()
        self.clock = StepClock()
        self.began = time.perf_counter()
        """`perf_counter()` at which an uninterrupted run would have had its model built."""
        self.last_saved: int | None = None
        self.validated_at: int | None = None
        """Iteration of a validation that an earlier start has logged; Megatron makes it again."""
        self.tokens_since = 0
        """Tokens of the steps since the last line."""
        self.evaluated: dict[str, Loads] = {}
        """Loads of the routers in each pass of the last evaluation."""
        self.is_complete = False
        """Whether the run was at its end when it started."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Report a run, from its start screen to its last line; a terminal has a progress bar."""
        assert self.slow_paths is not None
        self.screen.introduce()
        with self.slow_paths.listening(), self.screen.progress():
            try:
                yield
            except SystemExit:  # how Megatron's loop ends on a signal or an exit flag
                if not self.is_complete:
                    self.say(self._farewell())
                raise

    def _farewell(self) -> str:
        # Megatron saves formats of its own by itself.
        by_megatron = self.args.save if self.args.ckpt_format != "torch_dist" else None
        newest = tracked_iteration(by_megatron) if by_megatron else None
        is_saved = self.last_saved or newest not in (None, self.args.iteration)
        where = f"saved to {self.args.save}" if is_saved else "nothing was saved"
        again = "; the same command goes on from there" if is_saved else ""
        done = getattr(self.args, "curr_iteration", None)  # none before the first step begins
        when = "before the first iteration" if done is None else f"at iteration {done + 1}"
        return f"stopped {when}: {where}{again}"

    # Observer

    def built(self, model: list[Any], optimizer: Any) -> None:
        iteration = self.args.iteration
        self.model = model
        check_parameters(self.args, model, self.say)
        self.statistics.attach(model)
        if self.tasks:
            self.tasks.built(model, optimizer)
        logged, silent = self.metrics.newest() if self.metrics else (0, None)
        self.restart = restart(self.before, iteration=iteration, logged=logged, silent=silent)
        if self.args.world_size > 1:
            self.slow_hosts = SlowHosts(
                timedelta(minutes=self.args.distributed_timeout_minutes),
                stage=mpu.get_pipeline_model_parallel_rank(),
                are_alone=self.args.expert_model_parallel_size == 1,
            )
        last = self.metrics.drop_after(iteration) if self.metrics else {}
        self.compute.resume(last, tokens=self._tokens())
        if iteration:
            given, load = self.args.explicit_flags.get("load"), self.args.load
            began = "" if given in (None, load) else f" (--load {given} was its start)"
            self.say(f"resumed from iteration {iteration} of {load}{began}")
            self._end_if_complete(iteration)
            tensorboard.forget_after(iteration)
        self.began = time.perf_counter() - last.get("wall_seconds", 0.0)

    def ready(self) -> None:
        """Start the clock of the steps, when all ranks have their data too."""
        from_first_rank(None)
        self.begins()
        self.clock.restart()

    def _end_if_complete(self, iteration: int) -> None:
        """End a run that was at its end before, which Megatron would validate on other samples.

        Raises:
            SystemExit: with 0, on every rank.
        """
        wanted, done = self.args.train_samples, self.args.consumed_train_samples
        if wanted and done >= wanted:
            what = f"--train-samples {wanted} are read"
        elif self.args.train_iters and iteration >= self.args.train_iters:
            what = f"--train-iters {self.args.train_iters} is reached"
        else:
            return
        self.say(f"nothing is left to train: {what}")
        if self.args.skip_train:  # which asks for the validation
            return
        if self.metrics and self.metrics.holds("validation_", iteration=iteration):
            self.validated_at = iteration
        if from_first_rank(self._is_evaluated(iteration)):
            self.is_complete = True
            raise SystemExit(0)

    def _is_evaluated(self, iteration: int) -> bool:
        if not self.metrics or not self.args.eval_iters:
            return bool(self.metrics)
        is_tested = self.metrics.holds("test_", iteration=iteration)
        return self.validated_at is not None and (is_tested or not has_data(self.args, "test"))

    def stepped(
        self, losses: dict[str, torch.Tensor], *, iteration: int, skipped: bool, **of_step: Any
    ) -> None:
        if self.args.token_router == "base" and self.args.base_prices == "mean":
            update_prices(self.model, skipped=skipped)
        self.clock.step()
        self.tokens_since += get_current_running_global_batch_size() * self.args.seq_length
        self.reached(iteration)
        self._tell_restart()
        self._tell_slow_paths()
        if iteration % self.args.log_interval == 0 or iteration == self.args.train_iters:
            self._log_step(losses, iteration=iteration, skipped=skipped, **of_step)
        if self.tasks and self.tasks.is_due(iteration):
            self._evaluate(self.tasks, iteration)

    def _tell_restart(self) -> None:
        if self.restart and self.metrics:
            record = self.restart.record()
            self.metrics.write(record)
            self.say(restart_line(record))
        self.restart = None

    def _tell_slow_paths(self) -> None:
        if self.slow_paths:
            for text in self.slow_paths.of_all_ranks():
                self.say(f"WARNING: {text}")
        self.slow_paths = None

    def _tell_slow_hosts(self, *, step: float) -> dict[str, list[dict[str, Any]]]:
        if self.slow_hosts is None:
            self.step.own_part.forget()
            return {}
        found = self.slow_hosts.find(self.step.own_part.pop_seconds(), step=step)
        for slow in found:
            self.say(str(slow))
        return {"slow_hosts": [asdict(slow) for slow in found]} if found else {}

    def _log_step(
        self, losses: dict[str, torch.Tensor], *, iteration: int, **of_step: float | None
    ) -> None:
        numbers = _numbers(losses)
        loads = self.statistics.take(training=True)
        self._tell_loads(loads, iteration=iteration)
        flops_per_token = self.compute.add(loads, tokens=self._tokens())
        progress, speed = self._progress(), self._speed(iteration, flops_per_token)
        to_writers(run_curves(progress | speed), iteration=iteration)
        slow = self._tell_slow_hosts(step=speed["seconds_per_iteration"] or 0.0)
        if not self.first_rank:
            return
        loss = numbers.pop("lm loss")
        record = {
            "iteration": iteration,
            "loss": loss,
            "perplexity": perplexity(loss),
            **{name.replace(" ", "_"): value for name, value in numbers.items()},
            **of_step,
            **progress,
            **speed,
            **_unless_empty("routers", loads),
            **slow,
        }
        assert self.metrics is not None
        self.metrics.write(record)
        self.say(self._line(record, loads))
        self.screen.advance(iteration, note=f"loss {loss:.4f}")

    def _evaluate(self, tasks: Tasks, iteration: int) -> None:
        start = time.perf_counter()
        scores, texts = tasks.scores()
        seconds = time.perf_counter() - start
        self.clock.exclude(seconds)
        values = {
            f"tasks/{task}/{name}": value
            for task, numbers in scores.items()
            for name, value in numbers.items()
            if value is not None
        }
        to_writers(values, iteration=iteration)
        if self.metrics is None:
            return
        self.metrics.write(
            {"iteration": iteration, "tasks": scores, **self._progress(), "seconds": seconds}
        )
        self.say(" | ".join([f"iteration {iteration} tasks", *texts, f"{seconds:.1f} s"]))

    def _tell_loads(self, loads: Loads, *, iteration: int, title: str = "") -> None:
        """Write the loads to TensorBoard, and warn if a router collapses.

        title: of an evaluation; empty in training.
        """
        write_scalars(loads, iteration=iteration, title=title)
        for line in self.collapse.warnings(loads, iteration=iteration, title=title):
            self.say(line)

    def _tokens(self) -> int:
        """Return the tokens of training since the run began."""
        return self.args.consumed_train_samples * self.args.seq_length

    def _progress(self) -> dict[str, float]:
        """Return the progress of the run, in all that a curve may be drawn against."""
        return {
            "consumed_samples": self.args.consumed_train_samples,
            "consumed_tokens": self._tokens(),
            **self.compute.spent(self._tokens()),
            "wall_seconds": time.perf_counter() - self.began,
        }

    def _speed(self, iteration: int, flops_per_token: float) -> dict[str, float | None]:
        tokens, self.tokens_since = self.tokens_since, 0
        return speed_fields(
            self.clock,
            tokens=tokens,
            flops_per_token=flops_per_token,
            devices=self.args.world_size,
            waited=self.step.pop_data_seconds(),
            left=self.args.train_iters - iteration,
            peak=self.peak_tflops,
        )

    def _line(self, record: dict[str, Any], loads: Loads) -> str:
        norm = record["grad_norm"]
        mfu = record["mfu"]
        texts = [
            f"iteration {record['iteration']}/{self.args.train_iters}",
            f"loss {record['loss']:.4f}",
            f"ppl {record['perplexity']:.2f}",
            f"lr {record['learning_rate']:.3g}",
            f"grad norm {norm:.3f}" if norm is not None else "grad norm n/a",
            *router_texts(loads),
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"{record['tflops_per_device']:.3f} TFLOP/s",
            f"MFU {mfu:.1%}" if mfu is not None else "MFU n/a",
            f"ETA {duration(record['eta_seconds'])}",
        ]
        return " | ".join(texts + (["skipped"] if record["skipped"] else []))

    def ways_to_evaluate(self) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
        """Yield the way of --base-eval, and with --base-eval-both the other one as well.
        Collective."""
        yield "", contextlib.nullcontext()
        self.evaluated = {"": self.statistics.take(training=False)}
        if self.args.base_eval_both:
            other = "greedy" if self.args.base_eval == "prices" else "prices"
            yield f"{other} ", other_evaluation(self.model)
            self.evaluated[f" {other}"] = self.statistics.take(training=False)

    def validated(
        self, losses: dict[str, torch.Tensor], *, iteration: int, title: str, seconds: float
    ) -> None:
        self.clock.exclude(seconds)
        numbers = _numbers(losses)
        for way, loads in self.evaluated.items():
            self._tell_loads(loads, iteration=iteration, title=f"{title}{way}")
        is_logged = iteration == self.validated_at and title.startswith("validation")
        if not self.first_rank or is_logged:
            return
        record = {"iteration": iteration, **_loss_fields(title, numbers), **self._progress()}
        record["seconds"] = seconds
        for way, loads in self.evaluated.items():
            record |= _unless_empty(f"{title}{way} routers".replace(" ", "_"), loads)
        assert self.metrics is not None
        self.metrics.write(record)
        for way, loads in self.evaluated.items():
            self.say(_evaluation_line(record, f"{title}{way}", loads))

    def held_up(self, *, seconds: float) -> None:
        self.clock.exclude(seconds)

    # Listener of checkpoints/saving.py

    def found(self, before: PreviousOwner) -> None:
        """Take note of what the last run in this folder left."""
        self.before = before

    def saved(self, *, iteration: int, seconds: float) -> None:
        """Take note of a checkpoint that is complete."""
        self.last_saved = iteration
        self.say(f"iteration {iteration} saved to {self.args.save} | {seconds:.1f} s")


def _evaluation_line(record: dict[str, Any], title: str, loads: Loads) -> str:
    name = title.replace(" ", "_")
    texts = [
        f"iteration {record['iteration']} {title}",
        f"loss {record[f'{name}_loss']:.4f}",
        f"ppl {record[f'{name}_perplexity']:.2f}",
    ]
    if f"{name}_suffix_perplexity" in record:
        texts.append(f"suffix ppl {record[f'{name}_suffix_perplexity']:.2f}")
    return " | ".join([*texts, *router_texts(loads), f"{record['seconds']:.1f} s"])


def _unless_empty(name: str, loads: Loads) -> dict[str, Any]:
    return {name: router_records(loads)} if loads else {}


def _loss_fields(title: str, losses: dict[str, float]) -> dict[str, float]:
    """`lm loss` -> validation_loss, `prices suffix loss` -> validation_prices_suffix_loss; with
    perplexities. Of several validation sets: validation_books_loss."""
    fields: dict[str, float] = {}
    for name, loss in losses.items():
        stem = "_".join(
            [*title.split(), *(word for word in name.split() if word not in ("lm", "loss"))]
        )
        fields |= {f"{stem}_loss": loss, f"{stem}_perplexity": perplexity(loss)}
    return fields


def _numbers(losses: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the last pipeline stage's numbers, on every rank; keys have one order everywhere."""
    numbers = {name: float(value) for name, value in losses.items()}
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return numbers
    return from_rank(numbers, torch.distributed.get_world_size() - 1)


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats a token."""
    return math.exp(loss) if loss < PERPLEXITY_LIMIT else math.inf
