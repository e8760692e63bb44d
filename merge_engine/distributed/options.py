"""What a user says of the cluster: its address, and where files lie on its nodes."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from merge_engine.errors import OptionError

AUTO, LOCAL = "auto", "local"


class PathRule(NamedTuple):
    """On ``node`` (None: on all), what lies here below ``here`` lies below ``there``."""

    node: str | None
    here: PurePosixPath
    there: PurePosixPath


@dataclass(frozen=True)
class RayOptions:
    """A cluster.

    ``address``: ``auto``, the cluster that runs on this machine; ``HOST:PORT``, another one that this machine is part
    of; ``local``, one that is started here and ends with the merge. ``paths``: for nodes that do not have the files
    under the same paths, ``"/here": "/there"`` for all nodes, or ``"NODE:/here": "/there"`` for one. See
    ``docs/ray.md``. Raises ``OptionError``.
    """

    address: str = AUTO
    paths: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.address, str) or not self.address:
            raise OptionError(f"ray: must be an address, not {reprlib.repr(self.address)}")
        if "://" in self.address:
            raise OptionError(
                f"ray: {self.address} is the address of a Ray client, which sees no files; start the merge on a "
                "machine of the cluster, with HOST:PORT or auto"
            )
        host, _, port = self.address.rpartition(":")
        if self.address not in (AUTO, LOCAL) and not (host and port.isdecimal() and int(port) < 2**16):
            raise OptionError(f"ray: must be auto, local or HOST:PORT, not {reprlib.repr(self.address)}")
        if not isinstance(self.paths, Mapping):
            raise OptionError(f"ray: paths must be a mapping, not {reprlib.repr(self.paths)}")
        if problems := [text for text in map(_problem, self.paths.items()) if text]:
            raise OptionError(problems)

    @property
    def rules(self) -> list[PathRule]:
        """The paths as rules."""
        return [_rule(*item) for item in self.paths.items()]


def ray_options(given: RayOptions | str | None) -> RayOptions:
    """The options from the argument of ``run``: an address stands for options with it. Raises ``OptionError``."""
    if isinstance(given, RayOptions):
        return given
    return RayOptions(AUTO if given is None else given)


def parse_paths(texts: Iterable[str]) -> dict[str, str]:
    """The paths of ``RayOptions`` from texts ``[NODE:]/here=/there``. Raises ``OptionError``."""
    found = {}
    for text in texts:
        here, separator, there = text.partition("=/")
        if not separator:
            raise OptionError(f"ray path {reprlib.repr(text)}: must be [NODE:]/HERE=/THERE")
        found[here] = f"/{there}"
    return found


@dataclass(frozen=True)
class NodePaths:
    """Where the files of this machine lie on one node: the rules for it, the first that fits counts."""

    rules: tuple[tuple[PurePosixPath, PurePosixPath], ...]

    @classmethod
    def of(cls, rules: Iterable[PathRule], names: Collection[str]) -> NodePaths:
        """Those of a node with these names. Its own rules count before those for all, longer paths before shorter."""
        fitting = [rule for rule in rules if rule.node is None or rule.node in names]
        fitting.sort(key=lambda rule: (rule.node is None, -len(rule.here.parts)))
        return cls(tuple((rule.here, rule.there) for rule in fitting))

    def there(self, path: Path) -> Path:
        """Where a file of this machine, with an absolute path, lies on the node."""
        for here, there in self.rules:
            if path.is_relative_to(here):
                return Path(there) / path.relative_to(here)
        return path


def unknown_nodes(rules: Iterable[PathRule], names: Collection[str]) -> list[str]:
    """A line for each rule about a node that is not among the ``names``."""
    wrong = dict.fromkeys(rule.node for rule in rules if rule.node is not None and rule.node not in names)
    known = ", ".join(sorted(names))
    return [f"ray paths: the cluster has no node {node}; it has {known}" for node in wrong]


def _rule(left: str, there: str) -> PathRule:
    node, separator, path = left.partition(":/")
    if left.startswith("/") or not separator:
        return PathRule(None, _normal(left), _normal(there))
    return PathRule(node, _normal(f"/{path}"), _normal(there))


def _normal(path: str) -> PurePosixPath:
    return PurePosixPath(os.path.normpath(path))


def _problem(item: tuple[object, object]) -> str:
    left, there = item
    if isinstance(left, str) and isinstance(there, str | os.PathLike):
        rule = _rule(left, os.fspath(there))
        if rule.here.is_absolute() and rule.there.is_absolute() and rule.node != "":
            return ""
    return (
        f"ray paths: {reprlib.repr(left)}: {reprlib.repr(there)} must be two absolute paths, "
        "the first perhaps after NODE:"
    )
