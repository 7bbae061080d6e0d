"""Environment variables of a launcher, or of a job queue under which somebody runs the tests."""

PREFIXES = ("GROUP_", "ROLE_", "SLURM_", "SMLP_", "SRUN_", "TORCHELASTIC_")
OF_TORCHRUN = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
OF_EXAMPLES = (
    "CONFIG LOCAL_ADDR MAX_RESTARTS NNODES NODE_RANK NPROC_PER_NODE PYTHON RENDEZVOUS RUN_ID "
    "REJOIN_TIMEOUT SHUTDOWN_TIMEOUT SPARES START_TIMEOUT STUDY"
)
NAMES = frozenset([*OF_TORCHRUN.split(), *OF_EXAMPLES.split()])


def is_of_a_launcher(variable: str) -> bool:
    return variable in NAMES or variable.startswith(PREFIXES)
