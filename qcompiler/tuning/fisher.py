"""Fisher information: how much a model's answer hangs on the output of each of its linear layers.

To second order, the divergence of a changed model's answers from the model's own is half its Fisher information. With g
the gradient of log p(y) at a layer's output for one token, y drawn from the model's own answer p, and x what the layer
reads there, a change D of its weight costs

    1/2 E[(g^T D x)^2],   which is taken apart (Martens and Grosse 2015, arXiv:1503.05671)
    H = sum |g|^2 x x^T,  G = sum g g^T:   tr(D H D^T G)

as in GuidedQuant (Kim et al. 2025, arXiv:2505.07004) and YAQA (Tseng et al. 2025, arXiv:2505.22988). An answer that is
no choice among words counts by its squared error: y is the answer and unit noise.

The first token of a text is where heads of attention look that have nothing to look for. Gradients at its keys and
values are hundreds of times as long as elsewhere, and would be all that G knows of; so none counts as more than
`_MOST` times the median of its row of data.

The model is run in PyTorch block by block: forward for all rows, then back from the answer, each block once more.
Gradients of weights are not needed. Memory holds one block and its G; what crosses between blocks goes to a `Scratch`.

Shapes: x ``[T, K]``; g ``[T, N]``; G ``[N, N]``.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from qcompiler.numerics.rows import feature_rows
from qcompiler.scratch import Scratch, return_freed
from qcompiler.segments import read_values
from qcompiler.session import Feeds
from qcompiler.statistics import OutputFacts
from qcompiler.torch_graph import TorchGraph
from qcompiler.torch_graph.dtypes import as_numpy, from_numpy
from qcompiler.torch_graph.threads import torch_threads
from qcompiler.tuning.rounding import fast_bfloat16

if TYPE_CHECKING:
    from qcompiler.graph import Site
    from qcompiler.segments import Segment

__all__ = ["fisher_information"]

# Squared length of a gradient, in medians of its row.
_MOST = 10.0
# Tokens whose chances of all words are held at a time.
_TOKENS = 64
# Rows after which freed memory is given back.
_ROWS = 8

_Values = dict[str, Tensor]


def fisher_information(
    model: ir.Model,
    blocks: "Sequence[Segment]",
    rows: Sequence[Feeds],
    masks: Sequence[np.ndarray | None],
    scratch: Scratch,
    *,
    seed: int,
    threads: int,
    draws: int,
    tick: Callable[[int, int], None],
) -> Iterator[tuple["Site", OutputFacts]]:
    """Measure the outputs of the linear sites of all blocks, but for a head that chooses among words.

    Args:
        model: The model.
        blocks: In order, the last one up to the answer; PyTorch has to know their operators.
        rows: Feeds of the whole model, as many at a time as fit in memory.
        masks: Which tokens of each are no padding.
        scratch: For what crosses between blocks.
        seed: Of the answers that are drawn.
        threads: Threads of PyTorch.
        draws: Answers for each row.
        tick: Called with (blocks done, blocks).

    Yields:
        Each site, from the last block to the first, with what is known of it.
    """
    total = 3 * len(blocks)
    with torch_threads(threads):
        boundary: list[Feeds] = [dict(feeds) for feeds in rows]
        behind = []
        for done, block in enumerate(blocks):
            behind.append(boundary)
            if block is not blocks[-1]:
                boundary = _advanced(model, block, boundary, scratch)
            tick(done + 1, total)
        reached = _reached(blocks)
        words = {site.node.outputs[0].name or "" for site in blocks[-1].sites if site.role == "lm_head"}
        random = [torch.Generator().manual_seed(seed * len(rows) + row) for row in range(len(rows))]
        slopes: list[Feeds] = [{} for _ in range(len(rows) * draws)]
        for done, block in enumerate(reversed(blocks)):
            back = _Back(model, block, reached, slopes, draws, scratch)
            for row, (feeds, mask) in enumerate(zip(behind.pop(), masks, strict=True)):
                if done:
                    back.run(row, {name: feeds[name] for name in back.inputs}, mask, None)
                else:  # what gives the answer may read the model's inputs
                    back.run(row, {**rows[row], **feeds}, mask, partial(_drawn, words, mask, random[row]))
                if row % _ROWS == 0:
                    return_freed()
            yield from back.found.items()
            tick(len(blocks) + 2 * (done + 1), total)


def _reached(blocks: "Sequence[Segment]") -> set[str]:
    """Names of what hangs on a site's output: nothing else has a gradient that is needed."""
    sites = {site.node for block in blocks for site in block.sites}
    names: set[str] = set()
    for block in blocks:
        for node in block.nodes:
            if node in sites or any(value.name in names for value in read_values(node)):
                names.update(value.name or "" for value in node.outputs)
    return names


