"""The errors a user can meet; each says what went wrong, where, with which figure, and what to do about it."""

__all__ = [
    "CalibrationError",
    "KernelError",
    "ModelError",
    "NumericsError",
    "OutputError",
    "PassError",
    "QCompilerError",
    "SchemeError",
]


class QCompilerError(Exception):
    """Base of every error that is the user's to mend; the command ends with `exit_code`."""

    exit_code = 1


class SchemeError(QCompilerError):
    """A scheme, option or pattern that cannot be understood (a usage error)."""

    exit_code = 2


class ModelError(QCompilerError):
    """A model file that cannot be read, is not valid, or holds values that cannot be quantized."""


class CalibrationError(QCompilerError):
    """Calibration data that is missing, empty, or does not fit the model's inputs."""


class NumericsError(QCompilerError):
    """Numbers that an algorithm cannot work with (NaN, infinity, a matrix that cannot be factored)."""


class KernelError(QCompilerError):
    """The runtime cannot run what it was asked to run."""


class PassError(QCompilerError):
    """A pass that failed, or left a model that is not legal at its stage."""


class OutputError(QCompilerError):
    """An output that cannot be written."""
