"""What holds the house together: the direction of imports, the names installed, and what no file may name."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "kernels": "moe_engine.kernels",
    "moe_engine": "moe_engine",
    "train": "moe_engine.train",
    "bench": "moe_engine.bench",
}

# What each folder may import of ours. Arrows point down only.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "moe_engine": {"kernels", "moe_engine"},
    "train": {"kernels", "moe_engine", "train"},
    "bench": {"kernels", "moe_engine", "train", "bench"},
    "tests": {"kernels", "moe_engine", "train"},
    "tests/bench": {"kernels", "moe_engine", "train", "bench"},
}


def folder_of(module: str) -> str | None:
    """The top-level folder that holds one of our modules; None for anyone else's."""
    parts = module.split(".")
    if parts[0] != "moe_engine":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in PACKAGES else "moe_engine"


def imports_of(source: str, package: str) -> set[str]:
    """The absolute names that a module imports anywhere in it: `from a import b` counts as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def python_files() -> list[Path]:
    folders = [*PACKAGES, "tests"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if path.is_file())


def imports_by_file() -> dict[str, set[str]]:
    result = {}
    for path in python_files():
        relative = path.relative_to(ROOT)
        package = ".".join([PACKAGES.get(relative.parts[0], "tests"), *relative.parts[1:-1]])
        result[relative.as_posix()] = imports_of(path.read_text(encoding="utf-8"), package)
    return result


def wrong_arrows(file: str, names: set[str]) -> list[str]:
    """The imports of a file that its folder may not have."""
    folder = "tests/bench" if file.startswith("tests/bench/") else file.split("/")[0]
    ours = {name: folder_of(name) for name in names}
    bare = [name for name in names if name.split(".")[0] in ("kernels", "train", "bench")]
    return sorted(bare + [name for name, target in ours.items() if target and target not in MAY_IMPORT[folder]])


def test_imports_point_in_one_direction() -> None:
    files = imports_by_file()
    assert any(file.startswith("train/") for file in files)
    assert {file: wrong for file, names in files.items() if (wrong := wrong_arrows(file, names))} == {}


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("kernels/gating.py", "from moe_engine.kernels import launch\nimport triton", []),
        ("kernels/gating.py", "from moe_engine.config import MoEConfig", ["moe_engine.config.MoEConfig"]),
        ("kernels/gating.py", "from ..router import Router", ["moe_engine.router.Router"]),
        ("moe_engine/moe.py", "from .kernels import swiglu\nfrom . import router", []),
        ("moe_engine/moe.py", "from moe_engine import train", ["moe_engine.train"]),
        ("moe_engine/moe.py", "def f():\n    import moe_engine.train.data", ["moe_engine.train.data"]),
        ("train/loop.py", "from moe_engine.bench.shapes import SHAPES", ["moe_engine.bench.shapes.SHAPES"]),
        ("train/loop.py", "import train.data", ["train.data"]),
        ("bench/layer.py", "from moe_engine.train.loop import train_step\nfrom bench import x", ["bench.x"]),
        ("tests/train/test_loop.py", "import moe_engine.bench", ["moe_engine.bench"]),
        ("tests/bench/test_layer.py", "import moe_engine.bench", []),
    ],
)
def test_the_import_check_sees_what_it_must(file: str, source: str, wrong: list[str]) -> None:
    package = PACKAGES.get(file.split("/")[0], "tests")
    assert wrong_arrows(file, imports_of(source, package)) == wrong


def test_click_is_imported_in_one_place() -> None:
    users = [f for f, names in imports_by_file().items() if any(n.split(".")[0] == "click" for n in names)]
    assert users == ["train/cli.py"]


def test_kernels_package_is_a_docstring_only() -> None:
    """Other libraries probe for a package called `kernels` and may import ours: nothing may happen then."""
    (statement,) = ast.parse((ROOT / "kernels/__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str)


def repository_files() -> list[Path]:
    """What is, or would be, in the repository; without git, what is in the folder but for hidden and built files."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    else:
        built = {"build", "dist", "data", "out", "__pycache__"}
        paths = [p for p in ROOT.rglob("*") if not any(s in built or s[0] == "." for s in p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


# Written in pieces, so that this file itself is clean.
FORBIDDEN = {
    "a path of someone's machine": re.compile(r"(?<![\w.~-])/(?:home|root|work|Users)" + r"/\w"),
    "a registry host": re.compile(
        "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "download.py" + r"torch\.org"])
    ),
    "an index option": re.compile("--(?:extra-)?index" + "-url"),
}


def forbidden_in(text: str) -> list[str]:
    return [f"{what}: {hit.group()}" for what, pattern in FORBIDDEN.items() if (hit := pattern.search(text))]


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = {}
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content and (hits := forbidden_in(content.decode("utf-8", "replace"))):
            found[path.relative_to(ROOT).as_posix()] = hits
    assert found == {}


def test_the_check_for_machines_and_registries_sees_what_it_must() -> None:
    for part in ("home/me", "root/x", "work/main", "Users/me"):
        assert forbidden_in(f"path = '/{part}/file'"), part
    assert forbidden_in("see https://" + "pypi" + ".org/simple") and forbidden_in("pip install --index" + "-url x")
    assert forbidden_in("team/work/main, ./home/x and ~/root/y are relative; /workers/x is nobody's") == []


def scripts() -> dict[str, str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]


def test_the_commands_have_their_names() -> None:
    assert set(scripts()) == {"moe-train", "moe-prepare", "moe-doctor", "moe-sample", "moe-bench"}


@pytest.mark.parametrize("target", scripts().values(), ids=scripts().keys())
def test_every_command_resolves(target: str) -> None:
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_the_wheel_holds_moe_engine_only(tmp_path: Path) -> None:
    """`kernels`, `train` and `bench` are names too general to install."""
    source = tmp_path / "source"
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("moe_engine-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = {
        "/".join([*PACKAGES[folder].split("."), path.relative_to(ROOT / folder).as_posix()])
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*.py")
    }
    assert code == expected


def test_licence_and_citation() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence and "the moe-engine authors" in licence
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"version: {version}\n" in citation and "license: Apache-2.0\n" in citation
