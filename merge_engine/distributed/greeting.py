"""Whether the head of a Ray cluster answers at an address: asked as Ray's own clients ask, before they would wait.

Ray speaks gRPC, which is HTTP/2. One call without arguments is sent, byte by byte as RFC 9113 and RFC 7541 say, and
of the answer only its status is looked at.
"""

from __future__ import annotations

import socket
import struct
import time

from merge_engine.errors import ClusterError

_PATIENCE = 5.0
"""Seconds in which a cluster must answer. Ray itself tries for minutes."""

_METHOD = b"/ray.rpc.NodeInfoGcsService/CheckAlive"

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
"""Types of frames."""

_END_STREAM, _END_HEADERS = 1, 4
"""Flags of frames."""

_POST_HTTP = b"\x83\x86"
_STATUS_200 = b"\x88"
"""Entries of HPACK's static table."""

_NO_SUCH_METHOD = b"grpc-status\x0212"


def demand_answer(address: str) -> None:
    """Raise ``ClusterError`` unless the head of a Ray cluster answers at ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as connection:
            connection.sendall(_call())
            is_ray = _is_of_ray(_Frames(connection))
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; `ray status` on a machine of the cluster "
            "shows whether it runs"
        ) from None
    if not is_ray:
        raise ClusterError(
            f"no Ray cluster answers at {address}: something else does; check the port (6379 by default)"
        )


class _Frames:
    """The frames that come over a connection, within the patience."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._end = time.monotonic() + _PATIENCE

    def next(self) -> tuple[int, int, int, bytes]:
        """Type, flags, stream and content. Raises ``EOFError`` at the end, and ``OSError``."""
        head = self._take(9)
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        return kind, flags, stream, self._take(int.from_bytes(head[:3], "big"))

    def _take(self, nbytes: int) -> bytes:
        taken = b""
        while len(taken) < nbytes:
            self._connection.settimeout(max(self._end - time.monotonic(), 0.001))
            more = self._connection.recv(nbytes - len(taken))
            if not more:
                raise EOFError
            taken += more
        return taken


def _is_of_ray(frames: _Frames) -> bool:
    """Whether the frames answer the call. A refusal for want of a token counts: Ray itself says that better."""
    try:
        if frames.next()[0] != _SETTINGS:
            return False
        while True:
            kind, _, stream, content = frames.next()
            if kind == _HEADERS and stream == 1:
                return content.startswith(_STATUS_200) and _NO_SUCH_METHOD not in content
    except EOFError:
        return False


def _call() -> bytes:
    fields = {":path": _METHOD, ":authority": b"ray", "content-type": b"application/grpc", "te": b"trailers"}
    headers = _POST_HTTP + b"".join(_literal(name.encode(), value) for name, value in fields.items())
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(_SETTINGS, 0, 0, b"")
        + _frame(_HEADERS, _END_HEADERS, 1, headers)
        + _frame(_DATA, _END_STREAM, 1, bytes(5))  # an empty message, not compressed
    )


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack(">I", len(content))[1:] + struct.pack(">BBI", kind, flags, stream) + content


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
