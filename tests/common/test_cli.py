"""Settings by name, errors of one line, and what --help shows."""
import argparse
import shlex
from dataclasses import dataclass

import pytest
import torch

import check
import distill
import evaluate
import render
import train
from checkpoints import convert
from common import cli
from photographs import turntable
from sample import rocket, toys
from tests.support.helpers import one_line


@dataclass(frozen=True)
class Field:
    levels: int = 16
    width: int = 64
    bound: float = 4.0
    hashed: bool = True


@dataclass(frozen=True)
class Sampler:
    steps: int = 50
    width: float = 1.0


@dataclass(frozen=True)
class Config:
    iterations: int = 3000
    bootstrap: int = 1000
    betas: tuple[float, float] = (0.9, 0.999)
    widths: tuple[int, ...] = (8, 8)
    flags: tuple[bool, ...] = (True,)
    mode: str = "eps"
    field: Field = Field()
    sampler: Sampler = Sampler()

    def __post_init__(self):
        if self.bootstrap > self.iterations:
            raise ValueError(f"bootstrap {self.bootstrap} is more than the {self.iterations} iterations")
        if self.sampler.steps > self.field.levels * 100:
            raise ValueError(f"{self.sampler.steps} steps are too many for {self.field.levels} levels")


@dataclass(frozen=True)
class Architecture:
    stem: int = 64
    unet: Sampler = Sampler()


def refused(settings, *words, fixed=None):
    """In one line that says which flag."""
    with pytest.raises(ValueError) as e:
        cli.apply_settings(Config(), settings, fixed)
    message = str(e.value)
    assert message.startswith("--set ") and len(message.splitlines()) == 1
    assert all(word in message for word in words), message


# --- flags ---

def test_flags_that_stood_there():
    parser = cli.Parser()
    parser.add_argument("--views", default=2)
    parser.add_argument("--weights")
    args = parser.parse_args(["--weights=x"])
    assert args.given == {"--weights"} and parser.parse_args([]).given == set()


def test_flags_are_not_guessed(capsys):
    parser = cli.Parser()
    parser.add_argument("--iterations")
    one_line(capsys, parser.parse_args, ["--iteration", "3"], "--iteration")


@pytest.mark.parametrize("command, name", [
    (distill, "distill.py"), (evaluate, "evaluate.py"), (train, "train.py"), (check, "check.py"),
    (render, "render.py"), (toys, "sample/toys.py"), (rocket, "sample/rocket.py"),
    (turntable, "photographs.turntable"), (convert, "checkpoints.convert")])
def test_examples_of_help_are_valid(command, name):
    """Each command has two or more, whole, each a line to copy."""
    text, _, examples = command.parser().format_help().partition("examples:\n")
    assert command.__doc__.splitlines()[0] in text
    lines = examples.splitlines()
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] in ("python", "torchrun") and name in words
        parsed = command.parser().parse_args(words[words.index(name) + 1:])
        assert parsed.given or command in (distill, evaluate, check, rocket), line


@pytest.mark.parametrize("command", [distill, evaluate, train, check, render])
def test_help_is_in_groups(command):
    """Few flags stand in none of them."""
    groups = {group.title: len(group._group_actions) for group in command.parser()._action_groups}
    assert groups.pop("options") <= 3 and groups.pop("positional arguments") <= 1
    assert len(groups) >= 1 and min(groups.values()) >= 3


def test_cuda_where_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command, argv in ((distill, []), (render, ["output/x"]), (train, ["vae", "--root", "x", "--out", "y"])):
        assert command.parser().parse_args(argv).device == "cpu"
        one_line(capsys, command.main, [*argv, "--device", "cuda"], "error: argument --device: ", "sees no NVIDIA GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distill.parser().parse_args([]).device == "cuda"


@pytest.mark.parametrize("command", [distill, evaluate, train, check, render])
@pytest.mark.parametrize("value", ["", " "])
def test_empty_values(command, value, capsys):
    """Of any flag with a value, behind a space or an equals sign, and of a word of its own."""
    p = command.parser()
    for action in p._actions:
        if action.option_strings and action.nargs != 0:
            flag = action.option_strings[0]
            one_line(capsys, p.parse_args, [flag, value], f"error: {flag}: an empty value")
            one_line(capsys, p.parse_args, [f"{flag}={value}"], f"error: {flag}", "an empty value")
    one_line(capsys, p.parse_args, [value], "an empty value")


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "", str(2**31), "9" * 30])
def test_seeds_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError):
        cli.seed(text)


