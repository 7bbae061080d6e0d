"""A study of several sizes: what each size is, and what the report says across them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.studies import page_of, pretend, study_argv, write_study

from megatron_smlp.errors import UsageError
from megatron_smlp.study import cli, final
from megatron_smlp.study.plan import PlannedRun
from megatron_smlp.study.results import Results
from megatron_smlp.study.sizes import Sizes, prediction
from megatron_smlp.study.state import State
from megatron_smlp.study.statistics import of_error
from megatron_smlp.study.study_file import read_studies

pytestmark = pytest.mark.usefixtures("undrawn")
FFN = {"smlp_deterministic": 6, "transformer": 4, "switch": 4}


def size(width: int, **keys: Any) -> dict[str, Any]:
    """Return the systems of SMALL at another width."""
    flags = {name: {"ffn-hidden-size": by * width} for name, by in FFN.items()}
    for name in ("smlp_deterministic", "switch"):
        flags[name]["moe-ffn-hidden-size"] = FFN[name] * width
    flags["transformer"]["num-attention-heads"] = flags["switch"]["num-attention-heads"] = 2
    named = keys.get("systems", FFN)
    return {"fixed": {"hidden-size": width, "lr": 2e-3 * (width / 256) ** -0.8},
            "variants": {name: flags[name] for name in named}, **keys}  # fmt: skip


DESIGN = {"lr": [0.5, 0.71, 1, 1.41, 2], "seeds": [21, 22, 23, 24, 25]}
LAST = {"systems": ["transformer", "smlp_deterministic"], "design": None, "seeds": [31]}
SIZES: dict[str, Any] = {"D64": size(64), "D128": size(128), "D256": size(256, **LAST)}
TOLERANT = {"flops-tolerance": 0.9, "needed-flops-tolerance": 0.9}


def write_sizes(folder: Path, **changes: Any) -> Path:
    keys = {"seeds": None, "design": DESIGN, "paper": None, "sizes": SIZES, **TOLERANT}
    return write_study(folder, **{**keys, **changes})


def states(path: Path) -> list[tuple[State, Results]]:
    return cli.read_states(cli.build_parser().parse_args(study_argv("report", path.parent)))


GAPS = {"transformer": (0.06, 0.04), "switch": (0.05, 0.05)}
"""How far each system is behind sMLP at the end, at D = 64 and at 128."""
CHANGE = {"transformer": 0.01, "switch": 0.0}
"""How much further behind it is at each earlier horizon."""


def loss_of(run: PlannedRun) -> float:
    """Return a loss: at D = 256 the Transformer is 0.03 behind, where 0.02 is predicted."""
    width = run.flags["hidden_size"]
    place = {64: 0, 128: 1}.get(width)
    gap = {None: 0.03} if place is None else {name: own[place] for name, own in GAPS.items()}
    behind = gap.get(None if place is None else run.system, 0.0) * (run.system in GAPS)
    doublings = math.log2(400_000 / (run.horizon or 100_000))
    noise = 0.002 * math.cos(5 * run.seed + len(run.system) + width)
    off = 0.045 * math.log2(run.factor) ** 2
    earlier = CHANGE.get(run.system, 0.0) + 0.3
    return 6 - 0.3 * math.log2(width) + behind + doublings * earlier + off + noise


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = write_sizes(tmp_path)
    for known, _ in states(path):
        pretend(known, loss_of)
    return path


def cells(text: str, *begin: str) -> list[str]:
    """Return the remaining cells of the row that begins with these."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {' | '.join(begin)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(begin) :]


def test_a_system_is_exported_from_the_sizes_that_have_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    exported: list[tuple[str, str]] = []

    def export(known: State, system: str, *_: Any) -> None:
        exported.append((known.study.name, system))

    monkeypatch.setattr(final, "export_best", export)
    argv = study_argv("export", path.parent, "--save", str(tmp_path / "models"), "--systems")
    cli.main([*argv, "switch,transformer"])
    name = read_studies(path)[0]
    both, last = (f"{name}-D64", f"{name}-D128"), f"{name}-D256"
    wanted = [(size, system) for size in both for system in ("switch", "transformer")]
    assert exported == [*wanted, (last, "transformer")]
    with pytest.raises(UsageError, match=r"--systems swich: .* has .*switch"):
        cli.main([*argv, "swich"])


