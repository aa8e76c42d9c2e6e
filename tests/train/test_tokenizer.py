"""Tokenizers: round trips, specs, vocabularies cut to their first ranks, and where the ranks come from."""

import importlib.util
import os
import pickle
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_engine.train import tokenizer as module
from moe_engine.train.errors import InputError
from moe_engine.train.tokenizer import load_tokenizer

SPECS = ["o200k_base", "o200k_base:4096", "o200k_base:256"]
needs_ranks = pytest.mark.skipif(
    importlib.util.find_spec("bpe_openai") is None, reason="the ranks come from the package bpe-openai"
)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """tiktoken's download fails, its cache is empty, and what was loaded before is forgotten."""

    def refuse(path):
        raise ConnectionError(f"cannot reach {path}")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    load_tokenizer.cache_clear()
    yield
    load_tokenizer.cache_clear()


@needs_ranks
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=200))
def test_decode_inverts_encode(spec, text):
    tokenizer = load_tokenizer(spec)
    text = text.encode("utf-8", "replace").decode()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eot for token in ids)


@needs_ranks
def test_source_code_round_trip_and_compression():
    text = Path(sysconfig.get_path("stdlib"), "typing.py").read_text(encoding="utf-8")
    lengths = {}
    for spec in SPECS:
        tokenizer = load_tokenizer(spec)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        lengths[spec] = len(ids)
    assert len(text) / lengths["o200k_base"] > 3.5
    assert len(text) / lengths["o200k_base:4096"] > 2.3
    assert lengths["o200k_base:256"] == len(text.encode())


@needs_ranks
def test_the_whole_vocabulary_encodes_as_tiktoken_does():
    text = "Grüße, 世界! 1234567 don't <|endoftext|>\n\n\tx = y\n"
    tokenizer = load_tokenizer("o200k_base")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("o200k_base", 200_019, 199_999)
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)
    array = tokenizer.encode_array(text)
    assert array.dtype == np.uint32 and array.tolist() == tokenizer.encode(text)


@needs_ranks
def test_the_padded_gpt_oss_vocabulary():
    tokenizer = load_tokenizer("o200k_harmony")
    assert tokenizer.vocab_size == 201_088
    assert tokenizer.encode("hello world") == load_tokenizer("o200k_base").encode("hello world")


@needs_ranks
def test_cut_vocabulary_has_the_end_of_text_after_its_ranks():
    tokenizer = load_tokenizer("o200k_base:8192")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot) == ("o200k_base:8192", 8193, 8192)
    assert load_tokenizer("o200k_base:08192").name == "o200k_base:8192"
    every = load_tokenizer("o200k_base:199998")
    assert every.encode("a longer sentence") == load_tokenizer("o200k_base").encode("a longer sentence")


@needs_ranks
@pytest.mark.parametrize("spec", ["o200k_base", "o200k_base:4096"])
def test_special_text_in_a_document_is_ordinary(spec):
    tokenizer = load_tokenizer(spec)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"


@needs_ranks
def test_unknown_ids_read_as_replacement_characters():
    tokenizer = load_tokenizer("o200k_base")
    hello = tokenizer.encode("hello")
    # 200000 is a gap inside the vocabulary, 201087 the padding of a model's, the others nonsense.
    assert tokenizer.decode([*hello, 200_000, 201_087, -1, 2**40, *hello]) == "hello" + "\ufffd" * 4 + "hello"
    assert tokenizer.decode(np.array(hello, dtype=np.uint16)) == "hello"
    half = tokenizer.encode("🦊")[:1]
    assert tokenizer.decode(half) == "\ufffd"


@needs_ranks
def test_lone_surrogates_become_replacement_characters():
    tokenizer = load_tokenizer("o200k_base:4096")
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@needs_ranks
@pytest.mark.parametrize("text", [" " * 1_500_000 + "x", "=" * 450_000, "some words\n" * 50_000])
def test_long_texts(text):
    # The first makes tiktoken's pattern matcher fail when given whole.
    tokenizer = load_tokenizer("o200k_base:4096")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_ranks
def test_cuts_in_long_texts_fall_after_lines():
    pieces = module._pieces("some words\n" * 50_000)
    assert len(pieces) == 3 and all(piece.endswith("\n") for piece in pieces)


