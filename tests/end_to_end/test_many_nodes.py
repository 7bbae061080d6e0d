"""Several machines, in network namespaces: every failure ends in a resumed run or a one-line error.

Prints figures (`-s` shows them): steps lost, seconds to the next step, exit codes. The losses of
a disturbed run equal those of an undisturbed one bit for bit.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.launches import REPOSITORY, Step, run_command, steps
from support.nodes import Job, Network, missing, network

from megatron_smlp.launching.rendezvous import SILENCE

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

FLAGS = """
    --mock-data --tokenizer-type NullTokenizer --vocab-size 100 --architecture gmlp --num-layers 2
    --hidden-size 8 --ffn-hidden-size 16 --seq-length 16 --micro-batch-size 1 --global-batch-size 2
    --log-interval 1 --save-interval 5 --lr 1e-3 --lr-warmup-iters 10 --lr-decay-iters 2000
    --attention-dropout 0 --hidden-dropout 0 --eval-iters 1 --eval-interval 100000 --num-workers 0
    --keep-last 3
"""
INTERVAL = 5
BOUND = 60  # seconds of --distributed-timeout-minutes 1
REJOIN = 60  # seconds of REJOIN_TIMEOUT, where it should expire
SLACK = 120  # seconds for signalled ranks and an agent's start, on a busy machine
PATIENCE = 300.0  # seconds for what takes one start, on a machine with other work


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    config = tmp_path / "config.yaml"
    config.write_text("seed: 1234\n", encoding="utf-8")
    return {"CONFIG": str(config), "NNODES": "2", "REJOIN_TIMEOUT": "240"}


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Network]:
    with network(2, tmp_path) as net:
        yield net


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Network]:
    with network(3, tmp_path) as net:
        yield net


def undisturbed(folder: Path, iterations: int) -> list[Step]:
    """Return the steps of two processes on one machine."""
    argv = [str(REPOSITORY / "examples" / "one_node.sh"), *FLAGS.split()]
    argv += ["--train-iters", str(iterations), "--log-dir", str(folder / "alone")]
    run_command(argv, CONFIG=str(folder / "config.yaml"), NPROC_PER_NODE="2")
    return steps(folder / "alone")


class Failures:
    """Disturbs a job, one failure after another, and prints the figures of each."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.restarts = 0

    def survives(self, name: str, disturb: Callable[[], None], *, restarts: bool = True) -> None:
        """Disturb it some steps later; it must go on, from a checkpoint or without one."""
        job, lost = self.job, 0.0
        job.wait_for_iteration(job.iteration() + INTERVAL + 2, seconds=PATIENCE)
        began, at = time.monotonic(), job.iteration()
        disturb()
        if restarts:
            self.restarts += 1
            job.wait_until(lambda: len(self.told()) == self.restarts, seconds=PATIENCE)
            lost = self.told()[-1]["lost_steps"]
            assert lost <= INTERVAL
        else:
            job.wait_for_iteration(at + 1, seconds=PATIENCE)
        seconds = time.monotonic() - began
        print(f"{name}: {lost:.0f} steps lost, {seconds:.0f} s to the next step", flush=True)

    def told(self) -> list[dict[str, float]]:
        """Return the restarts in metrics.jsonl."""
        return [r["restart"] for r in self.job.records() if "restart" in r]


def kill_one(processes: list[int]) -> None:
    os.kill(processes[0], signal.SIGKILL)


def frozen(net: Network, node: int, seconds: float) -> None:
    net.signal(node, signal.SIGSTOP)
    time.sleep(seconds)
    net.signal(node, signal.SIGCONT)


def unplugged(net: Network, node: int, seconds: float) -> None:
    net.cut(node)
    time.sleep(seconds)
    net.mend(node)


