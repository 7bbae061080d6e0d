"""launching/supervisor.py with agents that exit as the test tells them to."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support.launches import REPOSITORY, clean_environment
from support.ranks import free_port

from megatron_smlp import commands
from megatron_smlp.errors import UsageError
from megatron_smlp.launching import supervisor
from megatron_smlp.launching.exit_codes import CLOSED, MISSING, NO_PROGRESS
from megatron_smlp.launching.failures import Failures
from megatron_smlp.launching.settings import read
from megatron_smlp.launching.supervisor import Supervisor
from megatron_smlp.launching.training_argv import check_counts, given

# Exits with the next code of a list, after writing the checkpoint that goes with it.
AGENT = """
import json, os, signal, sys
from pathlib import Path
folder = Path(__file__).parent
plan = json.loads((folder / "plan.json").read_text())
number = len(list(folder.glob("start*")))
start = {"argv": sys.argv[1:], "cause": os.environ.get("SMLP_RESTART")}
(folder / f"start{number}").write_text(json.dumps(start))
code, iteration = plan[min(number, len(plan) - 1)]
if iteration:
    made = folder / "save" / f"iter_{iteration:07d}"
    made.mkdir(parents=True, exist_ok=True)
    for name in ("metadata.json", ".metadata"):
        (made / name).write_text("{}")
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that supervises agents with these exit codes and newest checkpoints."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 0)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(agent)])

    def supervise(*plan: tuple[int, int], save: bool = True) -> int:
        (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        argv = ["train.py", *(["--save", str(tmp_path / "save")] if save else [])]
        return Supervisor(read({}, several=False), argv).run()

    return supervise


def starts(folder: Path) -> list[dict[str, object]]:
    paths = sorted(folder.glob("start*"), key=lambda path: int(path.name[5:]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_a_run_that_is_over_is_over(run: Callable[..., int], tmp_path: Path):
    assert run((0, 5)) == 0
    (start,) = starts(tmp_path)
    argv = start["argv"]
    assert isinstance(argv, list)
    assert argv[0] == "agent"
    assert "--shutdown-timeout=600" in argv
    assert argv[-2:] == ["--distributed-timeout-minutes", "2"]


def test_a_run_is_handed_its_whole_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plugins too: other commands load them, but here the ranks do."""
    plugin = tmp_path / "own.py"
    plugin.touch()
    flags = ["train.py", "--plugin", str(plugin), "--allow-other-plugin", "--lr", "1"]
    found: list[list[str]] = []
    monkeypatch.setattr(Supervisor, "run", lambda self: found.append(self.argv))
    monkeypatch.setattr(sys, "argv", ["launch.py", "one-node", *flags])
    with pytest.raises(SystemExit, match=r"^0$"):
        commands.launch()
    assert found == [[*flags, "--distributed-timeout-minutes", "2"]]


def test_a_limit_of_waiting_is_the_checkpoints_where_its_flags_are_taken():
    flags = ["train.py", "--use-checkpoint-args"]
    assert Supervisor(read({}, several=False), flags).argv == flags


def test_a_closed_terminal_is_nothing_to_a_run_under_nohup(monkeypatch: pytest.MonkeyPatch):
    """The launcher, torchrun's agent and the ranks, which inherit SIGHUP's handling, ignore it."""
    for handler in (signal.SIG_DFL, signal.SIG_IGN):
        monkeypatch.setattr(signal, "getsignal", lambda number, handler=handler: handler)
        launcher = Supervisor(read({}, several=False), ["train.py"])
        flag = next(word for word in launcher._prepare() if word.startswith("--signals-to-handle="))
        is_heeded = handler == signal.SIG_DFL
        assert (signal.SIGHUP in launcher.signals, "SIGHUP" in flag) == (is_heeded, is_heeded)
        assert signal.SIGTERM in launcher.signals


PLANS = {
    # (Exit code, newest checkpoint) of each agent, whether --save is given -> code, starts.
    **{f"{code} would come again": ([(code, 5), (0, 0)], True, code, 1)
       for code in (2, 3, NO_PROGRESS, MISSING, CLOSED)},
    # Two failures of ranks, which an agent has counted, then its own, which it has not.
    "what an agent has counted": ([(82, 0), (1, 0), (0, 5)], True, NO_PROGRESS, 2),
    "an agent that got on": ([(82, 5), (80, 10), (82, 15), (0, 15)], True, 0, 4),
    "nothing to go on from": ([(1, 0), (0, 0)], False, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize(("plan", "save", "code", "count"), PLANS.values(), ids=PLANS)
def test_what_is_started_again(
    run: Callable[..., int], plan: list, save: bool, code: int, count: int, tmp_path: Path
):
    assert run(*plan, save=save) == code
    assert len(starts(tmp_path)) == count


def test_a_failure_is_started_again_and_told_why(run: Callable[..., int], tmp_path: Path):
    assert run((1, 5), (-signal.SIGKILL, 10), (0, 15)) == 0
    causes = [start["cause"] for start in starts(tmp_path)]
    assert causes[0] is None
    assert "ended with 1" in json.loads(str(causes[1]))["cause"]
    assert "was ended by SIGKILL" in json.loads(str(causes[2]))["cause"]


def test_three_failures_without_a_checkpoint_are_enough(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run((1, 5), (1, 10), (1, 0)) == NO_PROGRESS
    assert len(starts(tmp_path)) == 2 + Failures.LIMIT
    assert "is of iteration 10 after 3 failures: giving up." in capsys.readouterr().err


@pytest.mark.parametrize(("iteration", "expected"), [(5, NO_PROGRESS), (10, 0)])
def test_a_warning_before_anything_new_is_saved_is_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int, expected: int
):
    """After SIGUSR1 a queue starts the same job again: forever, if there is no progress."""
    monkeypatch.setattr(supervisor, "SHARING", 0.1)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def saved(iteration: int) -> None:
        made = tmp_path / "save" / f"iter_{iteration:07d}"
        made.mkdir(parents=True, exist_ok=True)
        for name in ("metadata.json", ".metadata"):
            (made / name).write_text("{}")

    def warned(self: Supervisor, torchrun: Sequence[str]) -> int:
        self._hand_on(signal.SIGUSR1, None)
        saved(iteration)
        return 0

    saved(5)
    monkeypatch.setattr(Supervisor, "_run_agent", warned)
    argv = ["train.py", "--save", str(tmp_path / "save")]
    assert Supervisor(read({}, several=False), argv).run() == expected


def test_a_checkpoint_that_is_older_is_no_progress(monkeypatch: pytest.MonkeyPatch):
    """A start that goes back to one (--ckpt-step, --no-resume) fails again and again."""
    newest = iter([6000, 4000, 4500, 4000])
    monkeypatch.setattr(Failures, "latest", lambda self: next(newest))
    failures = Failures(["--save", "run"])
    assert [(failures.add(), failures.count)[1] for _ in range(3)] == [1, 0, 1]


def test_where_a_run_saves(tmp_path: Path):
    config = tmp_path / "a.yaml"
    config.write_text("save: from/yaml\n", encoding="utf-8")
    assert given("--save", ["--config", str(config)]) == "from/yaml"
    assert given("--save", ["--config", str(config), "--save=x"]) == "x"
    assert given("--save", ["--save", "a", "--save", "b"]) == "b"
    assert given("--save", ["--config", str(config), "--no-save"]) is None
    config.write_text("load: old\nuse_checkpoint_args: true\n", encoding="utf-8")
    for argv in (["--load", "old", "--use-checkpoint-args"], ["--config", str(config)]):
        assert Failures(argv).folder == Path("old")
        assert Failures([*argv, "--finetune"]).folder is None
        assert Failures([*argv, "--no-save"]).folder is None
    assert Failures(["--config", str(config), "--no-use-checkpoint-args"]).folder is None


# For the real agent, torchrun's, with ranks that need no Megatron.
RANK = """
import os, signal, sys, time
from pathlib import Path
folder = Path(__file__).parent
rank, start = os.environ["RANK"], len(list(folder.glob("rank0.*")))
(folder / f"rank{rank}.{os.getpid()}").write_text(os.environ.get("SMLP_RESTART", ""))
what = sys.argv[1]
if what == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("waiting", flush=True)
    time.sleep(300)
if what == "killed-then-wrong":
    if not os.environ.get("SMLP_RESTART"):
        time.sleep(300 if rank == "0" else 0)
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(2)
if what == "wrong-there" and rank == "0":
    sys.exit(2)
if what == "until-told":
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "over").touch(), sys.exit(0)))
while what == "until-told" and not (folder / "over").exists():
    time.sleep(0.1)