def _products() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16())


def _advanced(model: ir.Model, block: "Segment", boundary: list[Feeds], scratch: Scratch) -> list[Feeds]:
    """The boundary behind a block."""
    graph = TorchGraph(block.nodes, model.opset_imports, block.outputs)
    following = []
    for feeds in boundary:
        with torch.no_grad(), _products():
            made = graph.run({name: from_numpy(feeds[name]) for name in graph.inputs})
        kept = {name: scratch.keep(as_numpy(value)) for name, value in made.items()}
        following.append({**{name: feeds[name] for name in block.carried}, **kept})
    return following


def _drawn(words: set[str], mask: np.ndarray | None, random: torch.Generator, answers: _Values) -> _Values:
    """The gradients of log p(y) at the answers, y drawn from p."""
    return {name: (_choice if name in words else _noise)(answer, mask, random) for name, answer in answers.items()}


def _choice(logits: Tensor, mask: np.ndarray | None, random: torch.Generator) -> Tensor:
    """Of a choice among words, one for each token; a few tokens at a time, since a vocabulary is large."""
    slope = torch.empty_like(logits)
    rows, slopes = logits.reshape(-1, logits.shape[-1]), slope.view(-1, logits.shape[-1])
    for start in range(0, len(rows), _TOKENS):
        chances = functional.softmax(rows[start : start + _TOKENS].float(), -1)
        words = torch.multinomial(chances, 1, generator=random)
        slopes[start : start + _TOKENS] = chances.neg_().scatter_add_(-1, words, torch.ones(words.shape))
    return _without_padding(slope, mask)


def _noise(values: Tensor, mask: np.ndarray | None, random: torch.Generator) -> Tensor:
    """Of values with unit noise, in units of their size."""
    tokens = mask is not None and values.shape[: mask.ndim] == mask.shape
    size = (values[torch.from_numpy(mask)] if tokens else values).float().square().mean().sqrt()
    return _without_padding(torch.randn(values.shape, generator=random) / (size + 1e-30), mask)


def _without_padding(values: Tensor, mask: np.ndarray | None) -> Tensor:
    """Zero where a token is padding, if there is a value for each token."""
    if mask is None or values.shape[: mask.ndim] != mask.shape:
        return values
    return values * torch.from_numpy(mask).reshape(*mask.shape, *(1,) * (values.ndim - mask.ndim))


