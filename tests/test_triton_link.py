"""The Triton backend's link: its copies and its end, on a stand-in for torch's streams and runtime."""

from __future__ import annotations

import contextlib
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from merge_engine.backends.triton.link import TorchLink


class Region(bytearray):
    """Memory that can be seen to die."""


class Device:
    """Notes what it is asked for, in order, and whether the host's memory is there then."""

    def __init__(self, region: Region):
        self.calls: list[tuple[Any, ...]] = []
        self.region = weakref.ref(region)
        self.lost = False

    def note(self, *call: Any) -> int:
        self.calls.append((*call, self.region() is not None))
        return 0

    def stream(self, *_: Any) -> SimpleNamespace:
        stream = SimpleNamespace()

        def synchronize() -> None:
            self.note("wait", id(stream))
            if self.lost:
                raise RuntimeError("the device is lost")

        stream.synchronize = synchronize
        return stream

    def runtime(self) -> SimpleNamespace:
        return SimpleNamespace(
            cudaError=SimpleNamespace(success=0),
            cudaHostRegister=lambda address, nbytes, flags: self.note("pin", address),
            cudaHostUnregister=lambda address: self.note("unpin", address),
        )


def link_of(region: Region, monkeypatch: pytest.MonkeyPatch) -> tuple[TorchLink, Device]:
    device = Device(region)
    for name, stand_in in {
        "memory_reserved": lambda _: 0,
        "memory_allocated": lambda _: 0,
        "mem_get_info": lambda _: (1 << 40, 1 << 40),
        "synchronize": lambda _: None,
        "Stream": device.stream,
        "cudart": device.runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: device.note("use", tensor.numel(), id(stream))
    )
    return TorchLink(8192, 0, memoryview(region), torch.device("cpu")), device


@pytest.mark.parametrize("closed", (True, False))
def test_the_end(monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    """All streams are waited for and the memory is unpinned before it goes, also if nobody closes the link."""
    region = Region(4096)
    link, device = link_of(region, monkeypatch)
    *uses, pin = device.calls
    assert len({stream for what, nbytes, stream, _ in uses if (what, nbytes) == ("use", 8192)}) == 3
    device.calls.clear()
    if closed:
        link.close()
        link.close()
    del region, link
    gc.collect()
    *waits, unpin = device.calls
    assert pin[0] == "pin" and unpin == ("unpin", pin[1], True)
    assert set(waits) == {("wait", stream, True) for _, _, stream, _ in uses}
    assert device.region() is None


def test_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any piece of the staging memory goes to any place in the device's, and is waited for; and back."""
    staging = memoryview(Region(range(256)))
    link, device = link_of(staging.obj, monkeypatch)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: device.note("wait"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    device.calls.clear()
    link.upload(staging[10:20], link.memory[4090:4100])
    assert link.piece(link.memory[4090:4100]).tolist() == list(range(10, 20))
    link.download(link.memory[4092:4096], staging[:4])
    assert list(staging[:6]) == [12, 13, 14, 15, 4, 5]
    assert device.calls == [("wait", True)] * 2
    assert link.piece(link.memory[:0]).numel() == 0


def test_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    link, device = link_of(Region(4096), monkeypatch)
    device.lost = True
    with pytest.raises(RuntimeError, match="the device is lost"):
        link.close()
    assert device.calls[-1][0] == "unpin"