if what == "wrong-there":
    sys.exit(1)
if what == "wrong-later":
    time.sleep(4 if rank == "0" else 0)
    sys.exit(2)
if what == "always":
    sys.exit(1)
"""


def launched(folder: Path, what: str, **variables: str) -> subprocess.Popen[str]:
    rank = folder / "rank.py"
    rank.write_text(RANK, encoding="utf-8")
    launch = [sys.executable, str(REPOSITORY / "tools" / "launch.py"), "one-node", str(rank), what]
    return subprocess.Popen(
        [*launch, "--save", str(folder / "save")],
        env=clean_environment(NPROC_PER_NODE="2", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_rank_that_is_killed_is_started_again_and_wrong_use_is_not(tmp_path: Path):
    process = launched(tmp_path, "killed-then-wrong")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    assert "rank 1 on" in output
    assert "was ended by SIGKILL; starting again: the newest checkpoint in" in output
    # What both starts' ranks are told; a rank may be ended before it can write that down.
    texts = {path.read_text(encoding="utf-8") for path in tmp_path.glob("rank*.*[0-9]")}
    assert sorted("was ended by SIGKILL" in text for text in texts) == [False, True]


@pytest.mark.slow
def test_ranks_that_always_fail(tmp_path: Path):
    process = launched(tmp_path, "always")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == NO_PROGRESS, output
    told = {path.read_text(encoding="utf-8") for path in tmp_path.glob("rank*.*[0-9]")}
    assert len(told) == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_whoever_waits_is_told_that_a_run_is_over(tmp_path: Path):
    """One of three machines is a spare. Nobody waits for REJOIN_TIMEOUT, and a later start is not
    blocked by what the server keeps; a store on the first machine goes with it."""
    port = str(free_port())
    launch = [sys.executable, str(REPOSITORY / "tools" / "launch.py")]
    variables = {"RENDEZVOUS": "server", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables |= {"NPROC_PER_NODE": "1", "NNODES": "2", "SPARES": "1", "REJOIN_TIMEOUT": "10000"}
    rank = tmp_path / "rank.py"
    rank.write_text(RANK, encoding="utf-8")

    def started(what: str, machines: int) -> list[subprocess.Popen[bytes]]:
        argv = [*launch, "several-nodes", str(rank), what, "--save", str(tmp_path / "save")]
        with (tmp_path / "said").open("w", encoding="utf-8") as said:
            return [
                subprocess.Popen(
                    argv, env=clean_environment(**variables, NODE_RANK=str(number)), stderr=said
                )
                for number in range(machines)
            ]

    def codes(nodes: list[subprocess.Popen[bytes]]) -> list[int]:
        return sorted(node.wait(timeout=200) for node in nodes)

    server = subprocess.Popen([*launch, "serve", port])
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for what, ends in (("wrong-there", [2, CLOSED]), ("wrong-later", [2, 2])):
            nodes = started(what, 2)
            assert codes(nodes) == ends
        nodes = started("until-told", 3)
        said = tmp_path / "said"
        while "a spare: waiting until another machine" not in said.read_text(encoding="utf-8"):
            assert not any(node.poll() for node in nodes)
            time.sleep(0.1)
        (tmp_path / "over").touch()
        assert codes(nodes) == [0, 0, 0]
        nodes = started("until-told", 2)
        assert codes(nodes) == [0, 0]
        # A machine that is asked to stop asks the others, which do not wait for it at the end.
        (tmp_path / "over").unlink()
        before = len(list(tmp_path.glob("rank*.*[0-9]")))
        nodes = started("until-told", 2)
        while len(list(tmp_path.glob("rank*.*[0-9]"))) < before + 2:
            time.sleep(0.1)
        time.sleep(1)  # until they have set their handlers
        nodes[1].send_signal(signal.SIGTERM)
        assert codes(nodes) == [0, 0]
    finally:
        for process in (*nodes, server):
            process.kill()  # agents end with their launchers, ranks with their agents
            process.wait()


def test_sigterm_lets_the_ranks_end_well(tmp_path: Path):
    process = launched(tmp_path, "wait")
    assert process.stdout is not None
    ready = 0
    while ready < 2:
        ready += process.stdout.readline().count("waiting")  # both may write to one line
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--micro-batch-size 2", "NNODES=2:4 .* --global-batch-size"),
        ("--global-batch-size 256", "with 3 machines, --global-batch-size 256"),
        ("--global-batch-size=192 --pipeline-model-parallel-size 3", "2 machines, --pipeline-mod"),
        ("--global-batch-size 192 --expert-model-parallel-size 16", "3 machines, --expert-model-"),
        ("--step-batch-size-schedule 0:192,64:256", "with 3 machines, --global-batch-size 256"),
        ("--global-batch-size x", "^--global-batch-size x: give a whole number of 1 or more"),
        ("--global-batch-size 192 --tensor-model-parallel-size 0", "^--tensor-model-parallel-.* 0"),
    ],
)
def test_a_number_of_machines_that_could_not_go_on(flags: str, named: str):
    """Otherwise the whole run would end in the middle, when a machine leaves."""
    with pytest.raises(UsageError, match=named):
        check_counts(flags.split(), machines=range(2, 5), processes=8)


def test_numbers_of_machines_that_can_go_on():
    check_counts(["--global-batch-size", "192"], machines=range(2, 5), processes=8)
    check_counts([], machines=range(2, 3), processes=8)
    schedule = ["--step-batch-size-schedule", "0:192,64:384"]
    check_counts(schedule, machines=range(2, 5), processes=8)
    check_counts(["--use-checkpoint-args"], machines=range(2, 5), processes=8)


@pytest.mark.parametrize("port", ["x", "70000"])
def test_the_port_of_a_store_is_a_number(port: str):
    with pytest.raises(UsageError, match=f"serve={port}: give a whole number from 0 to 65535"):
        supervisor.main(["serve", port])
