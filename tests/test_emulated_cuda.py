"""The emulated device refuses calls that crash a real one, or that it does right only sometimes; and no others."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated_cuda.build import build_script
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_script(tmp_path_factory.mktemp("script"))


def refusal(script: Path, lines: list[str]) -> tuple[int, str] | None:
    """The line that is refused, from 1, and why."""
    done = subprocess.run([script], input="\n".join(lines), capture_output=True, text=True, check=True)
    if not done.stdout:
        return None
    line, why = done.stdout.split(": ", 1)
    return int(line), why


TWO_STREAMS = ["make_stream s", "make_stream t", "make_event e", "allocate s m"]
STREAM, EVENT = "a stream is used that was destroyed", "an event is used that was destroyed"
FREED, UNFREED = "device memory is used that was freed", "device memory is freed that was freed"
UNORDERED = "two streams use the same memory, and no event orders them"
UNPINNED = "host memory is given back that is not pinned, or not in this way"
TOO_EARLY = "pinned memory is given back before a copy of it is waited for"

REFUSED = {
    "a stream, waited for": (["make_stream s", "destroy_stream s", "wait_for_stream s"], STREAM),
    "a stream, destroyed twice": (["make_stream s", "destroy_stream s", "destroy_stream s"], STREAM),
    "a stream in place of another": (
        ["make_stream s", "destroy_stream s", "make_stream t", "allocate s m"],
        STREAM,
    ),
    "memory freed on a destroyed stream": (
        ["make_stream s", "allocate s m", "destroy_stream s", "free s m"],
        STREAM,
    ),
    "an event recorded there": (["make_stream s", "make_event e", "destroy_stream s", "record s e"], STREAM),
    "a stream held back there": ([*TWO_STREAMS, "record s e", "destroy_stream t", "wait t e"], STREAM),
    "an event, waited for": (["make_event e", "destroy_event e", "wait_for_event e"], EVENT),
    "an event, recorded": ([*TWO_STREAMS, "destroy_event e", "record s e"], EVENT),
    "an event, held back by": ([*TWO_STREAMS, "record s e", "destroy_event e", "wait t e"], EVENT),
    "an event, destroyed twice": (["make_event e", "destroy_event e", "destroy_event e"], EVENT),
    "memory freed twice": ([*TWO_STREAMS, "free s m", "free s m"], UNFREED),
    "memory never allocated": ([*TWO_STREAMS, "take_memory h", "free s h"], UNFREED),
    "memory of the host cleared": ([*TWO_STREAMS, "take_memory h", "clear s h"], FREED),
    "freed memory cleared": ([*TWO_STREAMS, "free s m", "clear s m"], FREED),
    "freed memory uploaded to": ([*TWO_STREAMS, "take_memory h", "free s m", "upload s m h"], FREED),
    "freed memory downloaded": ([*TWO_STREAMS, "take_memory h", "free s m", "download s m h"], FREED),
    "more than there is": ([*TWO_STREAMS, "clear_too_much s m"], "a copy goes beyond the memory"),
    "memory of the device for the host's": (
        [*TWO_STREAMS, "allocate s n", "upload s m n"],
        "device memory is used as host memory",
    ),
    "memory before it is there": ([*TWO_STREAMS, "clear t m"], UNORDERED),
    "two copies": (
        [*TWO_STREAMS, "wait_for_stream s", "allocate_pinned h", "upload s m h", "download t m h"],
        UNORDERED,
    ),
    "memory freed elsewhere": (
        [*TWO_STREAMS, "wait_for_stream s", "clear t m", "free s m"],
        "device memory is freed while another stream may use it",
    ),
    "memory never pinned": (["take_memory h", "unpin h"], UNPINNED),
    "memory unpinned twice": (["take_memory h", "pin h", "unpin h", "unpin h"], UNPINNED),
    "freed instead of unpinned": (["take_memory h", "pin h", "free_pinned h"], UNPINNED),
    "unpinned instead of freed": (["allocate_pinned h", "unpin h"], UNPINNED),
    "pinned twice": (["take_memory h", "pin h", "pin h"], "error"),
    "unpinned under way": (
        [*TWO_STREAMS, "take_memory h", "pin h", "upload s m h", "wait_for_stream t", "unpin h"],
        TOO_EARLY,
    ),
    "freed under way": ([*TWO_STREAMS, "allocate_pinned h", "download s m h", "free_pinned h"], TOO_EARLY),
    "freed under way on a destroyed stream": (
        [*TWO_STREAMS, "allocate_pinned h", "download s m h", "destroy_stream s", "free_pinned h"],
        TOO_EARLY,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(script: Path, name: str) -> None:
    """The last line is, and no other."""
    lines, why = REFUSED[name]
    refused = refusal(script, lines)
    assert refused is not None and refused[0] == len(lines) and why in refused[1]


ALLOWED = {
    "a destroyed stream's event": [
        *TWO_STREAMS,
        "record s e",
        "destroy_stream s",
        "wait t e",
        "free t m",
        "wait_for_event e",
    ],
    "an event destroyed while it holds back": [*TWO_STREAMS, "record s e", "wait t e", "destroy_event e"],
    "an event that was never recorded": [*TWO_STREAMS, "wait t e", "wait_for_event e"],
    "unpinned by order of the host": [
        *TWO_STREAMS,
        "allocate_pinned h",
        "download s m h",
        "record s e",
        "wait t e",
        "destroy_stream s",
        "wait_for_stream t",
        "free_pinned h",
    ],
    "memory that is not pinned": [
        *TWO_STREAMS,
        "take_memory h",
        "upload s m h",
        "download s m h",
        "free s m",
    ],
    "read by two": [
        *TWO_STREAMS,
        "allocate s n",
        "wait_for_stream s",
        "allocate_pinned h",
        "upload s m h",
        "upload t n h",
        "wait_for_stream s",
        "wait_for_stream t",
        "free_pinned h",
    ],
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(script: Path, name: str) -> None:
    assert refusal(script, ALLOWED[name]) is None


class Order:
    """What comes before what, by a graph: the nodes that lead to each."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []
        self.last: dict[str, set[int]] = {}  # of a stream, an event or the host: what it is behind

    def node(self, stream: str, *others: str) -> int:
        """A new piece of work of a stream, behind what others are behind."""
        behind = set().union(*(self.last.get(name, set()) for name in (stream, "host", *others)))
        self.before.append(behind)
        self.last[stream] = {*behind, len(self.before) - 1}
        return len(self.before) - 1


