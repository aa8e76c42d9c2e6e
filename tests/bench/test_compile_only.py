"""`moe-bench compile`: the default tiles keep every rule on every target, and the instrument sees what breaks one."""

import contextlib
import io
import json
import textwrap
from dataclasses import replace

import pytest
import torch

from moe_engine.bench.__main__ import main
from moe_engine.bench.compile_only import DEFAULT_ARCH, failures
from moe_engine.bench.compile_worker import Job, Report, run_job
from moe_engine.bench.machine_code import CARDS, MINIMUM_WARPS, Compiled, float_atomics, resident_blocks, violations

pytest.importorskip("triton")


def run(*arguments):
    """Status and standard output of the command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main(["compile", *arguments])
    return status, out.getvalue()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Status, output and rows of the command as the README has it."""
    output = tmp_path_factory.mktemp("compile") / "rows.jsonl"
    status, text = run("--arch", *DEFAULT_ARCH, "--output", str(output))
    return status, text, [json.loads(line) for line in output.read_text().splitlines()]


# -- the kernels --


def test_the_default_tiles_keep_every_rule(compiled):
    status, text, rows = compiled
    assert [(row["settings"], row["name"], row["violations"]) for row in rows if row["violations"]] == []
    assert status == 0 and text.rstrip().endswith("no rule is broken")


@pytest.mark.parametrize("arch", DEFAULT_ARCH)
def test_what_the_rules_say_again_in_plain_numbers(compiled, arch):
    rows = [row for row in compiled[2] if row["settings"]["arch"] == arch]
    gemms = [row for row in rows if row["dot"]]
    # Up-projection, down-projection, gradient of a, gradient of x, two gradients of weights.
    assert sum(row["launches"].get("forward", 0) + row["launches"].get("backward", 0) for row in gemms) == 6
    assert {row["dot"] for row in gemms} == {"bf16"}
    instruction = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[arch]
    for row in gemms:
        assert any(op.startswith(instruction) for op in row["tensor_ops"]), row
        assert arch == "gfx942" or row["async_copies"] + row["tma"] > 0, row
    for row in rows:
        assert row["stack"] == row["spill_loads"] == row["spill_stores"] == 0, row
        assert row["shared"] <= {"sm_80": 166_912, "gfx942": 65_536}.get(arch, 232_448), row
        assert row["resident_warps"] >= 8 and row["atomics"] == [], row
        assert row["registers"] > 0 and row["instructions"] > 50, "nothing was read"


def test_a_layer_takes_at_most_14_launches(compiled):
    for arch in DEFAULT_ARCH:
        rows = [row for row in compiled[2] if row["settings"]["arch"] == arch]
        launches = [sum(row["launches"].get(phase, 0) for row in rows) for phase in ("forward", "backward")]
        assert 0 < launches[0] < launches[1] and sum(launches) <= 14


def test_rows_say_what_they_are_of(compiled):
    _, text, rows = compiled
    for row in rows:
        assert (
            row["benchmark"] == "compile"
            and row["settings"]["preset"] == "8b"
            and row["versions"]["triton"]
            and row["default"]
        )
        assert "none" in row["device"], "no row may look as if a card had run it"
    assert [line.split()[0] for line in text.splitlines() if "kernels; launches: " in line] == list(DEFAULT_ARCH)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", [["--dtype", "fp16"], ["--dtype", "fp32"], ["--save", "x"], ["--tokens", "256"]])
def test_other_dtypes_memory_modes_and_few_tokens(options):
    status, text = run(*options)
    assert status == 0, text


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_candidate_compiles():
    status, text = run("--candidates")
    assert status == 0, text
    assert text.count("candidates for tuning: ") == len(DEFAULT_ARCH)


# -- the instrument --

BAD_KERNELS = textwrap.dedent("""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def product(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
        m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
        acc = tl.zeros((M, N), tl.float32)
        for start in range(0, K, BLOCK_K):
            a = tl.load(a_ptr + m[:, None] * K + start + k[None, :])
            acc = tl.dot(a, tl.load(b_ptr + (start + k)[:, None] * N + n[None, :]), acc)
        tl.store(c_ptr + m[:, None] * N + n[None, :], acc.to(tl.bfloat16))

    @triton.jit
    def atomic(x_ptr, out_ptr):
        tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 128))))

    @triton.jit
    def counting(x_ptr, out_ptr):
        tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 128))))

    x = torch.empty(1024, 1024, dtype=torch.bfloat16)
    # Stages 1: nothing is loaded ahead, so nothing asynchronously.
    good, alone, spilling, small = (128, 128, 64, 8, 3), (128, 128, 64, 8, 1), (256, 256, 32, 4, 2), (16, 64, 64, 4, 3)
    for M, N, BLOCK_K, warps, stages in (good, alone, spilling, small):
        product[(1,)](x, x, x, 1024, M=M, N=N, BLOCK_K=BLOCK_K, num_warps=warps, num_stages=stages)
    for dtype in (torch.float32, torch.bfloat16):
        atomic[(1,)](torch.empty(128, dtype=dtype), torch.empty(1, dtype=torch.float32))
    counting[(1,)](torch.empty(128, dtype=torch.int32), torch.empty(1, dtype=torch.int32))
""")


