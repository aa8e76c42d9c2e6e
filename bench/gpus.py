"""What the data sheets say of the cards that projections and targets speak of.

Peaks of 16-bit products are in `train/device.py`, where a run's MFU needs them. Bandwidths are those of the SXM (AMD:
OAM) form, in bytes per second; what a kernel can have of them is less and has to be measured.

Sources: NVIDIA A100 (June 2021), H100 (2023), H200 (2024) and Blackwell B200 (2024) data sheets, AMD MI300X (2023).
The B200 is that of HGX, 7.7 TB/s; DGX B200's sheet has 64 TB/s for eight. The MI300X has seven links of 64 GB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_engine.train.device import data_sheet_peak


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        name: as in tables.
        match: what its device name contains.
        memory: bytes, 10⁹ a GB.
        bandwidth: of its memory, bytes/s.
        link: to the other cards of a host, bytes/s in one direction.
    """

    name: str
    match: str
    memory: float
    bandwidth: float
    link: float

    @property
    def peak(self) -> float:
        """Dense 16-bit FLOP/s."""
        peak = data_sheet_peak(self.match)
        assert peak is not None, f"train/device.py has no peak of {self.match}"
        return peak


GPUS = {
    "a100-40gb": Gpu("A100 40 GB", "A100", 40e9, 1555e9, 300e9),
    "a100-80gb": Gpu("A100 80 GB", "A100", 80e9, 2039e9, 300e9),
    "h100": Gpu("H100 80 GB", "H100", 80e9, 3350e9, 450e9),
    "h200": Gpu("H200 141 GB", "H200", 141e9, 4800e9, 450e9),
    "b200": Gpu("B200 180 GB", "B200", 180e9, 7700e9, 900e9),
    "mi300x": Gpu("MI300X 192 GB", "MI300X", 192e9, 5300e9, 448e9),
}


def gpu_of(device_name: str, memory: float) -> Gpu | None:
    """The card of the table that a device is, by its name and its bytes; None for another one.

    A device reports a little less or more than its box says (79.2 or 85.9 · 10⁹ for 80 GB): 15 % either way is taken.
    """
    for gpu in GPUS.values():
        if gpu.match in device_name and abs(memory / gpu.memory - 1) < 0.15:
            return gpu
    return None
