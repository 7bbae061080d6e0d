"""A faulty plugin gets a one-line error with file and line, and nothing of it stays registered."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.launches import REPOSITORY
from unit.plugins.test_checks import GOOD

from megatron_smlp import options, plugin_files, plugin_texts, plugins, systems
from megatron_smlp.checking import mixers, new, routers
from megatron_smlp.checkpoints import integrity
from megatron_smlp.checkpoints.folders import MODEL, iteration_folder
from megatron_smlp.checkpoints.model_record import read_model_flags
from megatron_smlp.errors import UsageError
from megatron_smlp.flags.model_arguments import model_arguments
from megatron_smlp.flags.parse import build_parser

pytestmark = pytest.mark.usefixtures("registry")
CLASS = "from megatron_smlp.plugins import *\n@register('{name}')\nclass Mine(TokenMixer):\n    "


def written(folder: Path, text: str, name: str = "mine") -> str:
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nothing_of_this_name\n", r"mine.py:1: ModuleNotFoundError"),
        ("x = 1\nif x\n", r"mine.py:2: SyntaxError"),
        ("\nraise RuntimeError('broken')\n", r"mine.py:2: RuntimeError: broken"),
        (CLASS.format(name="attention") + "pass\n", "'attention' already exists"),
        # An exported model would be built of the package's own layers.
        (CLASS.format(name="gmlp") + "pass\n", "the token mixer 'gmlp' already exists"),
        (CLASS.format(name="a b") + "pass\n", r"mine.py:2: ValueError: .*invalid name 'a b'"),
        (CLASS.format(name="m") + "num_layers: int = option(1, 'x')\n"
         "register.architecture('m', mixer='m')\n", "flag --num-layers"),
        (CLASS.format(name="m") + "rank: int = option(1, 'x')\n"
         "register.architecture('m', mixer='m')\n", "Mine.rank is a name that Megatron sets"),
        (CLASS.format(name="m") + "taps: list = option(1, 'x')\n", "annotate it"),
        ("from megatron_smlp.plugins import register\nregister.architecture('m', mixer='n')\n",
         "no token mixer 'n'"),
        ("from megatron_smlp.plugins import register\nregister.architecture('m')\n", "mixer= or"),
        ("from megatron_smlp.plugins import register\n@register('m')\nclass C: pass\n",
         "is not a TokenMixer"),
        ("from megatron_smlp.plugins import register\nORDER = ['attention'] * 6\n"
         "register.architecture('m', layers=lambda i, n: (ORDER[i], 'mlp'))\n",
         r"mine.py:3: ValueError: layers\(6, 64\): it is called for a model of 64 layers"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_line_and_leaves_nothing(tmp_path: Path, text: str, said: str):
    tables = [table for _, table in plugins.register.tables()]
    before = [len(table) for table in (*tables, systems.MIXERS, options.OUR_FLAGS)]
    with pytest.raises(UsageError, match=said) as error:
        plugin_files.load(written(tmp_path, text))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"--plugin {tmp_path}/mine.py: ")
    assert [len(table) for table in (*tables, systems.MIXERS, options.OUR_FLAGS)] == before
    assert not plugin_texts.LOADED


def test_a_failure_behind_the_first_option_leaves_nothing(tmp_path: Path):
    """What an earlier file registered stays; the failed router's name leaves the lists."""
    plugin_files.load(written(tmp_path, GOOD, "good"))
    flags, scoring = dict(options.OUR_FLAGS), list(systems.SCORING)
    text = (
        "from megatron_smlp.plugins import *\n@register('r')\nclass R(TokenRouter):\n"
        "    fresh: int = option(1, 'x')\n    num_layers: int = option(1, 'x')\n"
    )
    with pytest.raises(UsageError, match="flag --num-layers"):
        plugin_files.load(written(tmp_path, text))
    assert (flags, scoring) == (options.OUR_FLAGS, systems.SCORING)


def test_an_option_with_the_name_of_a_flag_of_megatrons(tmp_path: Path, parse: Callable[..., Any]):
    text = CLASS.format(name="m") + "seed: int = option(1, 'x')\n"
    plugin_files.load(written(tmp_path, text + "register.architecture('m', mixer='m')\n"))
    with pytest.raises(UsageError, match="flag --seed"):
        parse("--architecture m")


def test_options_of_a_mixer_in_two_architectures(tmp_path: Path):
    text = GOOD.replace("smallest=1)", "smallest=1)\n    more: int = option(2, 'x')")
    text += "register.architecture('twice', mixer='gated_conv')\n"
    plugin_files.load(written(tmp_path, text))
    for name in ("taps", "more"):
        assert set(options.OUR_FLAGS[name].architectures) == {"gated_conv", "twice"}