@pytest.fixture(scope="module")
def bad_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "bad.py"
    path.write_text(BAD_KERNELS)
    return str(path)


def found(report, kernel, **constants):
    """The violations of one kernel of a report, as one text."""
    rows = [r for r in report.rows if r["kernel"] == kernel and constants.items() <= r["constants"].items()]
    assert rows, [(r["kernel"], r["constants"]) for r in report.rows]
    return "; ".join(v for row in rows for v in row["violations"])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_it_sees_faults_in_real_kernels(bad_script, arch):
    report = run_job(Job(arch, script=bad_script))
    assert report.errors == []
    products = {row["constants"]["M"]: row for row in report.rows if row["kernel"] == "product" and row["stages"] == 3}
    assert "spills: " in found(report, "product", M=256)
    assert "floating-point" in found(report, "atomic") and found(report, "counting") == ""
    if arch == "gfx942":
        return
    assert products[128]["violations"] == [] and products[128]["async_copies"] > 0
    alone = [row for row in report.rows if row["stages"] == 1]
    assert "asynchronous" in "; ".join(alone[0]["violations"])
    if arch == "sm_90":  # a tile too low for the warp-group instruction falls back to the previous generation's
        assert "without HGMMA, found HMMA" in found(report, "product", M=16)


def test_the_command_fails_on_them(bad_script):
    status, text = run("--arch", "sm_80", "--script", bad_script)
    assert status == 1
    broken = text.split("broken rules:")[1]
    assert "sm_80: product" in broken and "spills" in broken and "sm_80: atomic" in broken and "counting" not in broken


GOOD = Compiled(
    arch="sm_90",
    kernel="k",
    constants={},
    warps=8,
    stages=3,
    registers=200,
    stack=0,
    spill_loads=0,
    spill_stores=0,
    shared=100_000,
    tensor_memory=0,
    dot="bf16",
    tensor_ops={"HGMMA": 4},
    async_copies=12,
    tma=0,
    instructions=1000,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spill_loads": 1}, "1 loads"),
        ({"spill_stores": 2}, "2 stores"),
        ({"tensor_ops": {}}, "without HGMMA, found none"),
        ({"tensor_ops": {"HMMA": 64}}, "without HGMMA, found HMMA"),
        ({"dot": "f16", "tensor_ops": {}}, "a product of f16"),
        ({"async_copies": 0}, "without asynchronous copies or TMA"),
        ({"shared": 232_449}, "a block has 232448 on H100"),
        ({"warps": 4, "shared": 200_000}, "4 resident warps"),
        ({"warps": 4, "registers": 1, "tensor_memory": 512}, "4 resident warps"),
        ({"atomics": ["ttir: tt.atomic_rmw fadd"]}, "tt.atomic_rmw fadd"),
    ],
)
def test_each_rule_is_a_rule(change, message):
    assert violations(GOOD) == []
    lines = violations(replace(GOOD, **change))
    assert len(lines) == 1 and message in lines[0]


def test_fp32_products_and_amd_have_rules_of_their_own():
    assert violations(replace(GOOD, dot="f32", tensor_ops={})) == []
    assert violations(replace(GOOD, async_copies=0, tma=1)) == []
    amd = replace(GOOD, arch="gfx942", tensor_ops={"v_mfma_f32_16x16x16_bf16": 8}, async_copies=0, shared=65_536)
    assert violations(amd) == []
    assert violations(replace(amd, tensor_ops={})) == ["a product of bf16 without v_mfma, found none"]


