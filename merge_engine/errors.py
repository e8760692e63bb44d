"""Errors that the user can fix, one class for each place to look.

Each problem is one line that names the file, tensor or key, the value found, and the way out. The command line prints
these lines alone; Python users catch ``MergeError``.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from merge_engine.text import printable


class MergeError(ValueError):
    """Base of every error that merge_engine raises on purpose.

    It is a ``ValueError``, because that is what callers of other merging tools expect.

    ``problems`` holds every reason found, one line each; ``str(error)`` joins them by line feeds. Names come from the
    files of others and may hold anything, so what is not printable in a problem is escaped (see ``text.printable``).
    """

    def __init__(self, problems: str | Iterable[str]):
        lines = [problems] if isinstance(problems, str) else problems
        self.problems = [printable(line) for line in lines]
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles keep the problems apart."""
        return type(self), (self.problems,), self.__dict__


class OptionError(MergeError):
    """An argument of a call, or an option of the command line, has a value that it cannot take."""


class RecipeError(MergeError):
    """The recipe is malformed, misspelt, out of range or incomplete."""


class CheckpointError(MergeError):
    """An input checkpoint is missing, damaged or of an unsupported format."""


class PlanError(MergeError):
    """These inputs cannot be merged with this recipe."""


class NonFiniteError(MergeError):
    """An input or a merged value is NaN or infinite, and the recipe does not allow it."""


class ManifestError(MergeError):
    """The folder holds no finished merge, or the manifest in it is damaged or of another format."""


class ReportError(MergeError):
    """The merge has no task vectors, or matplotlib is not installed."""


class SearchError(MergeError):
    """A search cannot go on: its scorer failed, its storage holds another search, or Optuna is not installed."""


class OutputError(MergeError):
    """The output cannot be written: folder in use, disk full, write failed."""


class BackendError(MergeError):
    """The requested backend is not installed or cannot be used here."""


class BackendChoiceError(BackendError, OptionError):
    """There is no such backend or device, or the two do not go together."""


class ClusterError(MergeError):
    """The Ray cluster is not there, its nodes cannot do the merge, or all of them were lost."""


class NoDeviceError(BackendError):
    """A backend has no device here: there is none, its driver is missing, or the native code was built without it."""


class NotBuiltError(NoDeviceError):
    """The native code for a device was not built."""


class DeviceMemoryError(BackendError):
    """The device has too little free memory. A smaller memory budget may fit."""


_WAYS_OUT = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another place",
    errno.EEXIST: "it is in the way: move it away",
    errno.EISDIR: "a file needs this name: move the folder away",
    errno.ENOTDIR: "a folder needs this name: move the file away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOMEM: "a smaller --memory needs less",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def way_out(error: OSError) -> str:
    """What the user can do about an error of the system, as the end of a message; empty if nobody knows."""
    way = _WAYS_OUT.get(error.errno or 0, "")
    return way and f"; {way}"