@needs_ranks
def test_pickles_as_its_name():
    tokenizer = load_tokenizer("o200k_base:4096")
    data = pickle.dumps(tokenizer)
    assert len(data) < 200
    assert pickle.loads(data) is tokenizer  # the process that has built it once does not build it again
    load_tokenizer.cache_clear()
    rebuilt = pickle.loads(data)
    assert rebuilt == tokenizer and rebuilt.encode("again") == tokenizer.encode("again")


@needs_ranks
@pytest.mark.parametrize("cache", ["unset", "switched off", "no folder", "damaged"])
def test_ranks_from_the_package_need_no_network_and_change_no_environment(no_network, monkeypatch, tmp_path, cache):
    if cache == "unset":
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    elif cache == "switched off":
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    elif cache == "damaged":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / module._PACKAGED["o200k_base"][1]).write_bytes(b"IQ== 0\n")
    before = dict(os.environ)
    assert load_tokenizer("o200k_base:512").encode("hello")
    assert load_tokenizer("cl100k_base").vocab_size == 100_277
    assert dict(os.environ) == before


@needs_ranks
def test_the_users_cache_is_used_where_the_package_is_missing(no_network, monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / module._PACKAGED["o200k_base"][1]).write_bytes(module._packaged_ranks("o200k_base"))
    monkeypatch.setattr(module, "_packaged_ranks", lambda name: None)
    assert load_tokenizer("o200k_base:512").vocab_size == 513


def test_without_package_cache_and_network_the_error_says_what_to_install(no_network, monkeypatch):
    monkeypatch.setattr(module, "_packaged_ranks", lambda name: None)
    with pytest.raises(
        InputError, match=r"'o200k_base'.*\(ConnectionError\).*pip install bpe-openai.*TIKTOKEN_CACHE_DIR"
    ):
        load_tokenizer("o200k_base:8192")


def test_a_missing_package_carries_no_ranks(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module._packaged_ranks("o200k_base") is None


def test_an_encoding_that_no_package_carries(no_network):
    with pytest.raises(InputError, match=r"'gpt2'.*could not be downloaded.*TIKTOKEN_CACHE_DIR") as info:
        load_tokenizer("gpt2")
    assert "pip install" not in str(info.value) and "\n" not in str(info.value)


def test_a_download_with_another_hash_is_refused(no_network, monkeypatch):
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: b"IQ== 0\n")
    with pytest.raises(InputError, match="Hash mismatch"):
        load_tokenizer("r50k_base")


def test_a_download_that_hangs_is_given_up(no_network, monkeypatch):
    monkeypatch.setattr(module, "_DOWNLOAD_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"'gpt2'.*TimeoutError"):
        load_tokenizer("gpt2")
    assert time.monotonic() - start < 1.5


def test_a_download_that_works(no_network, monkeypatch, tmp_path):
    content = module._packaged_ranks("cl100k_base")
    if content is None:
        pytest.skip("the ranks come from the package bpe-openai")
    monkeypatch.setattr(module, "_packaged_ranks", lambda name: None)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda path: content)
    assert load_tokenizer("cl100k_base").eot == 100_257
    assert [p.read_bytes() for p in (tmp_path / "cache").iterdir()] == [content]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("o20k_base", "no such encoding 'o20k_base'; did you mean o200k_base"),
        ("gpt3", "did you mean gpt2"),
        ("zzz", "known: .*gpt2.*o200k_base"),
        ("", "known: "),
        ("o200k_base:", "whole number"),
        ("o200k_base:-5", "whole number"),
        ("o200k_base:8k", "whole number"),
        ("o200k_base:²", "whole number"),
    ],
)
def test_specs_that_are_no_tokenizer(spec, message):
    with pytest.raises(InputError, match=message) as info:
        load_tokenizer(spec)
    assert f"tokenizer {spec!r}" in str(info.value)


@needs_ranks
@pytest.mark.parametrize("number", ["0", "255", "199999", "99999999999"])
def test_numbers_of_ranks_out_of_range(number):
    with pytest.raises(InputError, match=rf"from 256 to 199998, got {number}"):
        load_tokenizer(f"o200k_base:{number}")