class Step(NamedTuple):
    call: str
    stream: str
    names: str  # of an event or of memory

    def touches(self) -> dict[str, bool]:
        """The memory that it uses, and whether it writes there."""
        writes = {"upload": (True, False), "download": (False, True)}.get(self.call, (True,))
        return dict(zip(self.names.split(), writes, strict=True))


STREAMS, EVENTS = st.sampled_from("stu"), st.sampled_from("ef")
COPIES = st.sampled_from(("upload", "download"))
steps = st.lists(
    st.one_of(
        st.builds(Step, st.sampled_from(("record", "wait")), STREAMS, EVENTS),
        st.builds(Step, COPIES, STREAMS, st.sampled_from(("m h", "n h", "m i", "n i"))),
        st.builds(Step, st.just("clear"), STREAMS, st.sampled_from("mn")),
        st.builds(Step, st.just("wait_for_stream"), STREAMS, st.just("")),
        st.builds(Step, st.just("wait_for_event"), st.just(""), EVENTS),
    ),
    max_size=14,
)


def first_refused(steps: list[Step]) -> int | None:
    """The first step, from 0, that uses memory without a path of the graph from each earlier use it must respect."""
    order = Order()
    uses: list[tuple[int, dict[str, bool]]] = [(order.node("s"), {name: True}) for name in "mn"]
    for place, step in enumerate(steps):
        last = order.last
        if step.call == "record":
            last[step.names] = last.get(step.stream, set()) | last.get("host", set())
        elif step.call == "wait":
            order.node(step.stream, step.names)
        elif step.call.startswith("wait_for"):
            last["host"] = last.get("host", set()) | last.get(step.stream or step.names, set())
        elif step.call == "free_pinned":
            if not {node for node, touched in uses if step.names in touched} <= last.get("host", set()):
                return place
        else:
            touches, node = step.touches(), order.node(step.stream)
            for earlier, touched in uses:
                both = touches.keys() & touched.keys()
                if any(touches[name] or touched[name] for name in both) and earlier not in order.before[node]:
                    return place
            uses.append((node, touches))
    return None


@settings(max_examples=300)
@given(
    steps=steps,
    last=st.sampled_from([Step("free", "s", "m"), Step("free", "t", "m"), Step("free_pinned", "", "h")]),
)
def test_order(script: Path, steps: list[Step], last: Step) -> None:
    """Copies and releases of memory are refused exactly where the graph of what comes before what has no path."""
    made = [f"make_stream {name}" for name in "stu"] + [f"make_event {name}" for name in "ef"]
    made += [f"allocate_pinned {name}" for name in "hi"] + [f"allocate s {name}" for name in "mn"]
    lines = [" ".join(filter(None, step)) for step in (*steps, last)]
    expected = first_refused([*steps, last])
    refused = refusal(script, [*made, *lines])
    assert (refused and refused[0] - 1 - len(made)) == expected
