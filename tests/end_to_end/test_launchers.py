"""The launchers of examples/, really started: one node, two "nodes" on this machine, Slurm."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.launches import (
    REPOSITORY,
    TIME_LIMIT,
    Step,
    clean_environment,
    run_command,
    steps,
)
from support.ranks import free_port

EXAMPLES = REPOSITORY / "examples"
CONFIG = "configs/cpu/smlp_deterministic.yaml"
NUM_STEPS = 5
# A small version of the config's model, on data that needs no file.
FLAGS = f"""
    --mock-data --tokenizer-type NullTokenizer --vocab-size 500 --hidden-size 64
    --ffn-hidden-size 128 --moe-ffn-hidden-size 128 --seq-length 32 --micro-batch-size 2
    --global-batch-size 4 --train-iters {NUM_STEPS} --log-interval 1 --eval-iters 1
    --eval-interval 100 --distributed-timeout-minutes 2
"""


def command(launcher: str, folder: Path) -> list[str]:
    return [str(EXAMPLES / launcher), *FLAGS.split(), "--log-dir", str(folder)]


@contextlib.contextmanager
def started(
    commands: Sequence[tuple[Sequence[str], dict[str, str]]],
) -> Iterator[list[subprocess.Popen]]:
    """Start processes that run side by side; none outlives the test."""
    processes = [
        subprocess.Popen(
            flags,
            cwd=REPOSITORY,
            env=clean_environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for flags, variables in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Return the steps of one agent with two processes."""
    folder = tmp_path_factory.mktemp("one_node")
    run_command(command("one_node.sh", folder), CONFIG=CONFIG, NPROC_PER_NODE="2")
    found = steps(folder)
    assert len(found) == NUM_STEPS
    return found


def test_one_node_trains(one_node: list[Step]):
    assert all(0 < step.loss < 10 for step in one_node)