@pytest.mark.parametrize(
    ("level", "line", "expected"),
    [
        ("ttir", "%3 = tt.atomic_rmw fadd, acq_rel, gpu, %out, %sum, %true", True),
        ("ttir", "tt.descriptor_reduce add, %desc[%0], %x : !tt.tensordesc<tensor<64xf32>>, tensor<64xf32>", True),
        ("ttir", "%3 = tt.atomic_rmw add, acq_rel, gpu, %out, %sum, %true", False),
        ("ttgir", "%3 = tt.atomic_rmw fadd, relaxed, gpu, %out, %sum", True),
        ("llir", "%9 = atomicrmw fadd ptr addrspace(1) %0, float %8 monotonic", True),
        ("llir", "%9 = atomicrmw add ptr addrspace(1) %0, i32 %8 monotonic", False),
        ("ptx", "@%p1 atom.global.gpu.acq_rel.add.f32 %r1, [ %rd1 + 0 ], %r2;", True),
        ("ptx", "red.global.add.noftz.bf16x2 [%rd1], %r2;", True),
        ("ptx", "red.relaxed.gpu.global.add.v4.f32 [%rd1], {%r1, %r2, %r3, %r4};", True),
        ("ptx", "atom.global.gpu.acq_rel.add.u32 %r1, [ %rd1 + 0 ], %r2;", False),
        ("ptx", "add.f32 %f1, %f2, %f3;", False),
        ("amdgcn", "global_atomic_add_f32 v0, v1, s[0:1]", True),
        ("amdgcn", "global_atomic_pk_add_bf16 v0, v1, s[0:1]", True),
        ("amdgcn", "buffer_atomic_pk_add_f16 v0, v1, s[0:3], 0", True),
        ("amdgcn", "ds_add_f32 v0, v1", True),
        ("amdgcn", "ds_add_u32 v0, v1", False),
        ("amdgcn", "v_pk_add_f32 v[0:1], v[2:3], v[4:5]", False),
    ],
)
def test_atomics_are_known_at_every_level(level, line, expected):
    assert bool(float_atomics({level: f"before\n    {line}\nafter"})) is expected


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "expected"),
    [
        ("sm_80", 8, 255, 0, 1),  # 8192 registers a warp: two in each quarter
        ("sm_80", 8, 128, 0, 2),
        ("sm_80", 8, 129, 0, 1),  # given in steps of 256: 17 of them
        ("sm_80", 4, 32, 0, 16),  # 64 warps
        ("sm_80", 1, 16, 0, 32),  # 32 blocks
        ("sm_80", 8, 64, 98_304, 1),
        ("sm_90", 8, 64, 98_304, 2),
        ("sm_90", 8, 64, 227 * 1024, 1),
        ("sm_90", 8, 64, 227 * 1024 + 1, 0),
        ("sm_86", 8, 32, 0, 6),  # 48 warps
        ("gfx942", 8, 128, 32_768, 2),
        ("gfx942", 8, 129, 32_768, 1),  # three waves on each of four SIMDs
        ("gfx942", 4, 32, 65_536, 1),
        ("gfx942", 4, 32, 0, 8),
    ],
)
def test_what_a_multiprocessor_holds(arch, warps, registers, shared, expected):
    assert resident_blocks(CARDS[arch], warps, registers, shared) == expected


def test_tensor_memory_limits_blocks():
    assert resident_blocks(CARDS["sm_100"], 4, 64, 0, tensor_memory=256) == 2
    assert MINIMUM_WARPS == 8


# -- what else makes the status 1 --


def test_a_failure_on_the_way_is_a_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("print('noise')\nraise ValueError('h: expected rows')")
    report = run_job(Job("sm_80", script=str(script)))
    assert report.rows == [] and report.errors == ["ValueError: h: expected rows"]
    assert failures("sm_80", report) == ["sm_80: ValueError: h: expected rows"]
    script.write_text("import os\nos._exit(7)")
    assert "status 7" in run_job(Job("sm_80", script=str(script))).errors[0]


def test_kernels_that_nothing_launches_are_a_failure():
    assert failures("sm_80", Report(rows=[], unused=["_forgotten_kernel"]))[0].startswith("sm_80: _forgotten_kernel")
    assert failures("sm_80", Report()) == ["sm_80: no kernel was launched"]


def test_a_candidate_that_breaks_a_rule_is_a_remark():
    row = {"kernel": "k", "constants": {}, "violations": ["spills"], "launches": {"candidate": 1}}
    assert failures("sm_80", Report(rows=[row])) == []
    row["launches"]["forward"] = 1
    assert failures("sm_80", Report(rows=[row])) == ["sm_80: k, tile : spills"]


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: int(t),
        lambda t: float(t),
        lambda t: bool(t),
        lambda t: range(t),
        lambda t: t.nonzero(),
        lambda t: t.numpy(),
        lambda t: t.cpu(),
    ],
)
def test_values_cannot_be_read_on_the_host(read):
    from moe_engine.bench.standin import no_host_reads

    number = torch.tensor(3)
    with no_host_reads(), pytest.raises(RuntimeError, match="on the host"):
        read(number)
    read(number)


# -- the command line --

SUBCOMMANDS = "kernels, throughput, layer, compile, memory, traffic, roofline, compare, report"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"expected one of {SUBCOMMANDS}"),
        (["compil"], "no such subcommand 'compil'; did you mean compile?"),
        (["zzz"], f"no such subcommand 'zzz'; expected one of {SUBCOMMANDS}"),
        (["compile", "--arch", "sm_91"], "--arch: expected one of"),
        (["compile", "--tokens", "0"], "--tokens: expected a positive number, got 0"),
        (["compile", "--script", "missing.py"], "missing.py: no such file"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_help_lists_the_subcommands(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ("throughput", "compile", "traffic"))
    assert main(["compile", "--help"]) == 0 and "--candidates" in capsys.readouterr().out