def test_seeds():
    assert cli.seed("0") == 0 and cli.seed(str(2**31 - 1)) == 2**31 - 1


# --- names ---

def test_nothing_set_is_the_same_config():
    config = Config(iterations=2000)
    assert cli.apply_settings(config, []) == config


@pytest.mark.parametrize("name", ["field.levels", "levels"])
def test_a_path_or_its_unique_end(name):
    assert cli.apply_settings(Config(), [f"{name}=8"]) == Config(field=Field(levels=8))


def test_what_is_not_set_stays():
    config = Config(iterations=2000, field=Field(bound=2.0, hashed=False))
    expected = Config(iterations=2000, field=Field(bound=2.0, hashed=False, levels=8), sampler=Sampler(steps=9))
    assert cli.apply_settings(config, ["levels=8", "sampler.steps=9"]) == expected
    assert config.field.levels == 16


def test_every_field_has_its_path():
    assert list(cli.field_types(Config)) == [
        "iterations", "bootstrap", "betas", "widths", "flags", "mode", "field.levels", "field.width", "field.bound",
        "field.hashed", "sampler.steps", "sampler.width"]


def test_an_end_of_several_paths_is_ambiguous():
    refused(["width=3"], "--set width", "field.width, sampler.width")
    assert cli.apply_settings(Config(), ["sampler.width=3"]).sampler.width == 3.0


def test_the_end_of_a_name_is_no_name():
    refused(["evels=3"], "no such field", "near are field.levels")


@pytest.mark.parametrize("setting,near", [
    ("iteration=5", "iterations"), ("field.level=5", "field.levels"), ("sampler.levels=5", "field.levels"),
    ("widht=5", "field.width"), ("betta=1", "betas")])
def test_near_names_are_told(setting, near):
    refused([setting], f"--set {setting.split('=')[0]}: no such field; near are ", near)


def test_names_that_are_near_to_nothing():
    refused(["quux=1"], "--set quux: no such field")
    refused(["field=1"], "--set field: no such field")
    refused(["=1"], "no such field")


def test_the_architecture_is_fixed():
    for name in ("stem", "unet.steps"):
        refused([f"{name}=3"], f"--set {name}: part of the architecture", fixed=Architecture())
        refused([f"{name}=3"], f"--set {name}: no such field")
    # What both have is the config's.
    assert cli.apply_settings(Config(), ["steps=9"], Architecture()).sampler.steps == 9


# --- values ---

@pytest.mark.parametrize("text,value", [
    ("iterations=12000", 12000), ("bound=1e-3", 1e-3), ("bound=2", 2.0), ("mode=x0", "x0"),
    ("mode=a=b", "a=b"), ("hashed=false", False), ("hashed=True", True), ("hashed=0", False), ("hashed=1", True),
    ("betas=0.5,1", (0.5, 1.0)), ("widths=16", (16,)), ("widths=1,2,3", (1, 2, 3)), ("flags=true,0", (True, False))])
def test_values_have_the_fields_type(text, value):
    config = cli.apply_settings(Config(), [text])
    name = text.split("=")[0]
    found = getattr(config if hasattr(config, name) else config.field, name)
    assert found == value and type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(x) for x in found] == [type(x) for x in value]


