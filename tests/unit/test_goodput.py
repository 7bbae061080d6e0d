"""accounting/goodput.py against a simulation, and what the tool prints."""

import json
import math
import random
from pathlib import Path

import pytest

from megatron_smlp.accounting.goodput import best_interval, goodput, main
from megatron_smlp.errors import UsageError


def simulated(interval: float, *, save: float, restart: float, mtbf: float, saves: int) -> float:
    """Draw failures, and repeat what they cost: restarts may fail too."""
    draw, clock = random.Random(7), 0.0
    for _ in range(saves):
        needed = interval + save
        while (left := draw.expovariate(1 / mtbf)) < needed:
            clock += left
            while (again := draw.expovariate(1 / mtbf)) < restart:
                clock += again
            clock += restart
        clock += needed
    return saves * interval / clock


@pytest.mark.parametrize(
    ("interval", "save", "restart", "mtbf"),
    [(100.0, 5.0, 30.0, 1000.0), (900.0, 50.0, 300.0, 1000.0), (10.0, 1.0, 60.0, 100.0)],
)
def test_the_formula_is_what_happens(interval: float, save: float, restart: float, mtbf: float):
    ours = goodput(interval, save=save, restart=restart, mtbf=mtbf)
    drawn = simulated(interval, save=save, restart=restart, mtbf=mtbf, saves=60_000)
    assert ours == pytest.approx(drawn, rel=0.02)


def test_the_best_interval_is_nearly_the_best():
    """Of first order: right where a save is short beside the time between failures."""
    costs = {"save": 10.0, "restart": 100.0, "mtbf": 1e5}
    best = best_interval(save=10.0, mtbf=1e5)
    assert best == pytest.approx(math.sqrt(2e6))
    shares = [goodput(best * factor, **costs) for factor in (0.5, 0.8, 1.0, 1.25, 2.0)]
    assert max(shares) == pytest.approx(shares[2], rel=1e-4)
    assert shares[0] < shares[1] < shares[2] > shares[3] > shares[4]


def test_the_restarts_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Their median, which one long wait leaves as it is."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"iteration": 1, "loss": 2}) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="--restart-seconds"):
        main(["--save-seconds", "20", "--run", str(tmp_path)])
    with path.open("a", encoding="utf-8") as file:
        for number, seconds in enumerate((600, 30, 60), start=1):
            record = {"iteration": number, "restart": {"seconds_down": seconds}}
            file.write(json.dumps(record) + "\n")
        file.write('{"iteration": 4, "lo')  # it is being written
    main(["--save-seconds", "20", "--run", str(tmp_path)])
    output = capsys.readouterr().out
    assert "a restart takes 60 s" in output
    assert len(output.splitlines()) == 2 + 3
    main(["--save-seconds", "20", "--restart-seconds", "60", "--json", "--gpus", "16"])
    assert [row["gpus"] for row in json.loads(capsys.readouterr().out)] == [16]
    for gpus, seconds in (("8", "0"), ("0", "9")):
        with pytest.raises(UsageError, match="over 0"):
            main(["--save-seconds", seconds, "--restart-seconds", "60", "--gpus", gpus])
