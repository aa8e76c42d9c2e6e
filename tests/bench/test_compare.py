"""The comparison of two files of results: what it calls a regression, and what it does not."""

import json

import pytest

from moe_engine.bench.__main__ import main

TIMED = {"p20": 0.98, "p50": 1.0, "p80": 1.03, "band": 0.06, "rounds": 9}


def result(benchmark="layer", name="ours", device="card", settings=None, **values):
    about = {"versions": {"torch": "2.11.0"}, "commit": "aaa", "time": "2026-01-01T00:00:00+0000"}
    own = {"benchmark": benchmark, "name": name, "settings": settings or {"tokens": 8}, "device": device}
    return own | about | values


@pytest.fixture
def compare(tmp_path, capsys):
    """Runs the command on two lists of rows; returns status, output, errors and what it wrote."""

    def run(a, b, *flags):
        files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
        for file, rows in zip(files, (a, b), strict=True):
            file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        output = tmp_path / "ratios.jsonl"
        output.unlink(missing_ok=True)
        status = main(["compare", *map(str, files), "--output", str(output), *flags])
        text = capsys.readouterr()
        ratios = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return status, text.out, text.err, ratios

    return run


@pytest.mark.parametrize(
    ("p50", "band", "flags", "verdict"),
    [
        (1.0, 0.06, [], "same"),
        # Noise of both measurements: √(0.06² + 0.06²) = 8.5 %; beyond it is a change, up or down.
        (1.08, 0.06, [], "same"),
        (1.09, 0.06, [], "slower"),
        (1 / 1.08, 0.06, [], "same"),
        (1 / 1.09, 0.06, [], "faster"),
        # A noisier measurement hides more.
        (1.2, 0.25, [], "same"),
        # Beyond the noise, but allowed.
        (1.09, 0.06, ["--threshold", "0.1"], "same"),
        (1.11, 0.06, ["--threshold", "0.1"], "slower"),
        # Within the noise, whatever is allowed.
        (1.08, 0.06, ["--threshold", "0"], "same"),
    ],
)
def test_times(compare, p50, band, flags, verdict):
    status, out, err, ratios = compare([result(**TIMED)], [result(**TIMED | {"p50": p50, "band": band})], *flags)
    assert status == (verdict == "slower")
    (line,) = [line for line in out.splitlines() if line.startswith("layer: ours")]
    assert line.endswith(f"  {verdict}")
    assert [r["verdict"] for r in ratios] == [verdict]
    assert ratios[0]["ratio"] == pytest.approx(p50) and ratios[0]["band"] == pytest.approx((0.06**2 + band**2) ** 0.5)
    assert ("regression: layer: ours: p50 slower" in err) == bool(status)


@pytest.mark.parametrize(
    ("kind", "before", "after", "verdict"),
    [
        ("layer", {"saved_bytes": 100}, {"saved_bytes": 105}, "same"),
        ("layer", {"saved_bytes": 100}, {"saved_bytes": 106}, "larger"),
        ("layer", {"peak_bytes": 100}, {"peak_bytes": 90}, "smaller"),
        ("layer", {"peak_bytes": 100}, {}, "lost"),
        ("layer", {"peak_bytes": 100}, {"peak_bytes": None}, "lost"),
        ("compile", {"spill_loads": 0}, {"spill_loads": 8}, "larger"),
        ("compile", {"spill_loads": 0}, {"spill_loads": 0}, "same"),
        ("traffic", {"bytes": {"forward": 10, "backward": 20}}, {"bytes": {"forward": 10, "backward": 22}}, "larger"),
        ("memory", {"reserved": 100}, {"reserved": 200}, "larger"),
        ("modes", {"val_loss": 4.0}, {"val_loss": float("nan")}, "larger"),
        ("modes", {"val_loss": float("nan")}, {"val_loss": 4.0}, "smaller"),
    ],
)
def test_figures_without_noise(compare, kind, before, after, verdict):
    status, out, err, ratios = compare([result(kind, **before)], [result(kind, **after)])
    assert ratios[-1]["verdict"] == verdict
    assert status == (verdict in ("larger", "lost"))
    assert (f"{kind}: ours: {ratios[-1]['figure']} {verdict}" in err) == bool(status)
    assert "figures without noise" in out


