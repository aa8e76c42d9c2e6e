"""Argument checks, the table of tiles, and the choice of a tile by measuring, with a clock that the test sets."""

import json
import math
import types
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo.testing
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from moe_engine.kernels import launch
from moe_engine.kernels.launch import FLOATS, KERNELS, Tile, bucket, candidates, check, check_tensor, default_tile

GPUS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"]
TARGETS = [*GPUS, "interpreter"]
ROWS = [0, 1, 64, 65, 1000, 100_000]  # per expert: none, few, one past few, many, more than any bucket
BF16 = torch.bfloat16


@pytest.fixture
def on(monkeypatch):
    """Let launch.py believe that kernels compile for a target."""

    def choose(name):
        monkeypatch.setattr(launch, "target", lambda: name)

    return choose


# The table


@pytest.mark.parametrize("name", list(launch._TABLE))
def test_table_has_every_kernel(name):
    assert set(launch._TABLE[name]) == set(launch._FP32) == set(launch._SMALL_SHARED_MEMORY) == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", TARGETS)
def test_tiles_are_what_kernels_can_take(on, name, kernel):
    on(name)
    for dtype in FLOATS:
        for rows in ROWS:
            for tile in candidates(kernel, dtype, rows):
                sizes = [tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.num_warps]
                assert all(size == triton.next_power_of_2(size) for size in sizes)
                assert min(sizes[:3]) >= 16 and tile.num_warps >= 4 and tile.num_stages >= 1 and tile.GROUP_M >= 1
                assert tile.SUBTILES in ((1, 2, 4, 8) if kernel in ("up_forward", "down_backward") else (0,))
                # A part of the tile holds pairs (gate, up), and the narrowest block of a descriptor is 16 bytes.
                assert tile.BLOCK_N // max(tile.SUBTILES, 1) >= 16
                assert ("SUBTILES" in tile.options()) == (tile.SUBTILES > 0)
                assert not {"descriptor", "num_ctas"} & set(tile.options())


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_few_rows_take_a_smaller_tile(on, name, kernel):
    on(name)
    few, many = default_tile(kernel, BF16, 64), default_tile(kernel, BF16, 65)
    if kernel == "weight_grad":  # its rows are the depth of the product
        assert few == many
    else:
        assert few.BLOCK_M == 64 < many.BLOCK_M
        assert few._replace(BLOCK_M=many.BLOCK_M, num_warps=many.num_warps) == many


def test_target_decides(on):
    found = {}
    for name in TARGETS:
        on(name)
        found[name] = tuple(default_tile(kernel, BF16, 1000) for kernel in KERNELS)
    assert found["sm_86"] == found["sm_89"] == found["sm_120"]  # the cards with little shared memory
    assert found["gfx90a"] == found["gfx942"]
    assert len(set(found.values())) == 6
    assert any(tile.descriptor for tile in found["sm_90"]) and not any(tile.descriptor for tile in found["sm_80"])