@pytest.mark.parametrize("text,words", [
    ("iterations=1.5", "'1.5' is not a whole number"), ("iterations=", "'' is not a whole number"),
    ("bound=wide", "'wide' is not a number"), ("bound=nan", "'nan' is not a number"),
    ("bound=inf", "'inf' is not a number"),
    ("hashed=maybe", "'maybe' is not true or false"), ("widths=1,,2", "'' is not a whole number"),
    ("widths=1,x", "'x' is not a whole number"), ("betas=0.9", "2 values"), ("betas=0.9,0.99,1", "2 values"),
    ("betas=0.9,x", "'x' is not a number"), ("flags=1,2", "'2' is not true or false"), ("iterations", "NAME=VALUE")])
def test_values_of_another_type(text, words):
    refused([text], words)


# --- several at once ---

def test_all_at_once():
    """No order of settings in which each alone fits is asked for."""
    for settings in (["iterations=10", "bootstrap=5"], ["bootstrap=5", "iterations=10"]):
        config = cli.apply_settings(Config(), settings)
        assert (config.iterations, config.bootstrap) == (10, 5)
    assert cli.apply_settings(Config(), ["levels=100", "steps=9000"]).sampler.steps == 9000


def test_the_last_one_counts():
    assert cli.apply_settings(Config(), ["levels=2", "field.levels=3"]).field.levels == 3


def test_what_does_not_fit_together():
    refused(["iterations=10"], "--set iterations=10: ", "bootstrap 1000 is more than the 10 iterations")
    refused(["levels=2", "steps=900"], "--set levels=2 steps=900: ", "900 steps are too many for 2 levels")


# --- commands ---

def main(argv):
    parser = cli.Parser()
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("go")
    p.add_argument("--lr", type=cli.positive)
    p.add_argument("--steps", type=cli.count)
    p.add_argument("--views", type=cli.views)
    cli.add_device(p)
    cli.add_settings(p, Config)
    p.set_defaults(run=lambda args: cli.apply_settings(Config(), args.settings))
    args = parser.parse_args(argv)
    cli.run(args.run, args)
    return args


@pytest.mark.parametrize("argv,word", [
    ([], "command"), (["fly"], "fly"), (["go", "--unknown"], "--unknown"), (["go", "--lr"], "--lr"),
    (["go", "--lr", "0"], "--lr"), (["go", "--lr", "nan"], "--lr"), (["go", "--lr", "x"], "--lr"),
    (["go", "--steps", "0"], "--steps"), (["go", "--steps", "-1"], "--steps"), (["go", "--steps", "1.5"], "--steps"),
    (["go", "--views", "-2"], "--views"), (["go", "--views", "x"], "--views"), (["go", "--device", "tpu"], "--device"),
    (["go", "--set"], "--set"), (["go", "--set", "levles=3"], "field.levels")])
def test_errors_are_one_line(argv, word, capsys):
    one_line(capsys, main, argv, "error: ", word)


def test_flags(capsys):
    settings = ["--set", "levels=3", "steps=9", "--set", "mode=x"]
    args = main(["go", "--lr", "1e-3", "--steps", "5", "--views", "0", *settings])
    assert (args.lr, args.steps, args.views, args.settings) == (1e-3, 5, 0, ["levels=3", "steps=9", "mode=x"])
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert main(["go"]).settings == []  # the list of the call before is not the default of this one
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [ValueError("a"), FileNotFoundError("b: no such file"), PermissionError(13, "c")])
def test_bad_input_is_one_line(error, capsys):
    def command(args):
        raise error
    one_line(capsys, lambda argv: cli.run(command, argparse.Namespace()), [], "error: ", error)


@pytest.mark.parametrize("allocate", [lambda: torch.empty(10**15), lambda: torch.empty(2**40, 2**40),
                                      lambda: [0] * 2**60])
def test_too_little_memory_is_one_line(allocate, capsys):
    with pytest.raises(SystemExit) as e:
        cli.run(lambda args: allocate(), None)
    line, = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and line.startswith("error: not enough memory")


def test_bugs_keep_their_traceback():
    def command(args):
        raise KeyError("bug")
    with pytest.raises(KeyError):
        cli.run(command, argparse.Namespace())
