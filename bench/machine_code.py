"""What a compiled kernel is made of, how much of it a card can hold at once, and the rules that it has to keep.

Registers, stack and instructions are read from the machine code itself: `cuobjdump` and `nvdisasm`, which Triton
brings along, for NVIDIA; the assembly text for AMD. What a card holds follows from its limits:

- NVIDIA (CUDA C++ Programming Guide, "Compute Capabilities"): 65,536 registers per multiprocessor in four quarters,
  given to a warp in steps of 256; shared memory per block in steps of 128 bytes, 1 KB of it for the system; at most 32
  (sm_86: 16, sm_89 and sm_120: 24) blocks. Tensor memory (sm_100): 512 columns.
- MI300X (AMD CDNA 3 ISA guide): a compute unit has four SIMDs, each with 512 vector registers per lane (accumulation
  registers included) given in steps of 8, at most 8 waves per SIMD; 64 KB of LDS. A wave counts as a warp here.

Nothing here measures time, and what a card could hold is no promise that a launch has that many blocks.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MINIMUM_WARPS = 8
"""Resident warps that a multiprocessor needs at least: two for each scheduler, to hide each other's waits."""


@dataclass(frozen=True)
class Card:
    """Limits of a card, per multiprocessor (AMD: compute unit).

    Attributes:
        name: of the card that the target stands for.
        multiprocessors: on the whole card.
        shared_block, shared: bytes of shared memory that one block may use, and that all share.
        tensor_op: beginning of the name of its 16-bit tensor-core instruction.
        warps, blocks: at most resident.
    """

    name: str
    multiprocessors: int
    shared_block: int
    shared: int
    tensor_op: str
    warps: int = 64
    blocks: int = 32

    @property
    def is_amd(self) -> bool:
        """Whether wave, LDS and VGPR are the words for it."""
        return self.tensor_op.startswith("v_")


KB = 1024
CARDS = {
    "sm_80": Card("A100", 108, 163 * KB, 164 * KB, "HMMA"),
    "sm_86": Card("RTX 3090", 82, 99 * KB, 100 * KB, "HMMA", warps=48, blocks=16),
    "sm_89": Card("RTX 4090", 128, 99 * KB, 100 * KB, "HMMA", warps=48, blocks=24),
    "sm_90": Card("H100", 132, 227 * KB, 228 * KB, "HGMMA"),
    "sm_100": Card("B200", 148, 227 * KB, 228 * KB, "UTCHMMA"),
    "sm_120": Card("RTX 5090", 170, 99 * KB, 100 * KB, "HMMA", warps=48, blocks=24),
    "gfx942": Card("MI300X", 304, 64 * KB, 64 * KB, "v_mfma", warps=32),
}