@pytest.mark.parametrize("name", GPUS)
def test_fp32_has_tiles_of_its_own(on, name):
    on(name)
    for kernel in KERNELS:
        tile = default_tile(kernel, torch.float32, 1000)
        assert tile == launch._FP32[kernel]
        assert tile != default_tile(kernel, torch.float16, 1000) == default_tile(kernel, BF16, 1000)
    on("interpreter")
    assert default_tile("gemm", torch.float32, 1000) == launch._INTERPRETER["gemm"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", TARGETS)
def test_candidates_are_few_and_distinct_with_the_default_first(on, name, kernel):
    on(name)
    for dtype in FLOATS:
        for rows in ROWS:
            tiles = candidates(kernel, dtype, rows)
            assert 4 <= len(tiles) <= 8
            assert len(set(tiles)) == len(tiles)
            assert tiles[0] == default_tile(kernel, dtype, rows)


def test_buckets():
    assert [bucket(rows) for rows in (0, 1, 32, 33, 64, 65, 4097, 8192, 8193, 1 << 40)] == [
        *(32, 32, 32, 64, 64, 128, 8192, 8192, 8192, 8192),
    ]


def test_descriptor_only_where_alignment_allows_it():
    tile = Tile(32, 64, 16, 4, 1, descriptor=True)
    w = torch.zeros(3, 40, 24, dtype=BF16)  # rows of 48 bytes
    assert launch.weight_descriptor(w, tile, transposed=False).block_shape == [1, 16, 64]
    assert launch.weight_descriptor(w, tile, transposed=True).block_shape == [1, 64, 16]
    assert launch.weight_descriptor(w, tile._replace(descriptor=False), transposed=False) is None
    assert launch.weight_descriptor(torch.zeros(3, 40, 20, dtype=BF16), tile, transposed=False) is None  # 40 bytes
    assert launch.weight_descriptor(torch.zeros(3, 40, 20), tile, transposed=False) is not None  # 80 bytes
    single = torch.zeros(2, 40, 24, dtype=BF16)[:1].as_strided((1, 40, 24), (5, 24, 1))  # contiguous all the same
    assert launch.weight_descriptor(single, tile, transposed=False).strides == [960, 24, 1]
    shifted = torch.zeros(3 * 40 * 24 + 4, dtype=BF16)[4:].view(3, 40, 24)  # starts 8 bytes into its memory
    assert launch.weight_descriptor(shifted, tile, transposed=False) is None


# The choice by measuring


class Clock:
    """Stands in for do_bench: a launch takes as long as `times` says, by tile."""

    def __init__(self):
        self.times = {}
        self.launched = []  # every tile that was launched, in order

    def run(self, tile):
        self.launched.append(tile)
        time = self.times.get(tile, 1.0)
        if isinstance(time, Exception):
            raise time

    def do_bench(self, launch_once, **options):
        assert options == {"return_mode": "median"}
        launch_once()
        return self.times.get(self.launched[-1], 1.0)


@pytest.fixture
def clock(monkeypatch, tmp_path, on):
    on("sm_90")
    clock = Clock()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_TUNED", {})
    monkeypatch.setattr(launch, "_cache_file", lambda: tmp_path / "cache" / "tiles.json")
    monkeypatch.setattr(triton.testing, "do_bench", clock.do_bench)
    return clock


def _choose(clock, rows=1000, columns=7680, kernel="up_forward", dtype=BF16):
    return launch.choose(kernel, dtype, rows, columns, 2880, clock.run)


def _forget():
    """As in another process, which has only the file."""
    launch._TUNED.clear()


TILES = 8  # candidates of up_forward on sm_90


def test_fastest_is_chosen_and_remembered(clock):
    on_offer = candidates("up_forward", BF16, 1000)
    clock.times = {on_offer[5]: 0.25, on_offer[2]: 0.5}
    assert _choose(clock) == on_offer[5]
    assert clock.launched == on_offer and len(on_offer) == TILES
    clock.times = {on_offer[2]: 0.1}
    assert _choose(clock) == on_offer[5]
    _forget()
    assert _choose(clock) == on_offer[5]
    assert len(clock.launched) == TILES  # neither measured again


def test_the_default_wins_a_tie(clock):
    assert _choose(clock) == default_tile("up_forward", BF16, 1000)


def test_what_a_measurement_holds_for(clock):
    _choose(clock, rows=1000)
    _choose(clock, rows=513)
    _choose(clock, rows=1024)
    assert len(clock.launched) == TILES  # the same bucket of rows
    for number, other in enumerate(
        [{"rows": 1025}, {"columns": 3840}, {"dtype": torch.float16}, {"kernel": "gemm"}], start=2
    ):
        _choose(clock, **other)
        assert len(clock.launched) == number * TILES
    assert len(json.loads(launch._cache_file().read_text())) == 5  # none has pushed out another


def test_other_cards_measure_for_themselves(clock, on):
    _choose(clock)
    _forget()
    on("sm_100")
    _choose(clock)
    assert len(clock.launched) == 2 * TILES


@pytest.mark.parametrize(
    "content",
    [
        b"",  # a disk that was full
        b'{"half": [12',
        b"\xff\xfe\x00",  # not text
        b"[1, 2]",  # JSON, but not ours
        b"null",
        b'{"other": 3}',
    ],
)
def test_a_file_that_is_not_ours_is_written_anew(clock, content):
    path = launch._cache_file()
    path.parent.mkdir()
    path.write_bytes(content)
    tile = _choose(clock)
    assert len(clock.launched) == TILES
    assert list(tile) in json.loads(path.read_text()).values()
    _forget()
    assert _choose(clock) == tile and len(clock.launched) == TILES
    assert list(path.parent.iterdir()) == [path]  # no temporary file stays


@pytest.mark.parametrize("stored", [[1, 2, 3], None, 7, "tile", list(Tile(16, 16, 16, 4, 1))])
def test_a_stored_tile_that_is_not_on_offer_is_measured_again(clock, stored):
    fastest = candidates("up_forward", BF16, 1000)[3]
    clock.times = {fastest: 0.5}
    _choose(clock)
    path = launch._cache_file()
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), stored)))
    _forget()
    assert _choose(clock) == fastest
    assert len(clock.launched) == 2 * TILES
    assert list(json.loads(path.read_text()).values()) == [list(fastest)]


