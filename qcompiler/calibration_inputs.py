"""What a model's inputs are for: whether an array fits one, and the inputs that follow from token ids alone.

Names vary between exporters, so roles are found by rule. Names are compared in lower case, without a trailing ``:0``.

- *ids*: the integer input of rank 2 whose name comes first in `ID_NAMES`; if there is none, the only integer input of
  rank 2 that has no other role.
- *mask*, *positions*, *types*: inputs of rank 2 named in `MASK_NAMES`, `POSITION_NAMES`, `TYPE_NAMES`.
- *cache*: inputs of rank 4 whose name starts with ``past`` (``past_key_values.0.key``, ``past.0.value``), but no caches
  of cross attention, whose content an encoder makes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from qcompiler.errors import CalibrationError
from qcompiler.numerics.affine import storage_dtype
from qcompiler.session import Feeds, InputSpec

__all__ = ["ID_NAMES", "MASK_NAMES", "ModelInputs", "fitted", "numpy_dtype", "row_mask"]

ID_NAMES = ("input_ids", "input", "inputs", "tokens", "token_ids", "ids")
MASK_NAMES = ("attention_mask", "input_mask", "mask")
POSITION_NAMES = ("position_ids", "positions")
TYPE_NAMES = ("token_type_ids", "segment_ids")
_ROLES = {
    **dict.fromkeys(MASK_NAMES, "mask"),
    **dict.fromkeys(POSITION_NAMES, "positions"),
    **dict.fromkeys(TYPE_NAMES, "types"),
}
_FAMILY = re.compile(r"(?P<bool>bool)|(?P<integer>u?int(8|16|32|64))|(?P<float>float(16|32|64)|bfloat16)")
# A message lists this many names; a decoder has a cache input or two for each layer.
_LISTED = 8


class ModelInputs:
    """The inputs of one model, with the role of each."""

    def __init__(
        self, specs: Sequence[InputSpec], *, head_size: int | None = None, vocabulary: int | None = None
    ) -> None:
        """Find the roles.

        Args:
            specs: The graph inputs.
            head_size: Size of an attention head, for caches whose last dimension is symbolic.
            vocabulary: Number of token ids the model knows; None leaves the upper end unchecked.
        """
        self.specs = {spec.name: spec for spec in specs}
        self.head_size = head_size
        self.vocabulary = vocabulary
        self.roles = {spec.name: _role(spec) for spec in specs}
        self.ids = self._find_ids()
        if self.ids is not None:
            self.roles[self.ids.name] = "ids"
        self.mask = next((spec for spec in specs if self.roles[spec.name] == "mask"), None)

    def _find_ids(self) -> InputSpec | None:
        matrices = [
            spec
            for spec in self.specs.values()
            if len(spec.shape) == 2 and _family(spec.dtype) == "integer" and not self.roles[spec.name]
        ]
        for name in ID_NAMES:
            for spec in matrices:
                if _plain(spec.name) == name:
                    return spec
        return matrices[0] if len(matrices) == 1 else None

    def need_ids(self, where: str) -> InputSpec:
        """The ids input, once it is sure that every other input follows from it.

        Raises:
            CalibrationError: The model has no such input, or inputs that do not follow.
        """
        if self.ids is None:
            raise CalibrationError(
                f"{where} can only be token ids, and the model has no integer input of rank 2 for them (its inputs are "
                f"{_listed(self.specs)}); give an .npz with one array for each input"
            )
        self.check_names([self.ids.name], where)
        return self.ids

    def check_names(self, names: Iterable[str], where: str) -> None:
        """Check that `names` are inputs and that every other input can be filled in.

        Raises:
            CalibrationError: An array that the model has no input for, or an input that nothing fills.
        """
        given = set(names)
        unknown = sorted(given - set(self.specs))
        if unknown:
            raise CalibrationError(
                f"{where} has {_listed(unknown)}, which the model has no input for; leave it out or rename it, "
                f"the inputs are {_listed(self.specs)}"
            )
        missing = self._unfillable(given)
        if missing:
            raise CalibrationError(
                f"{where} gives nothing for input {_listed(missing)}, and token ids alone do not determine it; "
                "give an .npz with one array for each input"
            )

    def filled_in(self, names: Iterable[str]) -> list[str]:
        """What `fill` adds to `names`, with all caches as one."""
        given = set(names)
        added = [name for name in self.specs if name not in given]
        return list(dict.fromkeys("empty caches" if self.roles[name] == "cache" else name for name in added))

    def _unfillable(self, given: set[str]) -> list[str]:
        missing = [name for name in self.specs if name not in given]
        if self.ids is None or self.ids.name not in given:
            return missing
        return [name for name in missing if not self.roles[name]]

    def _fit(self, name: str, array: np.ndarray, where: str) -> np.ndarray:
        """A contiguous copy of `array` in the input's dtype; integers stay integers and floats stay floats."""
        spec = self.specs[name]
        _check_shape(spec, array.shape, where)
        family, wanted = _family(array.dtype.name), _family(spec.dtype)
        if family != wanted and (family, wanted) != ("bool", "integer"):
            raise CalibrationError(
                f"{where}: input '{name}' takes {spec.dtype} but gets {array.dtype.name}; "
                "convert the data the way the model expects it"
            )
        with np.errstate(over="ignore"):
            fitted = np.array(array, dtype=numpy_dtype(spec), order="C")
        if wanted == "float" and not np.isfinite(fitted).all():
            raise CalibrationError(f"{where}: input '{name}' holds NaN or infinity as {spec.dtype}; remove those rows")
        if wanted == "integer" and not np.can_cast(array.dtype, fitted.dtype) and not np.array_equal(fitted, array):
            raise CalibrationError(f"{where}: input '{name}' holds integers outside {spec.dtype}; correct the data")
        if spec is self.ids:
            self._check_ids(fitted, where)
        return fitted

    def _check_ids(self, ids: np.ndarray, where: str) -> None:
        if not ids.size:
            raise CalibrationError(f"{where}: a row without a token id; drop empty rows")
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0:
            raise CalibrationError(f"{where}: token id {lowest} is negative; mask padding with attention_mask instead")
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise CalibrationError(
                f"{where}: token id {highest} is outside the model's vocabulary of {self.vocabulary}; "
                "use the model's own tokenizer"
            )

    def complete(self, feeds: Mapping[str, np.ndarray], where: str) -> Feeds:
        """Fit every array, then fill in the rest: `fit` and `fill`."""
        return self.fill(self.fit(feeds, where), where)

    def fit(self, feeds: Mapping[str, np.ndarray], where: str) -> Feeds:
        """Contiguous copies of the arrays in the inputs' dtypes.

        Args:
            feeds: Arrays for some inputs, by name.
            where: What to blame in a message.

        Raises:
            CalibrationError: Wrong rank, static dimension, dtype or values; an unknown name; an input left empty.
        """
        self.check_names(feeds, where)
        return {name: self._fit(name, np.asarray(array), where) for name, array in feeds.items()}

    def fill(self, feeds: Feeds, where: str) -> Feeds:
        """Add the inputs that follow from the ids.

        Args:
            feeds: Fitted arrays for some inputs.
            where: What to blame in a message.

        Returns:
            One array for each input: masks of ones, positions that count the unmasked tokens, types of zero
            ``[B, S]``, and caches without a token ``[B, heads, 0, head_size]``.

        Raises:
            CalibrationError: A cache whose size is not known, or an input whose static shape the filling does not have.
        """
        if self.ids is None or len(feeds) == len(self.specs):
            return feeds
        shape = feeds[self.ids.name].shape
        mask = feeds.get(self.mask.name) if self.mask else None
        filled = {
            name: feeds[name] if name in feeds else self._made(spec, shape, mask) for name, spec in self.specs.items()
        }
        for name, array in filled.items():
            _check_shape(self.specs[name], array.shape, where)
        return filled

    def _made(self, spec: InputSpec, shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray:
        role, dtype = self.roles[spec.name], numpy_dtype(spec)
        if role == "cache":
            return self._empty_cache(spec, shape[0])
        if role == "types":
            return np.zeros(shape, dtype)
        if role == "mask":
            return np.ones(shape, dtype)
        seen = np.ones(shape, np.int64) if mask is None or mask.shape != shape else mask != 0
        return np.asarray(np.maximum(np.cumsum(seen, -1) - 1, 0), dtype)

    def _empty_cache(self, spec: InputSpec, rows: int) -> np.ndarray:
        heads, length, size = spec.shape[1:]
        if not isinstance(size, int):
            size = self.head_size
        if not isinstance(heads, int) or isinstance(length, int) or size is None:
            raise CalibrationError(
                f"an empty cache for input '{spec.name}' {_shape_text(spec.shape)} needs a fixed number of heads, a "
                "dynamic length and a known head size; give an .npz with one array for each input"
            )
        return np.zeros((rows, heads, 0, size), numpy_dtype(spec))


def row_mask(feeds: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Which rows of the activations are real tokens.

    Args:
        feeds: A batch; its mask ``[B, P + S]`` may cover a cache of P tokens before the S new ones.

    Returns:
        bool ``[B, S]``, True for a token; None when there is no mask of zeros and ones, or nothing is masked.
    """
    named = {_plain(name): array for name, array in feeds.items() if array.ndim == 2}
    mask = next((named[name] for name in MASK_NAMES if name in named), None)
    if mask is None or not ((mask == 0) | (mask == 1)).all():
        return None
    ids = next((named[name] for name in ID_NAMES if name in named), mask)
    keep = np.asarray(mask[:, -ids.shape[1] :] == 1)
    return None if keep.all() or not keep.any() else keep


def fitted(feeds: Feeds, inputs: Sequence[InputSpec]) -> Feeds:
    """Feeds of one form of a model as another form takes them.

    Args:
        feeds: What the one is fed.
        inputs: The inputs of the other, which may be floats of another width, or a cache in another format.

    Returns:
        Floats are converted; what is empty, a cache before the first token, takes dtype and static sizes of the input.

    Raises:
        CalibrationError: A cache in use.
    """
    fed = dict(feeds)
    for spec in inputs:
        array = feeds.get(spec.name)
        if array is None or spec.dtype == array.dtype.name:
            continue
        if not array.size:
            sizes = [w if isinstance(w, int) else size for w, size in zip(spec.shape, array.shape, strict=True)]
            fed[spec.name] = np.zeros(sizes, numpy_dtype(spec))
        elif _family(array.dtype.name) == _family(spec.dtype) == "float":
            fed[spec.name] = array.astype(numpy_dtype(spec))
        elif _role(spec) == "cache":
            raise CalibrationError(
                f"input '{spec.name}' is a cache of {spec.dtype} in one model and of {array.dtype.name} in the other; "
                "give rows whose cache is empty"
            )
    return fed


def numpy_dtype(spec: InputSpec) -> np.dtype:
    """The input's numpy dtype.

    Raises:
        CalibrationError: The input takes something that is not numbers.
    """
    if not _family(spec.dtype):
        raise CalibrationError(
            f"input '{spec.name}' takes {spec.dtype}, which calibration cannot feed; remove it from the model"
        )
    return storage_dtype(spec.dtype)


def _role(spec: InputSpec) -> str:
    name = _plain(spec.name)
    if len(spec.shape) == 2:
        return _ROLES.get(name, "")
    cross = "encoder" in name or "cross" in name
    return "cache" if len(spec.shape) == 4 and name.startswith("past") and not cross else ""


def _plain(name: str) -> str:
    return name.lower().removesuffix(":0")


def _family(dtype: str) -> str:
    """``bool``, ``integer`` or ``float``; empty for anything else."""
    match = _FAMILY.fullmatch(dtype)
    return next((family for family, text in match.groupdict().items() if text), "") if match else ""


def _check_shape(spec: InputSpec, shape: tuple[int, ...], where: str) -> None:
    # ONNX Runtime shows an unknown rank as a scalar's, so there is nothing to hold against an empty shape.
    if not spec.shape:
        return
    told = f"{where}: input '{spec.name}' takes {_shape_text(spec.shape)} but gets {_shape_text(shape)}"
    if len(shape) != len(spec.shape):
        raise CalibrationError(
            f"{told}: rank {len(spec.shape)} expected, not {len(shape)}; add or remove an axis (the first counts rows)"
        )
    for axis, (wanted, size) in enumerate(zip(spec.shape, shape, strict=True)):
        if isinstance(wanted, int) and wanted != size:
            raise CalibrationError(f"{told}: dimension {axis} must be {wanted}, not {size}; resize the data")


def _shape_text(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _listed(names: Iterable[str]) -> str:
    names = [f"'{name}'" for name in names]
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