def rebooted(job: Job, *nodes: int, seconds: float = 3.0) -> None:
    for node in nodes:
        job.net.crash(node)
    time.sleep(seconds)
    for node in nodes:
        job.net.mend(node)
    job.start(*nodes)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_run_survives_all_of_this(two: Network, variables: dict[str, str], tmp_path: Path):
    """One run of 400 steps in which each failure happens once."""
    job = Job(two, f"{FLAGS} --train-iters 400", **variables)
    job.start(0, 1)
    run = Failures(job)
    run.survives("node frozen 30 s", lambda: frozen(two, 1, 30), restarts=False)
    run.survives("link cut 20 s", lambda: unplugged(two, 1, 20), restarts=False)

    def flapping() -> None:
        for _ in range(5):
            unplugged(two, 1, 1)
            time.sleep(1)

    run.survives("link down and up five times", flapping, restarts=False)
    run.survives("rank killed", lambda: kill_one(job.ranks(1)))
    run.survives("agent killed", lambda: kill_one(job.agents(1)))
    run.survives("node killed and started again", lambda: rebooted(job, 1))
    run.survives("rendezvous host killed and started again", lambda: rebooted(job, 0))
    run.survives("both nodes killed and started again", lambda: rebooted(job, 0, 1))
    assert job.codes(0, 1) == [0, 0], job.ends_of_logs()
    assert steps(job.save) == undisturbed(tmp_path, 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_never_answers_again_ends_at_the_timeout(
    three: Network, variables: dict[str, str], tmp_path: Path
):
    """A link stays cut, with a spare available: the run goes on without that node, whose late ranks
    save nothing. A second failure would end it: nobody is left to take over."""
    flags = f"{FLAGS} --train-iters 300 --distributed-timeout-minutes 1"
    job = Job(three, flags, **variables, SPARES="1", MAX_RESTARTS="2")
    job.start(0, 1, 2)
    job.wait_for_iteration(1, seconds=PATIENCE)
    member = next(node for node in (1, 2) if job.ranks(node))
    run = Failures(job)
    run.survives("link cut for ever, a spare takes over", lambda: three.cut(member))
    spare = 3 - member
    assert job.ranks(spare)
    for node in (0, spare):
        job.launchers[node].send_signal(signal.SIGTERM)
    assert job.codes(0, spare) == [0, 0], job.ends_of_logs()
    done = len(steps(job.save))
    assert steps(job.save) == undisturbed(tmp_path, 300)[:done]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", ["frozen", "cut off"])
def test_a_machine_that_is_gone_for_ever_ends_a_job_without_a_spare(
    kind: str, two: Network, variables: dict[str, str], tmp_path: Path
):
    """Both exit with 75 within the bounds of docs/resilience.md, and leave nothing behind; the same
    command resumes once the machine works again."""
    variables |= {"REJOIN_TIMEOUT": str(REJOIN)}
    job = Job(two, f"{FLAGS} --train-iters 300 --distributed-timeout-minutes 1", **variables)
    job.start(0, 1)
    job.wait_for_iteration(INTERVAL + 2, seconds=PATIENCE)
    began = time.monotonic()
    if kind == "frozen":
        two.signal(1, signal.SIGSTOP)
    else:
        two.cut(1)
    assert job.codes(0, seconds=BOUND + REJOIN + SLACK) == [75], job.ends_of_logs()
    print(f"{kind} for ever: the other ends with 75 after {time.monotonic() - began:.0f} s")
    assert not two.processes(0)
    last = job.log(0).splitlines()[-1]
    assert last.startswith("launch: node0: the other machines did not join within REJOIN_TIMEOUT")
    assert two.address(0) in last
    two.signal(1, signal.SIGCONT)
    assert job.codes(1, seconds=BOUND + SILENCE + REJOIN + SLACK) == [75], job.ends_of_logs()
    print(f"{kind} for ever: itself ends with 75 after {time.monotonic() - began:.0f} s")
    assert not two.processes(1)
    assert "has not answered within REJOIN_TIMEOUT" in job.log(1).splitlines()[-1]
    two.mend(1)
    job.start(0, 1)
    assert job.codes(0, 1) == [0, 0], job.ends_of_logs()
    assert steps(job.save) == undisturbed(tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_that_is_full_on_one_machine(
    two: Network, variables: dict[str, str], tmp_path: Path
):
    """One machine's writes into --save find no room, while the other's do; the machine is named,
    and once there is room again the run goes on."""
    job = Job(two, f"{FLAGS} --train-iters 200", **variables)
    job.start(0, 1)
    job.wait_for_iteration(INTERVAL + 2, seconds=PATIENCE)
    full = tmp_path / "full"
    full.mkdir()
    two.mount(1, "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(full))
    layers = f"lowerdir={job.save},upperdir={full}/upper,workdir={full}/work"
    two.mount(1, "mkdir", f"{full}/upper", f"{full}/work")
    two.mount(1, "mount", "-t", "overlay", "-o", layers, "overlay", str(job.save))
    job.wait_until(lambda: "No space left on device" in job.log(0), seconds=PATIENCE)
    two.mount(1, "umount", "--lazy", str(job.save))
    assert job.codes(0, 1) == [0, 0], job.ends_of_logs()
    told = next(line for line in job.log(0).splitlines() if "No space left on device" in line)
    print(f"a disk full on one machine: {told}")
    assert "could not be saved to" in told
    assert str(job.save) in told
    assert "node1" in told
    assert steps(job.save) == undisturbed(tmp_path, 200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_number_of_machines_that_varies(two: Network, variables: dict[str, str], tmp_path: Path):
    """One starts alone, takes in a second when it comes, and goes on after it has gone."""
    flags = f"{FLAGS} --train-iters 100000 --distributed-timeout-minutes 1"
    job = Job(two, flags, **(variables | {"NNODES": "1:2"}))
    job.start(0)
    run = Failures(job)

    def comes() -> None:
        job.start(1)

    run.survives("a second machine comes", comes)
    assert job.ranks(1)
    assert run.told()[-1]["lost_steps"] == 0
    run.survives("the second machine goes", lambda: two.crash(1))
    job.wait_for_iteration(job.iteration() + INTERVAL, seconds=PATIENCE)
    job.launchers[0].send_signal(signal.SIGTERM)
    assert job.codes(0) == [0], job.ends_of_logs()
    found = [step.loss for step in steps(job.save)]
    assert found == pytest.approx(
        [step.loss for step in undisturbed(tmp_path, len(found))], rel=1e-3
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["file", "server"])
def test_no_machine_is_needed_for_the_rendezvous(
    kind: str, three: Network, variables: dict[str, str], tmp_path: Path
):
    """Node 0 dies and is restarted: the agent of node 1 survives it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    variables |= {"RENDEZVOUS": f"file:{shared}" if kind == "file" else "server"}
    variables["MASTER_ADDR"] = three.address(2)
    python = str(REPOSITORY / ".venv" / "bin" / "python")
    serve = [python, str(REPOSITORY / "tools" / "launch.py"), "serve", "29500"]
    if kind == "server":
        three.start(2, serve)
    job = Job(three, f"{FLAGS} --train-iters 100", **variables)
    job.start(0, 1)
    job.wait_for_iteration(1, seconds=PATIENCE)
    agents = job.agents(1)
    Failures(job).survives(f"{kind}: node killed and started again", lambda: rebooted(job, 0))
    assert job.agents(1) == agents
    assert job.codes(0, 1) == [0, 0], job.ends_of_logs()
    assert steps(job.save) == undisturbed(tmp_path, 100)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slow_link_is_named(two: Network, variables: dict[str, str]):
    two.slow(1, "2mbit")
    job = Job(two, f"{FLAGS} --train-iters 100000", **variables)
    job.start(0, 1)
    job.wait_until(
        lambda: any("slow_hosts" in record for record in job.records()), seconds=PATIENCE
    )
    slow = next(record for record in job.records() if "slow_hosts" in record)["slow_hosts"]
    assert {found["host"] for found in slow if found["what"] == "sends slowly"} == {"node1"}
    job.launchers[0].send_signal(signal.SIGTERM)
    assert job.codes(0, 1) == [0, 0], job.ends_of_logs()
    saved = int((job.save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
    print(f"SIGTERM on node 0: iteration {saved} of {job.iteration()} saved, exit codes 0 and 0")
    assert saved == job.iteration()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_sigterm_is_served_at_every_moment(two: Network, variables: dict[str, str]):
    """While it starts, evaluates, saves, reads with workers: the last step is saved, exit 0."""
    flags = f"{FLAGS} --train-iters 100000 --num-workers 2 --eval-interval 20 --eval-iters 200"
    job = Job(two, flags, **variables)
    job.start(0, 1)
    job.wait_until(lambda: bool(job.ranks(0) and job.ranks(1)), seconds=PATIENCE)
    time.sleep(2)
    ends(job)
    assert job.iteration() == 0
    moments = {
        "an evaluation": lambda: job.iteration() % 20 == 0,
        "a save": lambda: bool(list(job.save.glob(".iter_*.partial-*"))),
    }
    for name, has_come in moments.items():
        job.start(0, 1)
        before = job.iteration()
        job.wait_until(lambda: job.iteration() > before and has_come(), seconds=PATIENCE)  # noqa: B023
        ends(job)
        saved = int((job.save / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
        print(f"SIGTERM during {name}: iteration {saved} of {job.iteration()} saved")
        assert saved == job.iteration() > before


def ends(job: Job) -> None:
    for node in (0, 1):
        job.launchers[node].send_signal(signal.SIGTERM)
    assert job.codes(0, 1) == [0, 0], job.ends_of_logs()
    assert not job.net.processes(0) + job.net.processes(1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_old_node_that_returns_is_refused_its_save(
    two: Network, variables: dict[str, str], tmp_path: Path
):
    """A run is frozen; another resumes from its folder; then the first wakes up."""
    variables |= {"NNODES": "1"}
    one = FLAGS.replace("--global-batch-size 2", "--global-batch-size 1")
    flags = f"{one} --train-iters 100000"  # it is still at work when the old one has started again
    old = Job(two, flags, **variables)
    old.start(0)
    old.wait_for_iteration(INTERVAL + 2, seconds=PATIENCE)
    two.signal(0, signal.SIGSTOP)
    new = Job(two, flags, **variables, MASTER_ADDR=two.address(1))
    new.start(1, NODE_RANK="0")
    reached = new.iteration()
    new.wait_for_iteration(reached + 2 * INTERVAL, seconds=PATIENCE)
    two.signal(0, signal.SIGCONT)
    (code,) = old.codes(0, seconds=PATIENCE)
    assert code == 2, old.log(0)[-3000:]
    assert "was taken over by attempt 2 (process" in old.log(0)
    assert "is being written by process" in old.log(0)  # its next start
    new.launchers[1].send_signal(signal.SIGTERM)
    assert new.codes(1) == [0]
    logged = [record["iteration"] for record in new.records() if "loss" in record]
    assert logged == list(range(1, len(logged) + 1))
    print(f"an old run that came back ended with {code}; {len(logged)} steps, none twice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": "10.9.9.9"}, "MASTER_ADDR=10.9.9.9 cannot be reached from this machine"),
        ({}, "has not answered 10.77."),
        ({"RENDEZVOUS": "file:OWN"}, "1 of 2 machines joined (node1-10.77."),
    ],
)
def test_bad_input_in_one_line(
    two: Network, variables: dict[str, str], tmp_path: Path, changes: dict[str, str], message: str
):
    """Node 1 reports it while node 0 is absent; the longest case takes START_TIMEOUT."""
    own = tmp_path / "own"
    own.mkdir()
    changes = {name: text.replace("OWN", str(own)) for name, text in changes.items()}
    job = Job(two, FLAGS, **(variables | {"START_TIMEOUT": "1"} | changes))
    job.start(1)
    assert job.codes(1, seconds=60) == [2], job.log(1)
    assert len(job.log(1).splitlines()) == 1
    assert message in job.log(1)