def test_routers_inherit_an_option(tmp_path: Path):
    text = "from megatron_smlp.plugins import *\nclass Base(TokenRouter):\n"
    text += "    heat: float = option(1.0, 'x')\n"
    text += "".join(f"@register('{name}')\nclass {name}(Base): pass\n" for name in "ab")
    plugin_files.load(written(tmp_path, text))
    assert set(options.OUR_FLAGS["heat"].token_routers) == {"a", "b"}


def test_a_switch_that_is_on_can_be_put_off(parse: Callable[..., Any], tmp_path: Path):
    """By the command line, and by a line of a file."""
    text = GOOD.replace("smallest=1)", "smallest=1)\n    sharp: bool = option(True, 'x')")
    plugin_files.load(written(tmp_path, text))
    config = tmp_path / "config.yaml"
    config.write_text("sharp: false\n", encoding="utf-8")
    flags = ("", "--no-sharp", f"--config {config}", f"--config {config} --sharp")
    found = [parse(f"--architecture gated_conv {more}").sharp for more in flags]
    assert found == [True, False, False, True]


def test_layers_of_the_package_bring_their_flags(parse: Callable[..., Any]):
    """A custom layer order has spatial gating, but nothing else of a sparse all-MLP."""
    plugin_files.load(str(REPOSITORY / "plugins" / "alternating.py"))
    flags = "--architecture alternating --num-attention-heads 4"
    args = parse(f"{flags} --spatial-heads 4 --toeplitz")
    assert (args.spatial_heads, args.toeplitz) == (4, True)
    with pytest.raises(UsageError, match="--num-feature-experts 2 is for --architecture smlp, not"):
        parse(f"{flags} --num-feature-experts 2")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("features: int = option(2, 'x')", "GatedConv.features is an option, but its base class"),
        ("kind: Literal[1, 2] = option(1, 'x')", "annotate it as int"),
    ],
)
def test_an_option_that_cannot_be(tmp_path: Path, line: str, said: str):
    text = "from typing import Literal\n" + GOOD.replace("smallest=1)", f"smallest=1)\n    {line}")
    with pytest.raises(UsageError, match=said):
        plugin_files.load(written(tmp_path, text))


def test_a_percent_sign_in_the_help_of_an_option(parse: Callable[..., Any], tmp_path: Path):
    text = GOOD.replace("smallest=1)", "smallest=1)\n    keep: float = option(0.1, '10 % of all')")
    plugin_files.load(written(tmp_path, text))
    assert parse("--architecture gated_conv --keep 0.2").keep == 0.2


@pytest.mark.parametrize("name", ["none.py", "no_module_of_this_name", ""])
def test_a_name_of_nothing(name: str):
    with pytest.raises(UsageError, match="--plugin"):
        plugin_files.load(name)


def test_two_files_of_one_name(tmp_path: Path):
    (tmp_path / "other").mkdir()
    plugin_files.load(written(tmp_path, GOOD))
    plugin_files.load(written(tmp_path, GOOD))
    with pytest.raises(UsageError, match="rename"):
        plugin_files.load(written(tmp_path / "other", GOOD))


@pytest.mark.parametrize("name", ["random", "tokenizers"])
def test_a_module_of_pythons_own_or_of_a_library_stays(tmp_path: Path, name: str):
    module = importlib.import_module(name)
    with pytest.raises(UsageError, match=f"{name}.py shadows another module of its name: rename"):
        plugin_files.load(written(tmp_path, GOOD, name))
    assert sys.modules[name] is module


