"""The command line: spellings, explicit values, nested tables, and one clear line for everything that is wrong."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from moe_engine.train.cli import build, guarded, parse, run_command
from moe_engine.train.errors import InputError
from moe_engine.train.options import option


@dataclass
class Experts:
    count: int | None = option(None, "number of experts")


@dataclass
class ModelOverrides:
    num_layers: int | None = option(None, "number of layers")
    bias: bool | None = option(None, "biases in the attention")
    window: int | None = option(128, "sliding window")
    experts: Experts = field(default_factory=Experts)


@dataclass
class Config:
    data_dir: str = option(help="folder with tokenized data")
    batch_size: int = option(4, "micro batch size per GPU")
    lr: float = option(3e-4, "peak learning rate")
    out_dir: Path = option(Path("out"), "run folder")
    dtype: str = option("bfloat16", "training dtype", choices=("bfloat16", "float16", "float32"))
    router_aux_coef: float | str = option("auto", "router loss coefficient", choices=("auto",))
    device: Literal["cpu", "cuda"] | None = option(None, "where to train")
    log_router_stats: bool = option(True, "log the router statistics")
    input: list[str] = option(help="files and folders", default_factory=list)
    ratios: tuple[float, ...] = option((), "mixture")
    model: ModelOverrides = field(default_factory=ModelOverrides)


@dataclass
class FilesConfig:
    files: list[Path] = option(help="what to read", default_factory=list, positional=True)
    deep: bool = option(False, "read everything")


@dataclass(frozen=True)
class Plain:
    """A dataclass of the engine, with no option metadata."""

    width: int
    top_k: int = 2


@dataclass
class TableConfig:
    steps: int = option(1, "steps")
    model: dict[str, Any] = field(default_factory=dict)


def given(*argv: str) -> dict[str, Any]:
    return parse("moe-test", Config, argv)


def error_of(*argv: str, config: type = Config) -> str:
    with pytest.raises(InputError) as caught:
        build(config, parse("moe-test", config, argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_parse_returns_only_what_was_given() -> None:
    assert given() == {}
    values = given("--lr", "0.0003", "--model.num_layers", "4", "--model.experts.count=8")
    assert values == {"lr": 3e-4, "model": {"num_layers": 4, "experts": {"count": 8}}}
    assert given("--batch_size", "4") == {"batch_size": 4}, "a value equal to the default was still given"


@pytest.mark.parametrize("argv", [["--batch_size", "2"], ["--batch-size", "2"], ["--batch-size=2"], ["--batch_size=2"]])
def test_underscores_and_dashes(argv: list[str]) -> None:
    assert given(*argv) == {"batch_size": 2}


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--log_router_stats"], True),
        (["--log-router-stats"], True),
        (["--no-log_router_stats"], False),
        (["--no_log_router_stats"], False),
        (["--no-log-router-stats"], False),
        (["--log_router_stats", "true"], True),
        (["--log_router_stats", "False"], False),
        (["--log_router_stats=false"], False),
        (["--log_router_stats", "--no_log_router_stats"], False),
    ],
)
def test_booleans(argv: list[str], value: bool) -> None:
    assert given(*argv) == {"log_router_stats": value}


def test_nested_booleans_have_both_forms() -> None:
    assert given("--model.bias") == {"model": {"bias": True}}
    assert given("--no-model.bias") == {"model": {"bias": False}}
    assert given("--model.bias", "false") == {"model": {"bias": False}}


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--input", "a", "b", "c"], ["a", "b", "c"]),
        (["--input", "a", "--input", "b", "c"], ["a", "b", "c"]),
        (["--input=a", "--input", "-"], ["a", "-"]),
        (["--input", "a", "-"], ["a", "-"]),
    ],
)
def test_lists(argv: list[str], value: list[str]) -> None:
    assert given(*argv) == {"input": value}
    assert given(*argv, "--lr", "1") == {"input": value, "lr": 1.0}


def test_value_types() -> None:
    assert given("--out_dir", "a/b") == {"out_dir": Path("a/b")}
    assert given("--ratios", "0.5", "1e-1") == {"ratios": [0.5, 0.1]}
    assert given("--router_aux_coef", "0.01") == {"router_aux_coef": 0.01}
    assert given("--router_aux_coef", "auto") == {"router_aux_coef": "auto"}
    assert given("--device", "cuda") == {"device": "cuda"}
    assert given("--model.window", "none") == {"model": {"window": None}}
    assert given("--batch_size", "-3") == {"batch_size": -3}, "the range is the config's own check"
    assert given("--data_dir", "-odd-name") == {"data_dir": "-odd-name"}
    assert given("--data_dir=--odder") == {"data_dir": "--odder"}


def test_positional_arguments() -> None:
    def read(*argv: str) -> dict[str, Any]:
        return parse("moe-test", FilesConfig, argv)

    assert read("a", "--deep", "b") == {"files": [Path("a"), Path("b")], "deep": True}
    assert read("--deep", "false", "--", "--strange") == {"files": [Path("--strange")], "deep": False}
    assert read() == {}


def test_build_fills_defaults_at_every_depth() -> None:
    config = build(Config, {"data_dir": "d", "model": {"bias": True, "experts": {"count": 8}}})
    expected = ModelOverrides(num_layers=None, bias=True, window=128, experts=Experts(count=8))
    assert config == Config(data_dir="d", model=expected)


def test_tables_give_a_dict_of_the_given_values() -> None:
    tables = [("model", Plain)]
    assert parse("moe-test", TableConfig, ["--model.width", "64"], tables=tables) == {"model": {"width": 64}}
    seen: list[TableConfig] = []
    assert run_command("moe-test", TableConfig, seen.append, ["--model.top-k=4"], tables=tables) == 0
    assert seen == [TableConfig(steps=1, model={"top_k": 4})]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bach_size", "3"], "no such flag --bach_size; did you mean --batch_size?"),
        (["--bach-size=3"], "no such flag --bach-size; did you mean --batch_size?"),
        (["-batch_size", "3"], "no such flag -batch_size; did you mean --batch_size?"),
        (["--model.num_layer", "3"], "no such flag --model.num_layer; did you mean --model.num_layers?"),
        (["--qqq"], "no such flag --qqq; see --help for all of them"),
        (["--batch_size", "four"], "--batch_size: expected a whole number, got 'four'"),
        (["--batch_size", "1.5"], "--batch_size: expected a whole number, got '1.5'"),
        (["--lr", "fast"], "--lr: expected a number, got 'fast'"),
        (["--lr", "nan"], "--lr: expected a number, got 'nan'"),
        (["--dtype", "fp8"], "--dtype: expected one of bfloat16, float16, float32, got 'fp8'"),
        (["--device", "tpu"], "--device: expected one of cpu, cuda or none, got 'tpu'"),
        (["--router_aux_coef", "big"], "--router_aux_coef: expected a number or auto, got 'big'"),
        (["--model.window", "wide"], "--model.window: expected a whole number or none, got 'wide'"),
        (["--ratios", "1", "x"], "--ratios: expected a number, got 'x'"),
        (["--log_router_stats=maybe"], "--log_router_stats: expected true or false, got 'maybe'"),
        (["--no_log_router_stats=true"], "--no_log_router_stats takes no value, got 'true'"),
        (["--data_dir"], "--data_dir needs a value (text)"),
        (["--data_dir", "--lr", "1"], "--data_dir needs a value (text)"),
        (["--input", "--lr=1"], "--input needs a value (text)"),
        (["stray"], "got unexpected extra argument (stray)"),
        (["--lr", "1"], "--data_dir is required: folder with tokenized data"),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    assert error_of(*argv) == message


def test_unsupported_field_type_is_a_programming_error() -> None:
    @dataclass
    class Odd:
        table: dict[str, int] = option(None, "no command-line form")

    with pytest.raises(TypeError, match="option table: no command-line form"):
        parse("moe-test", Odd, [])


def test_help_shows_flags_texts_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("moe-test", Config, lambda config: pytest.fail("main ran"), ["--help"], "What it does.") == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "What it does.",
        "--data_dir TEXT folder with tokenized data [required]",
        "--batch_size INT micro batch size per GPU [default: 4]",
        "--lr FLOAT peak learning rate [default: 0.0003]",
        "--dtype bfloat16|float16|float32 training dtype [default: bfloat16]",
        "--log_router_stats / --no_log_router_stats log the router statistics [default: true]",
        "Options of [model]:",
        "--model.num_layers INT number of layers",
    ):
        assert part in text


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_run_command_calls_main_with_the_config(result: int | None, status: int) -> None:
    seen: list[Config] = []

    def main(config: Config) -> int | None:
        seen.append(config)
        return result

    assert run_command("moe-test", Config, main, ["--data_dir", "d"]) == status
    assert seen == [Config(data_dir="d")]


def test_arguments_come_from_the_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["moe-test", "--lr", "2"])
    assert parse("moe-test", Config) == {"lr": 2.0}


def test_input_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main(config: Config) -> None:
        raise InputError("data/x.npy: expected 2-byte tokens, got 3 bytes")

    assert run_command("moe-test", Config, main, ["--data_dir", "d"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: data/x.npy: expected 2-byte tokens, got 3 bytes\n")


def test_interrupt_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def body() -> None:
        raise KeyboardInterrupt

    assert guarded(body) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_errors_keep_their_traceback() -> None:
    def body() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        guarded(body)


def test_a_reader_that_leaves_is_quiet(tmp_path: Path) -> None:
    """`command | head` ends quietly; a broken pipe that is not our own output stays an error."""
    script = tmp_path / "chatter.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from moe_engine.train.cli import guarded

        def chatter():
            sys.stdin.readline()  # until the reader has closed our output
            for _ in range(10_000):
                print("a line that nobody reads")

        def foreign():
            raise BrokenPipeError("a worker has died")

        sys.exit(guarded(chatter if sys.argv[1] == "chatter" else foreign))
        """)
    )

    def start(which: str) -> subprocess.Popen:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, str(script), which], stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    process = start("chatter")
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 141)
    process.stderr.close()

    _, err = start("foreign").communicate(timeout=60)
    assert "a worker has died" in err
