"""Rows of results: written whole or not at all, and read with one line of an error."""

import json

import pytest

from moe_engine.bench.runner import append_rows, check_writable, read_rows
from moe_engine.train.errors import InputError

ROW = {"benchmark": "b", "name": "n", "settings": {}, "device": "d", "time": "t"}


def test_rows_are_written_all_or_none(tmp_path):
    path = tmp_path / "made" / "rows.jsonl"
    append_rows(path, [ROW, ROW])
    with pytest.raises(TypeError):
        append_rows(path, [ROW, ROW | {"values": object()}])
    append_rows(path, [ROW])
    assert read_rows(path) == [ROW] * 3


def test_what_is_no_file_of_rows_is_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = json.dumps(ROW)
    for content in (b"\xff\xfe", b"[1]\n", b"3\n", f"{whole}\n{whole[:30]}".encode()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"expected a .*result") as found:
            read_rows(path)
        assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="found none"):
        read_rows(tmp_path)


def test_what_cannot_be_written_is_found_before_anything_is_measured(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    check_writable(output=str(path), picture=None)
    assert path.parent.is_dir() and not path.exists()
    append_rows(path, [ROW])
    check_writable(output=str(path))
    assert read_rows(path) == [ROW], "nothing is changed"
    for bad in (tmp_path, path / "below"):
        with pytest.raises(InputError, match=rf"^--picture: expected a file that can be written, got {bad} \(\w"):
            check_writable(picture=str(bad))
    with pytest.raises(InputError, match="expected a file that results can be added to"):
        append_rows(path / "below", [ROW])


@pytest.mark.parametrize("line", ["[" * 100_000, '{"n": ' + "9" * 5000 + "}", "5", "null", '{"benchmark": NaN}'])
def test_what_is_no_result_is_one_line(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: expected a result of moe-bench"):
        read_rows(tmp_path / "rows.jsonl")