def test_tiles_that_do_not_fit_are_passed_over(clock):
    on_offer = candidates("up_forward", BF16, 1000)
    clock.times = dict.fromkeys(on_offer[:3], OutOfResources(300_000, 232_448, "shared memory")) | {on_offer[6]: 0.5}
    clock.times[on_offer[3]] = PTXASError("too many registers")
    assert _choose(clock) == on_offer[6]
    assert clock.launched == on_offer


def test_no_tile_fits(clock):
    clock.times = dict.fromkeys(candidates("up_forward", BF16, 1000), OutOfResources(300_000, 232_448, "shared memory"))
    with pytest.raises(RuntimeError, match=r"none of 8 tiles fits.*shared memory, Required: 300000"):
        _choose(clock)
    assert not launch._cache_file().exists()


def test_a_file_that_cannot_be_written_or_read_costs_a_measurement(clock):
    path = launch._cache_file()
    path.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"tiles are measured again next time: .*tiles.json"):
        tile = _choose(clock)
    assert _choose(clock) == tile and len(clock.launched) == TILES
    path.parent.unlink()
    path.mkdir(parents=True)  # reading it is an OSError too
    _forget()
    with pytest.warns(UserWarning, match="tiles are measured again"):
        assert _choose(clock) == tile
    assert len(clock.launched) == 2 * TILES


def test_others_may_read_the_file(clock):
    _choose(clock)
    assert launch._cache_file().stat().st_mode & 0o777 == 0o644


def test_nothing_is_measured_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _choose(clock) == default_tile("up_forward", BF16, 1000)
    assert not clock.launched


def test_other_failures_are_not_hidden(clock):
    clock.times = {candidates("up_forward", BF16, 1000)[1]: RuntimeError("illegal memory access")}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        _choose(clock)


def test_nothing_is_measured_unless_asked_for(clock, monkeypatch):
    assert launch.choose("gemm", BF16, 1000, 64, 64) == default_tile("gemm", BF16, 1000)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    assert _choose(clock) == default_tile("up_forward", BF16, 1000)
    assert not clock.launched and not launch._cache_file().exists()


def test_cache_lies_beside_tritons_own():
    assert str(launch._cache_file().parent) == triton.knobs.cache.dir


# Checks of arguments


def test_check():
    check(True, "x", "anything", 0)
    with pytest.raises(ValueError, match=r"^x: expected anything, got 0$"):
        check(False, "x", "anything", 0)


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None, (3, 4), FLOATS), "x: expected a tensor, got NoneType"),
        (([1.0], (1,), FLOATS), "x: expected a tensor, got list"),
        ((X, (3, 4, 5), FLOATS), "x: expected shape (3, 4, 5), got (3, 4)"),  # dimensions
        ((X, (3,), FLOATS), "x: expected shape (3,), got (3, 4)"),
        ((X, ("T", 5), FLOATS), "x: expected shape (T, 5), got (3, 4)"),  # a size
        ((X, ("T", "D"), torch.int32), "x: expected int32, got torch.float32"),
        ((X.double(), ("T", "D"), FLOATS), "x: expected float32 or float16 or bfloat16, got torch.float64"),
        ((X.T, ("D", "T"), FLOATS), "x: expected a contiguous tensor, got strides (1, 4)"),
        ((X, (3, 4), FLOATS, X.to("meta")), "x: expected a tensor on meta, got cpu"),
    ],
)
def test_check_tensor(arguments, message):
    with pytest.raises(ValueError) as raised:
        check_tensor("x", *arguments)
    assert str(raised.value) == message


