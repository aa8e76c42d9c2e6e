"""README and docs/training.md say what the code does: tables, commands, examples, figures, links."""

import dataclasses
import math
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_engine.config import ModelConfig
from moe_engine.model import Transformer
from moe_engine.presets import PRESETS, preset
from moe_engine.train import __main__ as command
from moe_engine.train.__main__ import Flags
from moe_engine.train.cli import build, parse
from moe_engine.train.config import PRESET_DEFAULTS, TrainConfig, differences, read_toml, resolve
from moe_engine.train.doctor import DoctorConfig
from moe_engine.train.errors import InputError
from moe_engine.train.metrics import WALL_CLOCK, read_metrics
from moe_engine.train.prepare import PrepareConfig
from moe_engine.train.sample import SampleConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/training.md", "docs/kernels.md", "docs/clusters.md")
README, TRAINING, KERNELS, CLUSTERS = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
COMMANDS = {
    "moe-train": Flags,
    "moe-prepare": PrepareConfig,
    "moe-doctor": DoctorConfig,
    "moe-sample": SampleConfig,
}
MODULES = {"moe_engine.train": "moe-train"} | {f"moe_engine.train.{n}": f"moe-{n}" for n in
                                               ("prepare", "doctor", "sample")}  # fmt: skip


def plain(value) -> str:
    """A value as the tables write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return np.format_float_scientific(value, trim="-", exp_digits=1) if 0 < value < 0.01 else f"{value:g}"
    return str(value)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# Tables


def flag_rows() -> list[str]:
    """A row for each option of moe-train but those of the model, in order."""
    rows = []
    for field in dataclasses.fields(Flags):
        if field.name == "model":
            continue
        default = "required" if field.default is dataclasses.MISSING else plain(field.default)
        default = {"None": "", "": ""}.get(default, default if default == "required" else f"`{default}`")
        choices = field.metadata["choices"]
        meaning = field.metadata["help"] + (f"; one of {', '.join(choices)}" if choices else "")
        rows.append(row(f"`--{field.name}`", default, meaning))
    return rows


def preset_default_rows() -> list[str]:
    """A row for each default of moe-train that `tiny` or `small` brings."""
    tiny, small = PRESET_DEFAULTS["tiny"], PRESET_DEFAULTS["small"]
    names = [f for f in dataclasses.fields(TrainConfig) if f.name in {**tiny, **small}]
    return [
        row(f"`--{f.name}`", *(f"`{plain(defaults.get(f.name, f.default))}`" for defaults in ({}, tiny, small)))
        for f in names
    ]


def count(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def preset_rows() -> list[str]:
    """A row for each model: parameters counted on the real modules, without storage."""
    rows = []
    for name in PRESETS:
        c = preset(name)
        with torch.device("meta"):
            model = Transformer(c)
        total = sum(p.numel() for p in model.parameters())
        per_expert = sum(p[0].numel() for n, p in model.named_parameters() if n.rpartition(".")[2] in EXPERT)
        table = c.vocab_size * c.d_model
        active = total - (c.num_experts - c.top_k) * per_expert - 2 * table
        rows.append(
            row(
                f"`{name}`",
                count(total),
                count(active),
                count(active + table),
                str(c.num_layers),
                str(c.d_model),
                f"{c.num_heads} / {c.num_kv_heads} × {c.head_dim}",
                f"{c.num_experts}, top-{c.top_k}",
                str(c.d_ff),
                f"{c.vocab_size:,}",
            )
        )
    return rows


EXPERT = ("w_up", "b_up", "w_down", "b_down")


def model_rows() -> list[str]:
    """The beginning of a row for each field of the model."""
    return [
        row(f"`--model.{f.name}`", *(f"`{plain(getattr(preset(p), f.name))}`" for p in ("8b", "tiny")))[:-2]
        for f in dataclasses.fields(ModelConfig)
    ]


@pytest.mark.parametrize("rows", [flag_rows, preset_default_rows, preset_rows, model_rows])
def test_a_table_of_the_readme_is_that_of_the_code(rows):
    """A row that is missing is printed as it has to be: copy it from the message."""
    lines = README.splitlines()
    missing = [r for r in rows() if not any(line.startswith(r) for line in lines)]
    assert missing == [], "\n".join(["README.md lacks these rows:", *missing])


def test_no_table_of_the_readme_has_a_flag_that_does_not_exist():
    known = {f"--{f.name}" for f in dataclasses.fields(Flags)} | {
        f"--model.{f.name}" for f in dataclasses.fields(ModelConfig)
    }
    listed = re.findall(r"^\| `(--[\w.]+)` ", README, re.MULTILINE)
    assert set(listed) == known - {"--model"}


# Commands


def fenced(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Every call of one of our commands in the shell blocks of a page: its name and arguments."""
    found = []
    for line in "".join(fenced("bash", page)).replace("\\\n", " ").splitlines():
        for part in line.split(" #")[0].split(" | "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and words[0] in ("python", "torchrun") and "-m" in words:
                place = words.index("-m") + 1
                if words[place] in MODULES:
                    words = [MODULES[words[place]], *words[place + 1 :]]
            if words and words[0] in COMMANDS:
                found.append((words[0], words[1:]))
    return found


def accept(name: str, arguments: list[str], folder: Path) -> None:
    """Parse one call as the command would, up to its work. Raises InputError where it would."""
    given = parse(name, COMMANDS[name], arguments)
    if name != "moe-train":
        build(COMMANDS[name], given)
        return
    file = given.pop("config", None)
    if given.pop("print_config", False):
        given.setdefault("data_dir", "")
    path = file and (folder if (folder / file).exists() else ROOT) / file
    resolve(given, read_toml(path) if path else None).model_config(1)


def test_the_commands_in_the_readme_are_accepted(tmp_path):
    (toml,) = fenced("toml")
    (tmp_path / "mine.toml").write_text(toml, encoding="utf-8")
    calls = commands(README)
    for name, arguments in calls:
        accept(name, arguments, tmp_path)
    assert {name for name, _ in calls} == set(COMMANDS) and len(calls) >= 12
    on_nodes = commands(CLUSTERS)
    for name, arguments in on_nodes:
        accept(name, arguments, tmp_path)
    assert len(on_nodes) >= 3


@pytest.mark.parametrize(
    "line",
    ["moe-train --data_dir x --batchsize 4", "python -m moe_engine.train --preset tiny", "moe-sample --prompt Once"],
)
def test_a_wrong_command_would_be_noticed(line, tmp_path):
    ((name, arguments),) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises(InputError):
        accept(name, arguments, tmp_path)


def test_every_command_and_make_target_is_mentioned():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) == set(COMMANDS) | {"moe-bench"}  # its calls: tests/bench/test_kernels_page.py
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", prose) + "".join(fenced("bash")).splitlines()
    mentioned = {match.group(1) for span in spans if (match := re.match(r"make (\w+)", span))}
    assert {"train", "test"} <= mentioned <= targets