class _Back:
    """Takes gradients from behind a block to what it reads, and sums up those at its sites.

    Attributes:
        inputs: Names of what it reads.
        found: What is known of each site.
    """

    def __init__(
        self,
        model: ir.Model,
        block: "Segment",
        reached: set[str],
        slopes: list[Feeds],
        draws: int,
        scratch: Scratch,
    ) -> None:
        """`slopes` holds the gradients of each draw of each row, which `run` moves; for `reached` see above."""
        sites = [site for site in block.sites if not site.not_linear and site.role != "lm_head"]
        self._taps = {site: site.node.outputs[0].name or "" for site in sites}
        self._outputs, self._reached = block.outputs, reached
        self._slopes, self._draws, self._scratch = slopes, draws, scratch
        # What comes before all sites still has to be followed, or there would be no gradients at the first of them.
        self._all = any(site.input.name not in reached for site in sites)
        self._graph = TorchGraph(
            block.nodes, model.opset_imports, list(dict.fromkeys([*block.outputs, *self._taps.values()]))
        )
        self.inputs = self._graph.inputs
        self.found = {site: OutputFacts(site.rows) for site in sites}

    def run(self, row: int, feeds: Feeds, mask: np.ndarray | None, draw: Callable[[_Values], _Values] | None) -> None:
        """One row; `draw` gives the gradients where the answer is, which nothing comes behind."""
        values = {name: from_numpy(feeds[name]) for name in self.inputs}
        leaves = {
            name: value.requires_grad_()
            for name, value in values.items()
            if value.is_floating_point() and (self._all or name in self._reached)
        }
        with _products():
            results = self._graph.run(values)
        lengths: dict[Site, np.ndarray] = {}
        for number in range(row * self._draws, (row + 1) * self._draws):
            if draw is not None:
                answers = {name: results[name].detach() for name in self._outputs if results[name].requires_grad}
                self._slopes[number] = {name: as_numpy(slope) for name, slope in draw(answers).items()}
            gradients = self._gradients(results, leaves, number, last=number + 1 == (row + 1) * self._draws)
            for site, gradient in zip(self._taps, gradients, strict=True):
                part = _add(self.found[site], gradient, mask)
                lengths[site] = lengths[site] + part if site in lengths else part
        for site, length in lengths.items():
            self.found[site].tokens.append(length)

    def _gradients(self, results: _Values, leaves: _Values, number: int, *, last: bool) -> list[Tensor]:
        """Those at the sites; those of what the block reads are left in the slopes."""
        slopes = self._slopes[number]
        ends = [name for name in self._outputs if name in slopes and results[name].requires_grad]
        wanted = [results[name] for name in self._taps.values()]
        sought = [each for each in wanted if each.requires_grad] + list(leaves.values())
        arriving = [self._taken(slopes, name).to(results[name].dtype) for name in ends]
        gradients = (
            torch.autograd.grad(
                [results[name] for name in ends], sought, arriving, retain_graph=not last, allow_unused=True
            )
            if sought and ends
            else [None] * len(sought)
        )
        known = {id(value): gradient for value, gradient in zip(sought, gradients, strict=True)}
        for name, leaf in leaves.items():
            gradient = known[id(leaf)]
            if gradient is not None and name in self._reached:
                total = gradient + self._taken(slopes, name) if name in slopes else gradient
                slopes[name] = self._scratch.keep(as_numpy(total))
        at_sites = [known.get(id(value)) for value in wanted]
        return [torch.zeros_like(v) if g is None else g for v, g in zip(wanted, at_sites, strict=True)]

    def _taken(self, slopes: Feeds, name: str) -> Tensor:
        """A slope, which nothing needs any more."""
        slope = slopes.pop(name)
        self._scratch.drop(slope)
        return from_numpy(slope)


def _add(facts: OutputFacts, gradient: Tensor, mask: np.ndarray | None) -> np.ndarray:
    """Add a row's gradients to G; what each token counts, float32 ``[T]``."""
    rows = torch.from_numpy(feature_rows(as_numpy(gradient.detach().float()), -1, mask))
    lengths = rows.square().sum(-1)
    heard = lengths[lengths > 0]
    if not len(heard):
        return np.zeros(len(rows), np.float32)
    limit = _MOST * heard.median()
    rows = rows * (limit / lengths.clamp(min=limit)).sqrt()[:, None]
    for place, total in enumerate(facts.sums):
        part = rows[:, place * facts.width : (place + 1) * facts.width]
        part = part.bfloat16() if fast_bfloat16() else part
        total += (part.T @ part).float().numpy()
    return np.asarray(lengths.clamp(max=limit).numpy())