def test_check_tensor_takes_what_fits():
    check_tensor("x", X, ("T", 4), FLOATS, X)
    check_tensor("x", X.int(), (3, "D"), torch.int32)
    check_tensor("x", X[:0], ("T", 4), FLOATS)
    check_tensor("x", torch.zeros(()), (), FLOATS)


def test_checks_leave_sizes_open_in_a_compiled_graph():
    def f(x, y):
        check_tensor("x", x, ("T", 4), FLOATS)
        check_tensor("y", y, (x.shape[0], "D"), FLOATS, x)
        return x + y

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 5, 8):
        compiled(torch.zeros(rows, 4), torch.zeros(rows, 4))
    assert counter.frame_count == 1


# What kernels run on


class NoGPU:
    """Triton's driver where it finds none."""

    def __getattr__(self, name):
        raise RuntimeError("0 active drivers ([]). There should only be one.")


def _driver(backend, arch, device):
    return types.SimpleNamespace(
        get_current_target=lambda: types.SimpleNamespace(backend=backend, arch=arch),
        get_active_torch_device=lambda: torch.device(device),
    )


@pytest.fixture
def driven(monkeypatch):
    """Let launch.py see another driver; None: the interpreter."""

    def choose(active):
        monkeypatch.setattr(launch, "INTERPRETED", active is None)
        monkeypatch.setattr(launch, "driver", types.SimpleNamespace(active=active))

    return choose


def test_target_and_whether_there_is_one(driven):
    for active, name in [
        (None, "interpreter"),
        (_driver("cuda", 90, "cuda:0"), "sm_90"),
        (_driver("cuda", 120, "cuda:0"), "sm_120"),
        (_driver("hip", "gfx942", "cuda:0"), "gfx942"),
    ]:
        driven(active)
        assert launch.available() and launch.target() == name
    driven(NoGPU())
    assert not launch.available()
    with pytest.raises(RuntimeError, match="0 active drivers"):
        launch.target()


def test_check_device(driven):
    cpu, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    driven(None)
    launch.check_device("x", cpu)
    with pytest.raises(ValueError, match=r"x: expected a CPU tensor \(TRITON_INTERPRET is set\), got meta"):
        launch.check_device("x", elsewhere)
    driven(_driver("cuda", 90, "meta"))  # a GPU's tensors cannot be made here: these stand for them
    launch.check_device("x", elsewhere)
    with pytest.raises(ValueError, match=r"x: expected a meta tensor \(or TRITON_INTERPRET=1 .*\), got cpu"):
        launch.check_device("x", cpu)
    driven(NoGPU())
    with pytest.raises(ValueError, match=r"x: expected a cuda tensor .*, got cpu"):
        launch.check_device("x", cpu)


def test_an_op_launches_on_the_device_of_its_tensors(monkeypatch):
    """Triton asks PyTorch for the current device, whatever the tensors are on."""
    current = [0]

    @contextmanager
    def device(which):
        before, current[0] = current[0], which.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)

    @launch.on_device_of_arguments
    def op(size: int, tensor: torch.Tensor | None, other: torch.Tensor) -> int:
        return current[0]

    assert op(1, None, torch.zeros(2).as_subclass(_Elsewhere)) == 3 and current == [0]
    assert op(1, None, torch.zeros(2)) == 0


class _Elsewhere(torch.Tensor):
    """A tensor that says it is on the fourth GPU."""

    device = torch.device("cuda:3")


def test_interpreted_is_what_the_kernels_are():
    assert launch.INTERPRETED or torch.cuda.is_available()
    assert launch.available()
    assert (launch.target() == "interpreter") == launch.INTERPRETED
    assert math.isfinite(launch.PARTIAL_M) and launch.PARTIAL_M % 16 == 0  # whole chunks of the column sums
