"""The training loop: everything a run does, in order, from its first line to its last save.

    build      Megatron's model, optimizer, schedule                parts.py
    resume     the newest intact checkpoint                         checkpoints/
    steps      batch size, forward, backward, update                step.py
               then, when due: report, score tasks, evaluate, save, stop
    finish     the last save, the last evaluation

Every rank runs this in lockstep. Observers are listeners (events.py), called in run.py's order.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)

from megatron_smlp.checkpoints.choosing import choose_checkpoint
from megatron_smlp.checkpoints.folders import is_same_folder
from megatron_smlp.checkpoints.state import read
from megatron_smlp.collectives import from_first_rank, gathered
from megatron_smlp.command_line import flag_of
from megatron_smlp.plugins import register
from megatron_smlp.routers.base import update_prices
from megatron_smlp.routers.hosted import update_rules
from megatron_smlp.routers.topk import hold_biases
from megatron_smlp.signals import StartUp
from megatron_smlp.training.agreement import StepAgreement
from megatron_smlp.training.batches import Batches, build_batches
from megatron_smlp.training.causality import check_causality
from megatron_smlp.training.data import steps_left
from megatron_smlp.training.evaluating import Evaluator
from megatron_smlp.training.events import Listener, Tasks
from megatron_smlp.training.forward import ForwardStep
from megatron_smlp.training.nonfinite import may_update
from megatron_smlp.training.overlaps import ParameterGathering
from megatron_smlp.training.parameter_count import check_parameters
from megatron_smlp.training.parts import Parts, build
from megatron_smlp.training.run import Run
from megatron_smlp.training.step import Step
from megatron_smlp.training.upkeep import Upkeep, is_due


def train(
    args: argparse.Namespace,
    *,
    forward: ForwardStep,
    tasks: Tasks | None = None,
    listeners: Sequence[Listener] = (),
    start_up: StartUp | None = None,
) -> None:
    """Run a training.

    Args:
        forward: computes the loss of a micro-batch.
        tasks: zero-shot tasks to score between steps.
        listeners: notified after our own.
        start_up: ended when the first step begins.
    """
    start_up = start_up or StartUp()
    run = Run(args, forward=forward, listeners=listeners)
    start_up.before_ending = lambda: run.saving.lease.release(failed=False)
    with run.session():
        parts = build(args, began=start_up.began)
        iteration = resume(run, parts)
        check_parameters(args, parts.model, run.reporter.say)
        forward.statistics.attach(parts.model)
        run.listeners.built(parts)
        if tasks:
            tasks.built(parts.model)
        batches = build_batches(args, run.reporter.say, chunks=len(parts.model))
        evaluate = Evaluator(parts, forward=forward, listener=run.listeners)
        loop = None
        if not args.skip_train:
            loop = Loop(run, parts, batches, tasks, evaluate, iteration=iteration)
        if iteration == 0:
            check_causality(parts)
            forward.statistics.take(training=False)  # discard the router statistics of the check
        gathered(None)  # wait until all ranks have their data
        start_up.over()
        run.listeners.ready()
        if loop:
            loop.train()
            iteration = loop.iteration
        if loop and loop.stopped:
            run.listeners.stopping(iteration, loop.stopped)
        elif not evaluate([*batches.valid, *batches.test], iteration):
            run.reporter.say("no time left to evaluate: rerun the same command to do so")
        gathered(None)  # a rank that ended would break the others' connections


def resume(run: Run, parts: Parts) -> int:
    """Claim the folder, load the newest intact checkpoint, and return its iteration. Collective."""
    args = run.args
    run.saving.take_folder()
    folder = choose_checkpoint(args, run.reporter.say)
    args.iteration = read(parts, folder) if folder else 0
    if args.iteration and args.train_samples:
        # Earlier steps may have used another batch size than the remaining ones.
        args.train_iters = args.iteration + steps_left(args)
    return int(args.iteration)


class Loop:
    """The steps of a run and the work between them. Every call is collective."""

    def __init__(
        self,
        run: Run,
        parts: Parts,
        batches: Batches,
        tasks: Tasks | None,
        evaluate: Evaluator,
        *,
        iteration: int,
    ) -> None:
        self.args, self.run, self.parts, self.batches = run.args, run, parts, batches
        self.saving, self.listeners = run.saving, run.listeners
        self.tasks, self.evaluate, self.stopped = tasks, evaluate, ""
        self.iteration = iteration
        """Number of steps done."""
        self.saved_at = iteration if is_same_folder(self.args.load, self.args.save) else None
        titles = [dataset.title for dataset in (*batches.valid, *batches.test)]
        logged = from_first_rank(run.reporter.evaluated_at(iteration, titles))
        self.evaluate.seen = {(title, iteration) for title in logged}
        self.agreement = StepAgreement(
            self.args, pop_nonfinite=run.forward.pop_nonfinite, began=parts.began
        )
        self.step = Step(
            parts,
            forward=run.forward,
            agree=self.agreement.send,
            may_update=partial(may_update, self.args, self.agreement, run.reporter.say),
            updates=[update_prices, update_rules, hold_biases, *register.updates],
        )
        self.gathering = ParameterGathering(parts)
        self.upkeep = Upkeep(parts, self.gathering)

    def train(self) -> None:
        """Run steps until the last one, or until something stops the run early; then save."""
        if self.iteration >= self.args.train_iters:
            name = "train_samples" if self.args.train_samples else "train_iters"
            end = f"{flag_of(name)} {getattr(self.args, name)}"
            self.run.reporter.say(f"nothing is left to train: {end} is reached")
        self.upkeep.begin()
        if 0 < self.iteration == self.saved_at < self.args.train_iters:
            self.evaluate_if_due()  # skipped if logged; the last run may have had no time for it
        while self.iteration < self.args.train_iters and not self.stopped:
            if seconds := self.saving.finish():
                self.listeners.held_up(seconds=seconds)
            self.set_batch_size()
            if self.iteration + 1 in self.args.iterations_to_skip:
                self.skip_data()
                continue
            self.make_step()
            # A resumed run begins with the evaluation that a signal leaves no time for here.
            hurries = self.iteration < self.args.train_iters and self.agreement.read().ends
            saved = hurries and self.save()  # before tasks, which may outlast the notice
            scored, evaluated = self.score_if_due(), not hurries and self.evaluate_if_due()
            self.upkeep.after_step(self.iteration)
            saved = self.save_if_due() or saved
            if scored or evaluated or saved:
                self.agreement.send()  # much time has passed since the step's message
            self.stop_if_due()
        self.gathering.end()
        self.save()
        self.saving.finish(blocking=True)

    def set_batch_size(self) -> None:
        """Set this step's batch size from the schedule; save before it changes."""
        args, before = self.args, get_num_microbatches()
        update_num_microbatches(args.consumed_train_samples, consistency_check=False, verbose=True)
        if get_num_microbatches() != before:
            self.save()
        update_num_microbatches(args.consumed_train_samples, consistency_check=True, verbose=True)

    def make_step(self) -> None:
        """Run one step (forward, backward, update), count it, and notify the listeners."""
        self.args.curr_iteration = self.iteration
        outcome = self.step(self.batches.train, self.iteration + 1)
        if not outcome.skipped:
            self.gathering.begin()
        self.count()
        self.saving.lease.reached(self.iteration)
        self.listeners.stepped(outcome)

    def skip_data(self) -> None:
        """Skip the data of one step (--iterations-to-skip)."""
        self.batches.skip(get_num_microbatches())
        self.args.skipped_train_samples += get_current_running_global_batch_size()
        self.count()

    def count(self) -> None:
        self.iteration += 1
        self.args.consumed_train_samples += get_current_running_global_batch_size()

    def score_if_due(self) -> bool:
        """Score the zero-shot tasks (--eval-tasks) if due; return whether they were."""
        if self.tasks is None or not self.tasks.is_due(self.iteration):
            return False
        start = time.perf_counter()
        scores, texts = self.tasks.scores()
        seconds = time.perf_counter() - start
        self.listeners.held_up(seconds=seconds)
        self.listeners.scored(scores, texts, iteration=self.iteration, seconds=seconds)
        return True

    def evaluate_if_due(self) -> bool:
        """Evaluate every --eval-interval steps, from --start-eval-at-iter on."""
        is_wanted = self.batches.valid and is_due(self.args.eval_interval, self.iteration)
        if not is_wanted or self.iteration < (self.args.start_eval_at_iter or 0):
            return False
        with self.interruption(), self.gathering.whole(), self.upkeep.clean():
            self.evaluate(self.batches.valid, self.iteration)
        return True

    def save_if_due(self) -> bool:
        """Save every --save-interval steps."""
        return is_due(self.args.save_interval, self.iteration) and self.save()

    def save(self) -> bool:
        """Save if there are unsaved steps and a folder for them; return whether it did."""
        if not (self.args.save and self.iteration) or self.saved_at == self.iteration:
            return False
        self.saved_at, self.args.unsent_flops = self.iteration, self.run.reporter.compute.unsent
        with self.interruption():
            self.gathering.gather()
            self.saving.save(self.parts, self.iteration)
        return True

    def stop_if_due(self) -> None:
        """Stop after a signal, at the run's time limit, or at --exit-interval."""
        goes_on = self.iteration < self.args.train_iters
        is_at_interval = goes_on and is_due(self.args.exit_interval, self.iteration)
        self.stopped = self.agreement.read().ends or ("--exit-interval" if is_at_interval else "")

    @contextmanager
    def interruption(self) -> Iterator[None]:
        """Tell the listeners how long work outside the steps took."""
        start = time.perf_counter()
        yield
        self.listeners.held_up(seconds=time.perf_counter() - start)