def test_null_removes_what_all_sizes_have(tmp_path: Path):
    cut = SIZES["D64"] | {"fixed": None, "variants": None}
    path = write_sizes(tmp_path, sizes=SIZES | {"D64": cut})
    assert "lr" not in states(path)[0][0].study.fixed


def numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.split(" ± ")]


def test_a_size_is_the_study_with_keys_of_its_own(tmp_path: Path):
    own = SIZES | {"D128": SIZES["D128"] | {"titles": {"switch": "Switch, wide"}}}
    path = write_sizes(tmp_path, titles={"switch": "Switch"}, sizes=own)
    name, studies = read_studies(path)
    assert (name, [study.name for study in studies]) == (
        "small", ["small-D64", "small-D128", "small-D256"],
    )  # fmt: skip
    first, middle, last = studies
    assert (first.titles, middle.titles) == ({"switch": "Switch"}, {"switch": "Switch, wide"})
    assert first.fixed == {"bf16": True, "eval_iters": 1, "global_batch_size": 8,
                           "hidden_size": 64, "lr": pytest.approx(2e-3 * 4**0.8)}  # fmt: skip
    assert first.variants["switch"] == {
        "ffn_hidden_size": 256, "moe_ffn_hidden_size": 256, "num_attention_heads": 2,
    }  # fmt: skip
    assert (last.design, last.seeds_of("transformer")) == (None, (31,))
    assert (set(last.variants), [*last.titles]) == ({*LAST["systems"]}, [])
    known = [known for known, _ in states(write_sizes(tmp_path))]
    keys = [{run.key for run in one.plan().runs} for one in known]
    assert not keys[0] & keys[1]
    assert len({one.folder for one in known}) == 3


