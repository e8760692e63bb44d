"""How many instructions a compiled kernel executes in its loop, read from its machine code.

A kernel's main loop has ways for what is rare: they are left out by taking the shortest way through the loop that
passes the blocks which matter.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PREDICATE = r"(@!?U?P\w+\s+)?"


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    instructions: tuple[str, ...]
    successors: tuple[int, ...]

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return sum(re.search(pattern, instruction) is not None for instruction in self.instructions)


def cuobjdump() -> str:
    """The disassembler, of the CUDA toolkit or else the one that Triton brings along."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=folder)
    if found is None:
        raise SystemExit("cuobjdump was found neither on PATH nor in triton")
    return found


def printed(*options: str) -> str:
    """What the disassembler prints."""
    return subprocess.run([cuobjdump(), *options], capture_output=True, text=True, check=True).stdout


def kernels(compiled: Path, architecture: int) -> Iterator[tuple[str, dict[int, Block]]]:
    """Mangled name and blocks, by address, of each kernel in a module, an object file or a cubin."""
    for part in printed("-sass", "-arch", f"sm_{architecture}", str(compiled)).split("Function : ")[1:]:
        lines = re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", part)
        yield part.split("\n", 1)[0].strip(), _blocks([(int(line[1], 16), line[2]) for line in lines])


def _blocks(code: list[tuple[int, str]]) -> dict[int, Block]:
    following = {here: there for (here, _), (there, _) in itertools.pairwise(code)}
    leaders = {code[0][0]}
    for address, instruction in code:
        if (jump := _jump(instruction)) is not None:
            leaders |= {*jump[0], *([following[address]] if address in following else [])}
    blocks = {}
    starts = sorted(leaders)
    for start, end in zip(starts, [*starts[1:], code[-1][0] + 1], strict=True):
        body = [(address, instruction) for address, instruction in code if start <= address < end]
        if not body:
            continue
        address, last = body[-1]
        targets, goes_on = _jump(last) or ((), True)
        successors = [*targets, *([following[address]] if goes_on and address in following else [])]
        blocks[start] = Block(tuple(instruction for _, instruction in body), tuple(successors))
    return blocks


def _jump(instruction: str) -> tuple[tuple[int, ...], bool] | None:
    """Where a jump leads, and whether the next instruction may follow instead. None if it is no jump."""
    found = re.match(PREDICATE + r"(BRA|EXIT|RET)\b(.*)", instruction)
    if found is None:
        return None
    conditional = bool(found[1]) or bool(re.match(r"\S*\s+(!?U?P|UR)\d", found[3]))  # UR: if lanes went apart
    targets = re.findall(r"0x([0-9a-f]+)", found[3])
    return (int(targets[-1], 16),) if found[2] == "BRA" and targets else (), conditional


def loops(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """The blocks of each loop, by its first."""
    seen: dict[int, bool] = {}  # whether all that follows is done
    back: list[tuple[int, int]] = []
    first = min(blocks)
    stack = [(first, iter(blocks[first].successors))]
    seen[first] = False
    while stack:
        block, successors = stack[-1]
        for successor in successors:
            if successor not in blocks:
                continue
            if successor not in seen:
                seen[successor] = False
                stack.append((successor, iter(blocks[successor].successors)))
                break
            if not seen[successor]:
                back.append((block, successor))
        else:
            seen[block] = True
            stack.pop()
    before: dict[int, list[int]] = {}
    for number, block in blocks.items():
        for successor in block.successors:
            before.setdefault(successor, []).append(number)
    found: dict[int, set[int]] = {}
    for last, head in back:
        inside, work = {head, last}, [last]
        while work:
            if (block := work.pop()) != head:
                new = [p for p in before.get(block, []) if p not in inside]
                inside.update(new)
                work += new
        found.setdefault(head, set()).update(inside)
    return found


Matters = Callable[[list[Block], list[Block]], list[Block]]
"""Chooses what matters among the blocks of a loop, in the order of the code and without those of loops inside.

The second list has the first block of each such inner loop.
"""


HALF_RATE = (
    rf"^{PREDICATE}(LOP3|IADD3|VIADD|[IF]SETP|F?SEL|PRMT|SHF|LEA|P?LOP|PLOP3|R2P|P2R|[FVI]MNMX|VIMNMX|FMNMX)"
)
"""Integer, logical and comparing instructions: since Ampere their unit takes one of them in two cycles."""


class Executed(NamedTuple):
    """Instructions, and how many of them are of the kind that is issued at half rate."""

    instructions: int
    half_rate: int

    @property
    def slots(self) -> int:
        """What they take of the issue slots, if nothing else holds them up."""
        return max(self.instructions, 2 * self.half_rate)


def executed(blocks: dict[int, Block], matters: Matters) -> Executed:
    """One turn of the largest loop, on the shortest way through the blocks that matter."""
    found = loops(blocks)
    head = max(found, key=lambda start: sum(len(blocks[b].instructions) for b in found[start]))
    inner = {b for start, inside in found.items() if start != head and inside < found[head] for b in inside}
    outer = [blocks[b] for b in sorted(found[head] - inner)]
    heads = [blocks[start] for start in sorted(found) if start in inner]
    chosen = {id(block) for block in matters(outer, heads)}
    must = [b for b in sorted(found[head]) if id(blocks[b]) in chosen]
    stops = [head, *(b for b in must if b != head), head]
    way = [block for a, b in itertools.pairwise(stops) for block in _way(blocks, found[head], a, b)]
    return Executed(sum(len(b.instructions) for b in way), sum(b.count(HALF_RATE) for b in way))


def _way(blocks: dict[int, Block], within: set[int], start: int, end: int) -> list[Block]:
    """The blocks with the fewest instructions from one block on until another."""
    best = {start: 0}
    came_from: dict[int, int] = {}
    settled: set[int] = set()
    while True:
        open_blocks = [b for b in best if b not in settled]
        if not open_blocks:
            raise ValueError(f"no way leads from {start:#x} to {end:#x}")
        block = min(open_blocks, key=best.__getitem__)
        settled.add(block)
        cost = best[block] + len(blocks[block].instructions)
        for successor in blocks[block].successors:
            if successor == end:
                way = [block]
                while way[-1] != start:
                    way.append(came_from[way[-1]])
                return [blocks[b] for b in reversed(way)]
            if successor in within and cost < best.get(successor, cost + 1):
                best[successor], came_from[successor] = cost, block
