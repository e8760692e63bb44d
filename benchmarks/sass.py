"""What the hot loop of a compiled kernel costs, read from its machine code, and what that allows on an H200.

A model of two limits: how many instructions the schedulers issue, and how many the arithmetic and logic units take,
each against the time in which the card copies as many bytes. It knows nothing of latencies.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RARE = 30
"""A branch over more instructions than this is taken to skip them as a rule."""

LANES_A_CLOCK = 132 * 4 * 32
"""Of an H200: 132 multiprocessors with four schedulers, each of which issues to 32 lanes."""
CLOCK = 1.7e9
COPIED = 4.1e12
"""Bytes a second that a copy in its memory reads and writes: measured."""
INSTRUCTIONS_A_BYTE = LANES_A_CLOCK * CLOCK / COPIED

# These take two clocks of a scheduler's unit. IMAD runs on another, as floating-point arithmetic does.
ALU = re.compile(
    r"(LOP3|IADD3|VIADD|ISETP|FSETP|SEL|FSEL|SHF|PRMT|VIMNMX3?|FMNMX|P2R|R2P|PLOP3|SGXT|LEA|IABS|MOV)\b"
)


@dataclass(frozen=True)
class Loop:
    """Instructions of a turn: of every turn, of the arithmetic and logic units among them, and of rare turns."""

    every: int
    alu: int
    rare: int

    def time(self, elements: int, probability: float) -> tuple[float, float]:
        """Instructions an element, and clocks of a lane an element, when rare ones are met with a ``probability``."""
        issued = self.every + probability * self.rare
        return issued / elements, max(issued, 2 * self.alu + probability * self.rare) / elements


def loops(cubin: bytes) -> list[Loop]:
    """The loops of a kernel, the longest first."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(_loops(listed.stdout), key=lambda loop: loop.every, reverse=True)


def _loops(listing: str) -> list[Loop]:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    branches = [
        (at, labels[target[1]])
        for at, text in enumerate(instructions)
        if (target := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)) and target[1] in labels
    ]
    found = []
    for last, first in branches:
        if first >= last:
            continue
        skipped = {
            place
            for at, target in branches
            if first <= at < target <= last and target - at > RARE
            for place in range(at + 1, target)
        }
        names = Counter(
            re.sub(r"^@!?U?P\w+\s+", "", instructions[place]).split(".")[0].split()[0]
            for place in range(first, last + 1)
            if place not in skipped
        )
        alu = sum(number for name, number in names.items() if ALU.fullmatch(name))
        found.append(Loop(names.total(), alu, len(skipped)))
    return found


def percent_of_copy(nbytes: float, clocks: float) -> float:
    """Of the copy rate, for a kernel that moves so many bytes an element in so many clocks of a lane."""
    return min(100.0, 100 * nbytes * INSTRUCTIONS_A_BYTE / clocks)
