"""Everything that can go wrong for a reason the user can mend, one class per place to look.

Each message is one line (or one line per problem) that names the file, tensor or key, the value found,
and what to do. The command line prints the message alone; Python users catch ``MergeError``.
"""


class MergeError(Exception):
    """Base of every error that merge_engine raises on purpose."""


class OptionError(MergeError):
    """An argument of a call, or an option of the command line, has a value that it cannot take."""


class RecipeError(MergeError):
    """The recipe is malformed, misspelt, out of range or incomplete."""


class CheckpointError(MergeError):
    """An input checkpoint is missing, damaged or of an unsupported format."""


class PlanError(MergeError):
    """The inputs cannot be merged as asked. ``problems`` holds every reason found, not only the first."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


class NonFiniteError(MergeError):
    """An input holds NaN or infinity and the recipe does not allow it."""


class ReportError(MergeError):
    """There is nothing to report on, or what draws it is not installed."""


class OutputError(MergeError):
    """The output cannot be written: folder in use, disk full, write failed."""


class BackendError(MergeError):
    """The requested backend is not installed or cannot do what was asked."""


class BackendChoiceError(BackendError, OptionError):
    """There is no such backend or device, or the two do not go together."""


class NoDeviceError(BackendError):
    """There is nothing that a backend could run on: no device, no driver, or it was built without."""


class NotBuiltError(NoDeviceError):
    """The native code for a device was not built."""


class DeviceMemoryError(BackendError):
    """The device has too little free memory; less at a time may do."""