def test_the_extras_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \| .* \| `pip install", README, re.MULTILINE)) == set(extras)


@pytest.mark.parametrize("page", [README, KERNELS], ids=["README", "kernels"])
def test_the_examples_run(page):
    if page is KERNELS and torch.cuda.is_available():
        pytest.skip("the page's example is for the interpreter")
    blocks = fenced("python", page)
    assert blocks and "MoELayer" in blocks[0]
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert names["out"].shape == names["x"].shape and names["out"].isfinite().all()
        assert int(names["stats"].expert_counts.sum()) == 2 * names["x"].shape[:-1].numel()


# Figures and names


def test_the_figures_of_the_large_models_are_computed_ones():
    flops = preset("8b").flops_per_token(4096)
    a100, h100 = 312e12 / flops, 989e12 / flops
    hours = 10e9 / a100 / 3600
    for figure in (
        f"{flops / 1e9:.1f} GFLOP",
        f"{a100 / 1e3:.1f} K tok/s",
        f"{h100 / 1e3:.1f} K tok/s",
        f"{hours:.0f} hours",
        f"{hours / 8:.0f} hours",
        f"{100 * hours / 72:.0f}–{100 * hours / 48:.0f} %",
    ):
        assert figure in README, figure
    assert f"{flops / 1e9:.1f} GFLOP" in TRAINING
    for name in ("6b", "8b"):
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Transformer(preset(name)).parameters())
        assert f"{16 * parameters / 1e9:.0f} GB for `{name}`" in README
        assert name == "6b" or f"{12 * parameters / 1e9:.0f} GB for `{name}`" in TRAINING
    for name in ("tiny", "8b"):
        loss = f"{math.log(preset(name).vocab_size):.1f}"
        assert loss in README and loss in TRAINING


def test_the_table_of_router_signs_is_computed():
    config = resolve({"data_dir": "x"})
    for experts in (8, 16, 64):
        coef = config.aux_coef(experts)
        cells = (experts, coef, 1 + 0.001 / coef, 1 + 0.01 / coef, experts // 2)
        assert row(*(f"{cell:g}" for cell in cells)) in TRAINING


def test_what_may_change_between_two_starts_is_what_the_page_lists():
    names = [f.name for f in dataclasses.fields(TrainConfig) if f.name != "model"]
    free = {name for name in names if not differences({name: "a"}, {name: "b"})}
    quoted = "".join(re.findall(r"^> .*$", TRAINING, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", quoted)) == free


def test_everything_that_a_run_leaves_is_described(small_run):
    """Files in README, keys of metrics.jsonl in docs/training.md."""
    config = small_run(max_iters=2, eval_interval=2, sample_every=2, save_every=2, eval_iters=1)
    assert command.train(config) == 0
    out = Path(config.out_dir)
    (tree,) = (block for block in fenced("text") if block.startswith("out/"))
    described = {name.rstrip("/") for name in re.findall(r"^ +([\w.]+/?) ", tree, re.MULTILINE)}
    assert {path.name for path in out.iterdir()} <= described
    assert {path.name for path in (out / "plots").iterdir()} <= set(re.findall(r"\w+\.png", README))
    keys = {key for record in read_metrics(out / "metrics.jsonl") for key in record}
    assert len(keys) > 15
    assert {key for key in keys | WALL_CLOCK if f"`{key}`" not in TRAINING} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    text, folder = (ROOT / page).read_text(encoding="utf-8"), (ROOT / page).parent
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (folder / link).exists()] == []
    paths = re.findall(r"`((?:train|moe_engine|kernels|bench|configs|docs|tests|\.ci)/[\w./-]*)`", text)
    assert paths and [path for path in paths if not (ROOT / path).exists()] == []
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
    assert {a for a in re.findall(r"\]\(#([^)]+)\)", text) if a not in headings} == set()


def test_every_measured_figure_is_filled_in():
    assert re.findall(r"\{\{[A-Z_]+\}\}", README + TRAINING) == []