@pytest.mark.slow
def test_two_nodes_train_as_one(one_node: list[Step], tmp_path: Path):
    """Two torchrun agents of one process each find each other through their rendezvous."""
    common = {
        "CONFIG": CONFIG,
        "NPROC_PER_NODE": "1",
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    flags = command("several_nodes.sh", tmp_path)
    with started([(flags, common | {"NODE_RANK": str(rank)}) for rank in range(2)]) as nodes:
        outputs = [node.communicate(timeout=TIME_LIMIT)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-6000:]
    # Only one reports, as one run of both: two separate runs would each have logged all steps.
    assert sorted("iteration 5/5" in output for output in outputs) == [False, True]
    assert steps(tmp_path) == one_node


# Starts the tasks of all "nodes" on this machine, as `srun --ntasks-per-node=1` does on theirs.
FAKE_SRUN = """#!/usr/bin/env bash
echo "srun $*"
while [[ "$1" == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
  while true; do
    wait "$task"
    code=$?
    kill -0 "$task" 2> /dev/null || break
  done
  ((code > highest)) && highest=$code
done
exit $highest
"""
FAKE_SCONTROL = """#!/usr/bin/env bash
case "$*" in
  "show hostnames node[1-2]") printf '127.0.0.1\\nnode2\\n' ;;
  "requeue 4711") touch "$QUEUE/requeued" ;;
  *) exit 1 ;;
esac
"""
# Runs a copy of the script as a batch job, again and again for as long as it is requeued, and sends
# only the script the signal of --signal=B:... when a file asks for it.
FAKE_SBATCH = """#!/usr/bin/env bash
script="$1"
shift
signal="$(sed -n 's/^#SBATCH --signal=B:\\([A-Z0-9]*\\)@.*/\\1/p' "$script")"
grep -q '^#SBATCH --requeue' "$script" || exit 1
cp "$script" "$QUEUE/slurm_script"
export SLURM_JOB_ID=4711 SLURM_NNODES=2 SLURM_JOB_NODELIST='node[1-2]' SLURM_SUBMIT_DIR="$PWD"
export SLURM_RESTART_COUNT=0 SLURM_CPUS_ON_NODE=7
while true; do
  rm -f "$QUEUE/requeued"
  bash "$QUEUE/slurm_script" "$@" &
  job=$!
  while kill -0 "$job" 2> /dev/null; do
    [[ ! -f "$QUEUE/time" ]] || { rm "$QUEUE/time" && kill -"$signal" "$job"; }
    sleep 0.2
  done
  wait "$job"
  code=$?
  [[ -f "$QUEUE/requeued" ]] || exit $code
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
  echo "requeued $SLURM_RESTART_COUNT after $code"
done
"""


def slurm_tools(folder: Path) -> Path:
    """Write stand-ins for Slurm's programs; what they start is real."""
    tools = folder / "bin"
    tools.mkdir()
    texts = {"srun": FAKE_SRUN, "scontrol": FAKE_SCONTROL, "sbatch": FAKE_SBATCH}
    for name, text in texts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tools


# Starts the one task that looks at the checkpoints; for all others does what the test says.
ONE_END = """#!/usr/bin/env bash
echo "$*" >> "$QUEUE/srun"
if [[ "$*" == *--ntasks=1\\ * ]]; then
  while [[ "$1" == --* ]]; do shift; done
  exec "$@"
fi
trap : USR1
if [[ "$DOES" == *warned* ]]; then sleep 1; kill -USR1 $PPID; sleep 0.2; fi
if [[ "$DOES" == *saves* ]]; then
  mkdir "$QUEUE/save/iter_0000010"
  touch "$QUEUE/save/iter_0000010/"{.metadata,metadata.json}
fi
exit "$CODE"
"""


def is_queued_again(folder: Path, code: int, does: str = "", **variables: str) -> bool:
    """Return whether slurm.sh requeues a job whose tasks end so, with a save of iteration 5."""
    tools = slurm_tools(folder)
    (tools / "srun").write_text(ONE_END)
    config = folder / "a.yaml"
    config.write_text(f"save: {folder / 'save'}\n")
    made = folder / "save" / "iter_0000005"
    made.mkdir(parents=True)
    for name in ("metadata.json", ".metadata"):
        (made / name).touch()
    job = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    job |= {"CONFIG": str(config), "QUEUE": str(folder), "PATH": f"{tools}:{os.environ['PATH']}"}
    (folder / "site.sh").write_text("echo loaded cuda/12\n")
    job |= {"CODE": str(code), "DOES": does, "SITE": str(folder / "site.sh")} | variables
    run_command(["bash", EXAMPLES / "slurm.sh"], code=code, **job)
    return (folder / "requeued").exists()


# For each line of goes_on in slurm.sh, one that is requeued and one that is not.
ENDS = [(0, "saves", False), (0, "is warned", True), (93, "saves", False)]
ENDS += [(76, "saves", False), (2, "is warned", False), (2, "is warned, saves", True)]
ENDS += [(75, "", True)]


@pytest.mark.parametrize(("code", "does", "expected"), ENDS)
def test_what_slurm_queues_again(code: int, does: str, expected: bool, tmp_path: Path):
    assert is_queued_again(tmp_path, code, does) == expected


@pytest.mark.parametrize(("does", "expected"), [("", False), ("saves", True)])
def test_slurm_does_not_queue_a_job_for_ever(does: str, expected: bool, tmp_path: Path):
    """Else a node where nothing can start, allocated again and again, would loop forever."""
    assert is_queued_again(tmp_path, 127, does, SLURM_RESTART_COUNT="3") == expected


def test_a_container_looks_at_its_own_checkpoints(tmp_path: Path):
    variables = {"SRUN_FLAGS": "--container-image=a", "SLURM_RESTART_COUNT": "3"}
    assert is_queued_again(tmp_path, 75, "saves", **variables)
    look, job, again = (tmp_path / "srun").read_text().replace("\n--n", "\0--n").split("\0")
    assert look.startswith("--nodes=1 --ntasks=1 --nodelist=127.0.0.1 --container-image=a ")
    assert again == look + "\n"
    assert "--wait=0 --container-image=a bash -c NODE_RANK=" in job  # others may end much later


def many_steps(folder: Path, *flags: str) -> list[str]:
    return [*command("slurm.sh", folder)[1:], "--train-iters", "200", *flags]


def logged(folder: Path) -> int:
    """Count the steps in a file that is being written."""
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count('"loss"') if path.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_slurm_queues_a_job_again_whose_time_is_over(tmp_path: Path):
    """Requeued twice, a run has the losses of one that had all the time."""
    alone = [str(EXAMPLES / "one_node.sh"), *many_steps(tmp_path / "alone")]
    run_command(alone, CONFIG=CONFIG, NPROC_PER_NODE="2")
    log, queue = tmp_path / "log", tmp_path / "queue"
    queue.mkdir()
    argv = ["sbatch", "examples/slurm.sh", *many_steps(log, "--save", str(tmp_path / "save"))]
    output = queue / "output"
    variables = {
        "PATH": f"{slurm_tools(tmp_path)}:{os.environ['PATH']}",
        "CONFIG": CONFIG,
        "NPROC_PER_NODE": "1",
        "MASTER_PORT": str(free_port()),
        "QUEUE": str(queue),
    }
    with output.open("w") as file:
        job = subprocess.Popen(
            argv,
            cwd=REPOSITORY,
            env=clean_environment(**variables),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        for reached in (20, 60):
            while logged(log) < reached:
                assert job.poll() is None, output.read_text()[-6000:]
                time.sleep(0.1)
            (queue / "time").touch()
            while (queue / "time").exists():
                time.sleep(0.1)
        code = job.wait(timeout=TIME_LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
    said = output.read_text()
    assert code == 0, said[-6000:]
    assert [line for line in said.splitlines() if line.startswith("requeued")] == [
        "requeued 1 after 0",
        "requeued 2 after 0",
    ]
    assert steps(log) == steps(tmp_path / "alone")
    assert len(steps(log)) == 200
    # Slurm 22.05 to 23.02 would otherwise bind all processes of a node to one core.
    assert "--cpus-per-task=7 bash" in said


# An interpreter that prints the environment that a launcher gives it.
PRINTS = """#!/usr/bin/env bash
[[ "$1" == -c ]] || env
"""
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")


@pytest.mark.parametrize("launcher", ["one_node.sh", "several_nodes.sh", "study_slurm.sh"])
def test_a_site_file_is_sourced_and_caches_are_the_nodes_own(tmp_path: Path, launcher: str):
    (tmp_path / "python").write_text(PRINTS)
    (tmp_path / "python").chmod(0o755)
    lines = "export NCCL_DEBUG=INFO TRITON_CACHE_DIR=/site\n[[ -z $NOT_SET ]]\nPYTHON=./python\n"
    (tmp_path / "site.sh").write_text(lines)
    (tmp_path / "tmp").mkdir()
    variables = {"SITE": "site.sh", "TMPDIR": str(tmp_path / "tmp"), "CONFIG": "site.sh"}
    environment = clean_environment(**variables, STUDY="site.sh", SLURM_SUBMIT_DIR=str(REPOSITORY))
    for name in CACHES[:2]:
        environment.pop(name, None)
    environment[CACHES[2]] = "/mine"
    done = subprocess.run(
        [str(EXAMPLES / launcher)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert said["NCCL_DEBUG"] == "INFO"
    assert said["SITE"] == str(tmp_path / "site.sh")
    own = tmp_path / "tmp" / f"megatron_smlp-{os.getuid()}"
    assert [said[name] for name in CACHES] == ["/site", str(own / "inductor"), "/mine"]
    assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "2"), ("3,5,7", "3"), ("GPU-8932f937-d72c", "1"), ("", "1")]
)
def test_a_process_for_each_gpu_that_is_visible(tmp_path: Path, visible: str | None, expected: str):
    """There are two GPUs, one of them in MIG slices, unless the variable names some."""
    smi = tmp_path / "nvidia-smi"
    lines = "GPU 0: NVIDIA H100\n  MIG 1g.10gb Device 0: (UUID: x)\nGPU 1: NVIDIA H100\n"
    smi.write_text(f"#!/usr/bin/env bash\nprintf '{lines}'\n")
    smi.chmod(0o755)
    given = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    environment = clean_environment(PATH=f"{tmp_path}:{os.environ['PATH']}", **given)
    if visible is None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    script = f"source {EXAMPLES / 'common.sh'}; default_processes"
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], env=environment, capture_output=True, text=True
    )
    assert found.stdout.strip() == expected, found.stderr