@dataclass(frozen=True)
class Compiled:
    """One specialisation of a kernel, compiled for one target.

    Attributes:
        arch, kernel: target and function.
        constants: its compile-time arguments that are numbers, truth values or texts.
        warps, stages: of the launch; AMD: waves.
        registers: per thread; stack: bytes per thread.
        spill_loads, spill_stores: instructions that move registers to and from memory.
        shared: bytes per block; tensor_memory: columns per block (sm_100).
        dot: element type of the operands of its matrix products, empty if it has none.
        tensor_ops: tensor-core instructions by name.
        async_copies, tma: instructions that copy to shared memory on the side: per thread, and by the copy engine.
        instructions: in all.
        atomics: the first atomic addition of floating-point numbers at each level of the code.
    """

    arch: str
    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    shared: int
    tensor_memory: int
    dot: str
    tensor_ops: dict[str, int]
    async_copies: int
    tma: int
    instructions: int
    atomics: list[str] = field(default_factory=list)

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor can hold at once."""
        return resident_blocks(CARDS[self.arch], self.warps, self.registers, self.shared, self.tensor_memory)

    @property
    def resident_warps(self) -> int:
        """Warps of those blocks."""
        return self.blocks * self.warps


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def resident_blocks(card: Card, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Blocks that a multiprocessor can hold at once, 0 if not even one.

    Args:
        card: its limits.
        warps: per block.
        registers: per thread.
        shared: bytes per block.
        tensor_memory: columns per block.
    """
    if card.is_amd:
        by_registers = 4 * min(512 // _up(max(registers, 1), 8), 8)
        used = shared
    else:
        by_registers = 4 * (16_384 // _up(max(registers, 1) * 32, 256))
        used = _up(shared + KB, 128)
    limits = [card.blocks, min(by_registers, card.warps) // warps]
    if shared > card.shared_block:
        limits.append(0)
    if used:
        limits.append(card.shared // used)
    if tensor_memory:
        limits.append(512 // tensor_memory)
    return min(limits)


_FLOAT_ATOMICS = {
    "ttir": r"tt\.atomic_rmw fadd.*|tt\.descriptor_reduce add.*tensor<[0-9x]*(?:bf16|f16|f32|f64).*",
    "ttgir": r"tt\.atomic_rmw fadd.*",
    "llir": r"atomicrmw fadd.*",
    "ptx": r"\b(?:atom|red|multimem\.red)\.[\w.:]*\badd\.[\w.]*\b(?:f16|f16x2|bf16|bf16x2|f32|f64)\b.*",
    "amdgcn": r"\b(?:(?:global|flat|buffer)_atomic_(?:pk_)?add|ds_(?:pk_)?add(?:_rtn)?)_(?:f16|bf16|f32|f64)\b.*",
}


def float_atomics(texts: Mapping[str, Any]) -> list[str]:
    """The first atomic addition of floating-point numbers in each text, by level of the code: `ttir`, `ptx`, …"""
    found = ((level, re.search(pattern, texts[level])) for level, pattern in _FLOAT_ATOMICS.items() if level in texts)
    return [f"{level}: {match[0].strip()[:100]}" for level, match in found if match]


def _dot_type(ttir: str) -> str:
    """Element type of the operands of `tl.dot`, narrowest first where there are several; empty without one."""
    types = re.findall(r"= tt\.dot(?:_scaled)? .*: tensor<[0-9x]*x(\w+)", ttir)
    return min(types, key=lambda name: int(re.sub(r"\D", "", name.split("E")[0]) or 0), default="")


def read(arch: str, kernel: str, constants: dict[str, Any], metadata: Any, code: Mapping[str, Any]) -> Compiled:
    """Read a compiled kernel.

    Args:
        arch: a key of `CARDS`.
        kernel: the function's name.
        constants: its compile-time arguments.
        metadata: Triton's, of the compiled kernel.
        code: text of every level of the code, and `cubin` as bytes.
    """
    nvidia = "cubin" in code
    return Compiled(
        arch=arch,
        kernel=kernel,
        constants={k: v for k, v in constants.items() if isinstance(v, (int, float, str))},
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        dot=_dot_type(code["ttir"]),
        atomics=float_atomics(code),
        **(_read_sass(code["cubin"]) if nvidia else _read_amdgcn(code["amdgcn"])),
    )


def _count(ops: Counter[str], *beginnings: str) -> int:
    return sum(number for op, number in ops.items() if op.startswith(beginnings))


def _read_sass(cubin: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(tool: Any, option: str) -> str:
            command = [tool.path, option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = output(knobs.nvidia.cuobjdump, "-res-usage")
        sass = output(knobs.nvidia.nvdisasm, "-c")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    # A line is `/*0a40*/  @!P0 LDG.E.64 R2, … ;`: address, perhaps a predicate, instruction.
    ops = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spill_loads": ops["LDL"],
        "spill_stores": ops["STL"],
        "tensor_ops": {op: number for op, number in sorted(ops.items()) if op.endswith("MMA")},
        "async_copies": ops["LDGSTS"],
        "tma": _count(ops, "UTMALDG", "UBLKCP"),
        "instructions": sum(ops.values()),
    }


def _read_amdgcn(text: str) -> dict[str, Any]:
    def entry(key: str) -> int:
        return int(re.search(rf"^\s*(?:- )?\.{key}:\s+(\d+)", text, re.MULTILINE)[1])

    lines = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_[a-z0-9_]+)(.*)", text, re.MULTILINE)
    ops = Counter(op for op, _ in lines)
    # `global_load_lds_dwordx4 …`, or `buffer_load_dwordx4 … lds`
    to_lds = [op for op, rest in lines if "load" in op and ("_lds" in op or re.search(r"\blds\b", rest))]
    return {
        "registers": entry("vgpr_count"),
        "stack": entry("private_segment_fixed_size"),
        "spill_loads": _count(ops, "scratch_load"),
        "spill_stores": max(_count(ops, "scratch_store"), entry("vgpr_spill_count")),
        "tensor_ops": {op: number for op, number in sorted(ops.items()) if "mfma" in op},
        "async_copies": len(to_lds),
        "tma": 0,
        "instructions": sum(ops.values()),
    }


def violations(compiled: Compiled) -> list[str]:
    """The rules that a kernel breaks, each in a few words; none for one that may be the default."""
    card, c = CARDS[compiled.arch], compiled
    found = []
    if c.stack or c.spill_loads or c.spill_stores:
        found.append(f"spills: {c.stack} bytes of stack, {c.spill_loads} loads, {c.spill_stores} stores")
    if c.shared > card.shared_block:
        found.append(f"{c.shared} bytes of shared memory, a block has {card.shared_block} on {card.name}")
    elif c.resident_warps < MINIMUM_WARPS:
        found.append(f"{c.resident_warps} resident warps, at least {MINIMUM_WARPS} are needed")
    if c.dot in ("bf16", "f16") and not any(op.startswith(card.tensor_op) for op in c.tensor_ops):
        found.append(f"a product of {c.dot} without {card.tensor_op}, found {', '.join(c.tensor_ops) or 'none'}")
    if c.dot and not card.is_amd and not (c.async_copies or c.tma):
        found.append("a product without asynchronous copies or TMA")
    return found + [f"atomic addition of floating-point numbers: {line}" for line in c.atomics]