def test_a_figure_that_is_new_is_no_regression(compare):
    status, _, _, ratios = compare([result(**TIMED)], [result(**TIMED, saved_bytes=1)])
    assert status == 0 and [r["figure"] for r in ratios] == ["p50"]


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (TIMED, {"status": "wrong: grad_x"}, "p50 lost"),
        (TIMED, {"status": "needs a GPU"}, "p50 lost"),
        ({"status": "checked, not timed"}, {"status": "wrong: grad_x"}, "status broken"),
        ({"status": "checked, not timed"}, {"status": "failed: RuntimeError"}, "status broken"),
        ({"verdict": "PASS"}, {"verdict": "FAIL"}, "status broken"),
        ({"kept": True}, {"kept": False}, "status broken"),
        ({"violations": []}, {"violations": ["float atomics"]}, "status broken"),
    ],
)
def test_a_result_that_is_lost_or_wrong_is_a_regression(compare, before, after, reason):
    status, _, err, _ = compare([result(**before)], [result(**after)])
    assert status == 1 and f"regression: layer: ours: {reason}" in err
    assert compare([result(**after)], [result(**after)])[0] == 0  # it was so before


def test_the_newest_counts_and_the_rest_is_named(compare):
    a = [result(**TIMED | {"p50": 9.0}), result(**TIMED), result(name="gone", **TIMED)]
    b = [result(**TIMED), result(name="new", **TIMED), result(settings={"tokens": 16}, **TIMED)]
    status, out, _, ratios = compare(a, b)
    assert status == 0 and [r["ratio"] for r in ratios] == [1.0]
    assert "only in A: layer: gone" in out and "only in B: layer: new" in out and "only in B: layer: ours" in out


def test_namesakes_are_told_apart_by_what_differs(compare):
    rows = [result(settings={"tokens": n, "constants": {"E": 8, "BLOCK": n}, "same": 1}, **TIMED) for n in (8, 16)]
    _, out, _, _ = compare(rows, rows)
    assert "layer: ours (tokens 8, BLOCK 8) " in out and "layer: ours (tokens 16, BLOCK 16) " in out


def test_where_the_results_are_from_is_compared(compare):
    other = {"versions": {"torch": "2.14.1", "triton": "3.8.0"}, "commit": None}
    a, b = [result(**TIMED)], [result(device="other card", **TIMED) | other]
    status, _, err, _ = compare(a, b)
    assert status == 2 and "b.jsonl: expected results of what" in err and "--any_device" in err
    status, out, _, _ = compare(a, b, "--any_device")
    assert status == 0
    for line in ("device: card → other card", "commit: aaa → not recorded", "torch: 2.11.0 → 2.14.1",
                 "triton: not recorded → 3.8.0"):  # fmt: skip
        assert line in out.splitlines()
    assert "→" not in compare(a, a)[1]


@pytest.mark.parametrize(
    ("b", "flags", "message"),
    [
        ([result(name="another", **TIMED)], [], "b.jsonl: expected results of what"),
        ([result(**TIMED), "{broken"], [], "b.jsonl, line 2: expected a result of moe-bench, got '{broken'"),
        ([], [], "b.jsonl: expected results of what"),
        ([result(**TIMED)], ["--threshold", "-1"], "--threshold: expected 0 or more, got -1.0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(compare, b, flags, message):
    status, _, err, _ = compare([result(**TIMED)], b, *flags)
    assert status == 2 and message in err and err.count("\n") == 1


def test_both_files_are_needed(tmp_path, capsys):
    assert main(["compare", str(tmp_path / "a.jsonl")]) == 2
    assert "b is required: JSONL file of results, after" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a.jsonl"), "b"]) == 2
    assert "a.jsonl: expected a JSONL file of results, found none" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_bytes(b"\x89PNG")
    assert main(["compare", str(tmp_path / "a.jsonl"), "b"]) == 2
    assert "a.jsonl: expected a JSONL file of results, got UnicodeDecodeError" in capsys.readouterr().err