def test_a_module_in_a_linked_folder_is_its_file(tmp_path: Path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    path = written(tmp_path / "real", GOOD, "linked_mixer")
    monkeypatch.syspath_prepend(tmp_path / "link")
    assert plugin_files.load("linked_mixer") is plugin_files.load(path)


def test_two_plugins_of_one_name(tmp_path: Path):
    plugin_files.load(written(tmp_path, GOOD, "first"))
    with pytest.raises(UsageError, match=r"second.py:12: .*'gated_conv'"):
        plugin_files.load(written(tmp_path, GOOD, "second"))


def test_flags_and_configurations_name_them():
    config = REPOSITORY / "plugins/gated_conv.yaml"
    argv = ["--config", str(config), "--seed", "3"]
    assert plugin_files.load_named(argv) == argv
    assert list(plugin_texts.LOADED) == ["gated_conv"]
    assert "gated_conv" in systems.ARCHITECTURES
    facts = options.OUR_FLAGS["taps"]
    assert (facts.architectures, facts.least, facts.may_change) == (("gated_conv",), 1, False)
    both = ["--plugin", str(REPOSITORY / "plugins/threshold.py"), "--seed", "3"]
    assert plugin_files.load_named(both) == ["--seed", "3"]
    assert list(plugin_texts.LOADED) == ["gated_conv", "threshold"]


@pytest.mark.parametrize(("key", "flags"), [("plugin: null", []), ("", ["--no-plugin"])])
def test_a_key_that_is_undone_names_none(key: str, flags: list[str], tmp_path: Path):
    config = tmp_path / "config.yaml"
    text = f"include: {REPOSITORY / 'plugins/gated_conv.yaml'}\narchitecture: gmlp\n{key}\n"
    config.write_text(text, encoding="utf-8")
    argv = ["--config", str(config)]
    assert plugin_files.load_named([*argv, *flags]) == argv
    assert not plugin_texts.LOADED


def test_a_checkpoint_asks_for_its_plugin_and_for_its_text(tmp_path: Path, monkeypatch):
    text, allowed = hashlib.sha256(GOOD.encode()).hexdigest(), set[str]()
    with pytest.raises(UsageError, match=r"--plugin mine\.py --plugin other\.py"):
        plugin_texts.require({"mine": text, "other": text}, "runs/a")
    plugin_files.load(written(tmp_path, GOOD))
    plugin_texts.require({"mine": text}, "runs/a")
    with pytest.raises(UsageError, match="another version"):
        plugin_texts.require({"mine": "0" * 64}, "runs/a")
    for module in (plugin_files, plugin_texts):
        monkeypatch.setattr(module, "ALLOWED", allowed)
    config = tmp_path / "config.yaml"
    for value in ("false", "true"):
        assert not allowed
        config.write_text(f"allow-other-plugin: {value}\n", encoding="utf-8")
        plugin_files.load_named(["--config", str(config), "--no-allow-other-plugin"])
        assert not allowed
        plugin_files.load_named(["--config", str(config)])
    plugin_texts.require({"mine": "0" * 64}, "runs/a")


def test_a_run_goes_on_with_another_text_only_where_that_is_allowed(tmp_path: Path, monkeypatch):
    plugin_files.load(written(tmp_path, GOOD))
    folder = iteration_folder(tmp_path, 1)
    folder.mkdir()
    (folder / MODEL).write_text(json.dumps({"plugins": {"mine": "0" * 64}, "num_layers": 3}))
    integrity.seal(folder)
    with pytest.raises(UsageError, match="another version"):
        read_model_flags(tmp_path, 1)
    monkeypatch.setattr(plugin_texts, "ALLOWED", {plugin_texts.ALLOW})
    assert read_model_flags(tmp_path, 1)["num_layers"] == 3


def test_an_evaluation_has_the_options_that_may_change():
    plugin_files.load(str(REPOSITORY / "plugins" / "threshold.py"))
    assert "--memory=0.5" in model_arguments(build_parser(), {"memory": 0.5})


def test_an_architecture_alternates(tmp_path: Path):
    text = GOOD.replace(
        'mixer="gated_conv", channel="mlp"',
        'layers=lambda i, n: ("attention" if i % 2 else "gated_conv", "mlp")',
    )
    plugin_files.load(written(tmp_path, text))
    architecture = systems.ARCHITECTURES["gated_conv"]
    assert architecture.attends
    sizes = type("Sizes", (), {"num_layers": 3, "moe_layer_freq": 1, "num_attention_heads": 4})
    model = options.ModelOptions(architecture="gated_conv")
    slots = systems.layer_slots(model, sizes, num_experts=None)
    assert [layer.mixer for layer in slots] == ["gated_conv", "attention", "gated_conv"]


@pytest.mark.parametrize("name", ["gated_conv", "threshold", "last_tokens"])
def test_the_page_shows_the_file(name: str):
    page = {"gated_conv": "own-mixer.md"}.get(name, "own-router.md")
    text = (REPOSITORY / "plugins" / f"{name}.py").read_text(encoding="utf-8")
    assert text in (REPOSITORY / "docs" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["mixer", "router"])
def test_a_new_file_passes_the_checks(kind: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["smlp-new", kind, "my_idea"])
    new.main()
    plugin_files.load("my_idea.py")
    for kinds, checks in (
        (plugins.register.token_mixers, mixers.checks),
        (plugins.register.token_routers, routers.checks),
    ):
        for name, it in kinds.items():
            assert [row.advice for check in checks(name, it) if not (row := check()).passed] == []
    with pytest.raises(UsageError, match="already exists"):
        new.main()


@pytest.mark.parametrize("name", ["cost", "draw", "width", "forward"])
def test_a_parameter_under_a_name_of_the_base_class(tmp_path: Path, name: str):
    text = GOOD.replace("self.kernel", f"self.{name}")
    plugin_files.load(written(tmp_path, text))
    kind = plugins.register.token_mixers["gated_conv"]
    row = next(iter(mixers.checks("gated_conv", kind)))()
    assert f"GatedConv.{name} is a parameter" in row.advice
