"""Reports a run: one console line per log interval, and the same numbers in metrics.jsonl.

Rank 0 reports; under pipeline parallelism the loss lives on the last stage and is sent to it.
training/console.py writes to the terminal, router_report.py formats the routers' numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size

from megatron_smlp.accounting.costs import ModelShape
from megatron_smlp.checkpoints.save_lease import PreviousRun
from megatron_smlp.collectives import from_rank
from megatron_smlp.metrics_records import MetricsFile
from megatron_smlp.routers.collapse import CollapseWatch
from megatron_smlp.systems import SCORING
from megatron_smlp.training.console import RunConsole
from megatron_smlp.training.events import Evaluation, Listener, Outcome, Scores
from megatron_smlp.training.forward import ForwardStep
from megatron_smlp.training.parts import Parts
from megatron_smlp.training.restart_report import Restart, restart
from megatron_smlp.training.router_report import (
    Loads,
    router_curves,
    router_records,
    router_texts,
)
from megatron_smlp.training.slow_hosts import SlowHosts
from megatron_smlp.training.slow_paths import SlowPaths
from megatron_smlp.training.speed import StepClock, device_peak_tflops, duration
from megatron_smlp.training.spent_flops import Compute
from megatron_smlp.training.tensorboard_wandb import Writers, run_curves

PERPLEXITY_LIMIT = 700.0  # exp() of a loss above this overflows


class Reporter(Listener):
    """Prints and records the run.

    Args:
        forward: provides the time spent waiting for data, and the router statistics.
        writers: those of TensorBoard and W&B.
    """

    def __init__(self, args: argparse.Namespace, *, forward: ForwardStep, writers: Writers) -> None:
        self.args, self.forward, self.writers = args, forward, writers
        self.before: PreviousRun | None = None
        self.restart: Restart | None = None
        self.slow_hosts: SlowHosts | None = None
        self.slow_paths = SlowPaths()
        self.collapse = CollapseWatch(fixed=() if args.token_router in SCORING else ("token",))
        self.compute = Compute(ModelShape.from_args(args))
        self.screen = RunConsole(args)
        self.say = self.screen.say
        self.metrics = MetricsFile(args.log_dir if args.rank == 0 else None)
        self.peak_tflops = args.peak_tflops or device_peak_tflops()
        self.clock = StepClock()
        self.began = time.perf_counter()
        """`perf_counter()` when an uninterrupted run would have had its model built."""
        self.is_under_way = False
        """Whether this process has made a step."""
        self.last_saved: int | None = None
        self.tokens_since = 0
        """Tokens of the steps since the last line, summed: a schedule may change the batch size."""

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Report a run from start screen to last line, with a progress bar on a terminal."""
        self.screen.introduce()
        with self.slow_paths.listening(), self.screen.progress():
            yield

    def stopping(self, iteration: int, reason: str) -> None:
        saved = "not saved"
        if self.last_saved == iteration:
            saved = f"saved to {self.args.save}; the same command resumes from there"
        self.say(f"stopped at iteration {iteration} ({reason}): {saved}")

    def built(self, parts: Parts) -> None:
        iteration = self.args.iteration
        logged = self.metrics.newest()
        self.restart = restart(self.before, iteration=iteration, logged=logged)
        if self.args.world_size > 1:
            self.slow_hosts = SlowHosts(
                timedelta(minutes=self.args.distributed_timeout_minutes),
                stage=mpu.get_pipeline_model_parallel_rank(),
                are_alone=self.args.expert_model_parallel_size == 1,
            )
        if self.args.skip_train and logged > iteration:
            self.metrics = MetricsFile(None)  # evaluating an earlier checkpoint drops no records
        last = self.metrics.drop_after(iteration)
        self.compute.resume(getattr(self.args, "unsent_flops", 0.0), tokens=self._tokens())
        if iteration:
            given, load = self.args.explicit_flags.get("load"), self.args.load
            began = "" if given in (None, load) else f" (started from --load {given})"
            self.say(f"resumed from iteration {iteration} of {load}{began}")
        if not self.args.skip_train:
            self.writers.forget_after(iteration)
        self.began = time.perf_counter() - last.get("wall_seconds", 0.0)

    def ready(self) -> None:
        self.clock.restart()

    def evaluated_at(self, iteration: int, titles: list[str]) -> list[str]:
        """Return the titles whose evaluation is in metrics.jsonl; on rank 0, none elsewhere."""
        fields = self.metrics.fields_at(iteration)
        return [title for title in titles if f"{title.replace(' ', '_')}_loss" in fields]

    def stepped(self, outcome: Outcome) -> None:
        self.clock.step()
        self.tokens_since += get_current_running_global_batch_size() * self.args.seq_length
        if not self.is_under_way:
            self._tell_what_came_before()
        iteration = outcome.iteration
        if iteration % self.args.log_interval == 0 or iteration == self.args.train_iters:
            self._log_step(outcome)

    def _tell_what_came_before(self) -> None:
        """Report, after the first step, what a restart cost and what runs without its kernels."""
        self.is_under_way = True
        if self.restart:
            self.metrics.write(self.restart.record())
            self.say(str(self.restart))
        for text in self.slow_paths.of_all_ranks():
            self.say(f"WARNING: {text}")

    def _tell_slow_hosts(self, *, step: float) -> dict[str, list[dict[str, Any]]]:
        if self.slow_hosts is None:
            self.forward.own_part.forget()
            return {}
        slow_ranks = self.slow_hosts.find(self.forward.own_part.pop_seconds(), step=step)
        for slow in slow_ranks:
            self.say(str(slow))
        return {"slow_hosts": [asdict(slow) for slow in slow_ranks]} if slow_ranks else {}

    def _log_step(self, outcome: Outcome) -> None:
        iteration, numbers = outcome.iteration, _numbers(outcome.losses)
        loads = self.forward.statistics.take(training=True)
        self._tell_loads(loads, iteration=iteration)
        flops_per_token = self.compute.add(loads, tokens=self._tokens())
        progress, speed = self._progress(), self._speed(iteration, flops_per_token)
        self.writers.add_all(run_curves(progress | speed), iteration)
        slow = self._tell_slow_hosts(step=speed["seconds_per_iteration"] or 0.0)
        if self.args.rank > 0:  # other ranks may have no learning rate
            return
        loss = numbers.pop("lm loss")
        record = {
            "iteration": iteration,
            "loss": loss,
            "perplexity": perplexity(loss),
            **{name.replace(" ", "_"): value for name, value in numbers.items()},
            "skipped": outcome.skipped,
            "learning_rate": outcome.learning_rate,
            "grad_norm": outcome.grad_norm,
            "loss_scale": outcome.loss_scale,
            **progress,
            **speed,
            **_unless_empty("routers", loads),
            **slow,
        }
        self.metrics.write(record)
        self.say(self._line(record, loads))
        self.screen.advance(iteration, note=f"loss {loss:.4f}")

    def scored(self, scores: Scores, texts: list[str], *, iteration: int, seconds: float) -> None:
        values = {
            f"tasks/{task}/{name}": value
            for task, numbers in scores.items()
            for name, value in numbers.items()
            if value is not None
        }
        self.writers.add_all(values, iteration)
        self.metrics.write(
            {"iteration": iteration, "tasks": scores, **self._progress(), "seconds": seconds}
        )
        self.say(" | ".join([f"iteration {iteration} tasks", *texts, f"{seconds:.1f} s"]))

    def _tell_loads(self, loads: Loads, *, iteration: int, title: str = "") -> None:
        """Write the loads to TensorBoard and W&B, and warn if a router collapses.

        title: title of the evaluation; empty in training.
        """
        self.writers.add_all(router_curves(loads, title=title), iteration)
        for line in self.collapse.warnings(loads, iteration=iteration, title=title):
            self.say(line)

    def _tokens(self) -> int:
        """Return the number of tokens trained on since the run began."""
        samples = self.args.consumed_train_samples - self.args.skipped_train_samples
        return samples * self.args.seq_length

    def _progress(self) -> dict[str, float]:
        """Return the progress of the run in every quantity that may serve as a curve's x axis."""
        return {
            "consumed_samples": self.args.consumed_train_samples,
            "consumed_tokens": self._tokens(),
            **self.compute.spent(self._tokens()),
            "wall_seconds": time.perf_counter() - self.began,
        }

    def _speed(self, iteration: int, flops_per_token: float) -> dict[str, float | None]:
        """Return the speed since the last line (speed.py), and restart its measurement.

        flops_per_token: needed FLOPs, forward and backward, summed over the devices.
        """
        steps, tokens, self.tokens_since = max(1, self.clock.steps), self.tokens_since, 0
        seconds = self.clock.pop_seconds_per_step()
        per_second = tokens / steps / seconds
        tflops = per_second * flops_per_token / 1e12 / self.args.world_size
        return {
            "seconds_per_iteration": seconds,
            "tokens_per_second": per_second,
            "tflops_per_device": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops else None,
            "data_wait_share": self.forward.pop_data_seconds() / steps / seconds,
            "eta_seconds": (self.args.train_iters - iteration) * seconds,
        }

    def _line(self, record: dict[str, Any], loads: Loads) -> str:
        norm, mfu = record["grad_norm"], record["mfu"]
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

    def evaluated(self, evaluation: Evaluation) -> None:
        title, loads = evaluation.title, evaluation.loads
        self._tell_loads(loads, iteration=evaluation.iteration, title=title)
        record = {
            "iteration": evaluation.iteration,
            **_loss_fields(title, _numbers(evaluation.losses)),
            **self._progress(),
            "seconds": evaluation.seconds,
            **_unless_empty(f"{title} routers".replace(" ", "_"), loads),
        }
        self.metrics.write(record)
        self.say(_evaluation_line(record, title, loads))

    def held_up(self, *, seconds: float) -> None:
        self.clock.exclude(seconds)

    # SaveObserver of checkpoints/saving.py

    def found(self, before: PreviousRun) -> None:
        """Note what the last run in this folder left behind."""
        self.before = before

    def saved(self, *, iteration: int, seconds: float) -> None:
        """Note and announce a completed checkpoint."""
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
    """`lm loss` -> validation_loss, `suffix loss` -> validation_suffix_loss; with perplexities.
    With several validation sets: validation_books_loss."""
    fields: dict[str, float] = {}
    for name, loss in losses.items():
        parts = [word for word in name.split() if word not in ("lm", "loss")]
        stem = "_".join([*title.split(), *parts])
        fields |= {f"{stem}_loss": loss, f"{stem}_perplexity": perplexity(loss)}
    return fields


def _numbers(losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the last pipeline stage's numbers on every rank, with keys in the same order."""
    numbers = {name: float(value) for name, value in losses.items()}
    if mpu.get_pipeline_model_parallel_world_size() == 1:
        return numbers
    return from_rank(numbers, torch.distributed.get_world_size() - 1)


def perplexity(loss: float) -> float:
    """Return exp(loss); loss in nats per token."""
    return math.inf if loss >= PERPLEXITY_LIMIT else math.exp(loss)