def test_a_variant_of_the_study_has_the_flags_of_the_size_as_well(tmp_path: Path):
    variants = {"switch": {"num-layers": 2, "ffn-hidden-size": 8}}
    _, [first, *_] = read_studies(write_sizes(tmp_path, variants=variants))
    assert (first.variants["switch"]["num_layers"], first.variants["switch"]["ffn_hidden_size"]) \
        == (2, 256)  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"D64": {"widths": [7]}}, "sizes: D64: unknown key 'widths'"),
        ({"D64": {"systems": ["hash"]}}, "sizes: D64: 'smlp_deterministic' is not in `systems`"),
        ([], "give `key: value` lines"),
        (
            SIZES | {"D9": {"systems": ["switch"], "subject": "switch"}},
            "sizes: D9: systems: 'smlp_deterministic' is missing, the subject of the first size",
        ),
    ],
)
def test_what_a_size_may_not_be(tmp_path: Path, sizes: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        read_studies(write_sizes(tmp_path, sizes=sizes))


def test_the_report_over_sizes(path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(study_argv("report", path.parent)) == 0
    results = path.parent / "results"
    text = (results / "report.md").read_text(encoding="utf-8")
    assert (results / "differences.png").stat().st_size > 10_000
    assert (results / "small-D64" / "report.md").exists()
    for name, width, place in (("D64", "64", 0), ("D128", "128", 1)):
        for rival, gaps in GAPS.items():
            *at, slope = map(numbers, cells(text, name, width, rival))
            for earlier, (mean, half) in zip((2, 1, 0), at, strict=True):
                truth = -gaps[place] - earlier * CHANGE[rival]
                assert abs(mean - truth) < 0.004 < half < 0.02
            assert slope[0] == pytest.approx(CHANGE[rival], abs=0.002)
    # With one run each there is no interval.
    assert len(numbers(cells(text, "D256", "256", "transformer")[0])) == 1
    ranks = cells(text, "D64", "0.4M")
    assert ranks[0].split()[0] == "smlp_deterministic"
    assert ranks[0].split()[2] == "<"
    assert ranks[1] == "no quiet timing"
    predicted, observed, error, within = cells(text, "D256", "transformer", "0.4M")
    assert numbers(predicted)[0] == pytest.approx(-0.02, abs=0.006)
    assert float(observed) == pytest.approx(-0.03, abs=0.006)
    assert numbers(error)[0] == pytest.approx(float(observed) - numbers(predicted)[0], abs=0.002)
    assert within == "yes"
    assert "switch" not in text.split("## Predictions")[1]


def test_two_sizes_of_one_width_predict_no_third(tmp_path: Path):
    """As with two lengths: no line over the width goes through them."""
    pair = {"systems": LAST["systems"]}
    sizes = {"D64": size(64, **pair), "short": size(64, **pair), "D128": size(128, **pair)}
    sizes["short"]["fixed"]["seq-length"] = 128
    path = write_sizes(tmp_path, sizes=sizes, design=None, seeds=[21, 22], horizons=["0.4M"])
    pages = []
    for known, _ in states(path):
        pretend(known, loss_of)
        pages.append(page_of(known, tmp_path / known.study.name))
    text = Sizes("small", pages).text()
    assert cells(text, "short", "64", "transformer")
    assert "| D128 |" not in text.split("## Predictions")[1]


@pytest.mark.parametrize("systems", [["smlp_deterministic"], list(FFN)])
def test_systems_that_a_size_lacks(tmp_path: Path, systems: list[str]):
    """The last size has no runs yet; alone, a subject has no rivals."""
    pair = {"systems": systems[:2]}
    sizes = {"D64": size(64, **pair), "D128": size(128, **pair), "D256": size(256)}
    if len(systems) == 1:
        sizes["D256"] = size(256, **pair)
    path = write_sizes(tmp_path, sizes=sizes, ablations=None, horizons=["0.4M"])
    for known, _ in states(path)[:2]:
        pretend(known, loss_of)
    assert cli.main(study_argv("report", tmp_path)) == 0
    text = (tmp_path / "results" / "report.md").read_text(encoding="utf-8")
    assert ("differences.png" in text) is (len(systems) > 1)
    assert "| D256 | switch" not in text.split("## Predictions")[1]


def test_a_report_with_timings_before_the_last_size_is_there(path: Path):
    """It has a prediction for that size. Equal time is that of the fastest: at twice the others'
    speed the Transformer has another doubling, which is worth 0.3 nats."""
    (_, results), *_, (last, _) = states(path)
    for ending in last.folder.rglob("ended.json"):
        ending.unlink()
    speed = {"transformer": 2000.0, "switch": 1000.0, "smlp_deterministic": 1000.0}
    results.add_speed([
        {"system": name, "round": number, "seconds_per_iteration": 1.0, "tflops": 1.0,
         "tokens_per_second": tokens, "gemm_tflops": 1.0, "processes": 1, "threads": 1, "steps": 4}
        for name, tokens in speed.items()
        for number in (1, 2)
    ])  # fmt: skip
    cli.main(study_argv("report", path.parent))
    text = (path.parent / "results" / "report.md").read_text(encoding="utf-8")
    predicted, observed, _, within = cells(text, "D256", "transformer", "0.4M")
    assert (len(numbers(predicted)), observed, within) == (2, "n/a", "not yet")
    assert "(small-D128/report.md)" in text
    assert "(small-D256/report.md)" not in text  # which is not there
    assert cells(text, "D64", "0.4M")[1].split()[0] == "transformer"
    losses = dict(part.rsplit(" ", 1) for part in cells(text, "D64", "0.4M")[1].split("; "))
    lead = float(losses["smlp_deterministic"]) - float(losses["transformer"])
    assert lead == pytest.approx(0.3 - 0.06, abs=0.02)
    first = cells(text, "D64", "0.1M")[1]
    assert first.endswith("(no loss there: switch; smlp_deterministic)")


def test_a_prediction_covers_what_goes_on_as_it_did():
    rng, widths = np.random.default_rng(1), [64, 128, 512]
    covered = []
    for _ in range(400):
        means = [-0.06 + 0.02 * math.log2(width / 64) for width in widths]
        sides = [of_error(rng.normal(mean, 0.01), 0.01, df=200, n=5) for mean in means[:2]]
        found = prediction(sides, widths)
        covered.append(found.low < means[2] < found.high)
    # Extrapolates one doubling to two more: d_2 + 2 (d_2 - d_1).
    assert found.mean == pytest.approx(3 * sides[1].mean - 2 * sides[0].mean)
    assert 0.92 < np.mean(covered) < 0.98