def refused(launcher: str, *flags: str, **variables: str) -> str:
    """Return the one line with which a launcher refuses before it starts anything."""
    done = run_command([EXAMPLES / launcher, *flags], code=2, **variables)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


NODES = {"CONFIG": CONFIG, "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"CONFIG": ""}, "CONFIG is not set: give"),
        ({"SITE": "none.sh"}, "error: SITE=none.sh: no such file"),
        ({"CONFIG": "configs/none.yaml"}, "CONFIG=configs/none.yaml: no such file"),
        ({"PYTHON": "no-such-python"}, "PYTHON=no-such-python: no such program"),
        ({"NODE_RANK": "2"}, "NODE_RANK=2 must be below NNODES=2"),
    ],
)
def test_a_wrong_variable_is_named(changes: dict[str, str], message: str):
    """Those that bash checks, and some of the ones in tests/unit/launching/test_settings.py."""
    assert message in refused("several_nodes.sh", **(NODES | changes))


def test_slurm_outside_of_a_job_or_of_the_project(tmp_path: Path):
    assert "SLURM_JOB_ID is not set" in refused("slurm.sh", CONFIG=CONFIG)
    message = refused("slurm.sh", CONFIG=CONFIG, SLURM_SUBMIT_DIR=str(tmp_path))
    assert "Submit the job from the project's folder" in message
