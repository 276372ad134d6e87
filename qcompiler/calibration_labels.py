"""Labels of calibration rows, for training: a .npy file of integers, one for each row of the data."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from qcompiler.calibration import CalibrationData
from qcompiler.errors import CalibrationError

__all__ = ["read_labels", "with_labels"]


def with_labels(data: CalibrationData, path: str | Path) -> CalibrationData:
    """The data with the labels of its rows, in the order of its batches."""
    labels, numbers = read_labels(Path(path)), data.row_numbers
    if numbers is None:
        raise CalibrationError(f"{path}: labels go with calibration data of a file or folder, whose rows have numbers")
    if max(numbers) >= len(labels):
        raise CalibrationError(f"{path}: has {len(labels)} labels, and the calibration data has row {max(numbers)}")
    return replace(data, labels=labels[numbers])


def read_labels(path: Path) -> np.ndarray:
    """Labels int64 ``[rows]``; raises CalibrationError for a file that holds anything else."""
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(f"{path}: {error}; labels are a .npy file of integers, one for each row") from error
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        found = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, np.ndarray) else "an archive"
        raise CalibrationError(f"{path}: labels are integers, one for each row, and this is {found}")
    return labels.astype(np.int64)
