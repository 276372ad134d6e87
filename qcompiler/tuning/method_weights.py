"""What each method trains in the place of a quantized weight; the maths is in the files named after the methods."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompiler.tuning import binary, lsq, qat, ternary
from qcompiler.tuning.learned import Parameter
from qcompiler.tuning.learned_weight import PAST
from qcompiler.tuning.trained_weight import TrainedWeight

__all__ = [
    "AbsMean",
    "BinaryConnect",
    "DrawnBinaryConnect",
    "LearnedStep",
    "StraightThrough",
    "Ternary",
    "TrainedTernary",
    "Xnor",
]

# No step becomes smaller than this share of where it began.
_SMALLEST = 0.05


class StraightThrough(TrainedWeight):
    """Grids stay as they are, and weights within the cells of their codes, where the gradient passes unchanged."""

    differs = False

    def extra(self, latent: Tensor) -> dict[str, Parameter]:
        """Latents begin at the codes."""
        self.begin_at_codes(latent)
        self._keep_within(latent)
        return {}

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Fake quantization."""
        codes, scale = self.quantized(parameters)
        return qat.passing(codes * scale, parameters[self.WEIGHT])

    def slopes(self, slope: Tensor) -> Mapping[str, Tensor | None]:
        """The same as that of the value."""
        return {self.WEIGHT: self._layout.from_graph(slope).clone()}

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest codes."""
        return qat.nearest(parameters[self.WEIGHT].detach() / self.first, self.low, self.high), self.first

    def settle(self) -> None:
        """No latent goes where it could not come back from."""
        self._keep_within(self.parameters[self.WEIGHT].tensor)

    def _keep_within(self, latent: Tensor) -> None:
        place = latent / self.first
        latent.copy_(torch.maximum(torch.minimum(place, self.high + PAST), self.low - PAST).mul_(self.first))


class LearnedStep(TrainedWeight):
    """LSQ: the step is learned with the weights. It keeps the sign of the scale it begins with."""

    differs = False

    STEP = "step"

    def extra(self, latent: Tensor) -> dict[str, Parameter]:
        """The step begins where the quantized weight has it, and latents at its codes."""
        self.begin_at_codes(latent)
        step = self.first.abs()
        return {self.STEP: Parameter(step, step.clone(), kind="scale")}

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Fake quantization with gradients of both."""
        sign, step = torch.sign(self.first), parameters[self.STEP]
        kept = qat.passing(self.stored(step * sign) * sign, step)
        return lsq.learned_step(parameters[self.WEIGHT] * sign, kept, self.low, self.high, self._factor) * sign

    def slopes(self, slope: Tensor) -> Mapping[str, Tensor | None]:
        """By the equations of the paper."""
        parameters = self._tensors()
        scale = self.stored(parameters[self.STEP] * torch.sign(self.first))
        slope = self._layout.from_graph(slope)
        of_weight, of_scale = lsq.slopes(slope, parameters[self.WEIGHT], scale, self.low, self.high, self._factor)
        return {self.WEIGHT: of_weight, self.STEP: of_scale.mul_(torch.sign(self.first))}

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest codes on the grid as it is stored."""
        scale = self.stored(parameters[self.STEP].detach() * torch.sign(self.first))
        return qat.nearest(parameters[self.WEIGHT].detach() / scale, self.low, self.high), scale

    @property
    def _factor(self) -> float:
        """Of the step's slope."""
        return lsq.gradient_scale(self.start.spec.group_size, max(int(self.start.spec.format.qmax // 2), 1))

    def settle(self) -> None:
        """Steps stay positive."""
        step = self.parameters[self.STEP]
        torch.maximum(step.tensor, step.unit * _SMALLEST, out=step.tensor)


class BinaryConnect(TrainedWeight):
    """Signs times a scale that stays: the mean magnitude of a group. Latents stay within one scale."""

    def extra(self, latent: Tensor) -> dict[str, Parameter]:
        """The scale of signs is the mean magnitude, padding left out."""
        count = self._layout.grouped(torch.ones(self._layout.rows, self._layout.columns)).sum(-1, keepdim=True)
        self.first = (latent.abs().sum(-1, keepdim=True) / count).clamp(min=1e-8)
        return {}

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Signs, whose gradient passes unchanged."""
        return binary.binary_weight(parameters[self.WEIGHT] / self.first, self.drawn()) * self.first

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The signs."""
        return binary.signs_of(parameters[self.WEIGHT]), self.first

    def drawn(self) -> torch.Generator | None:
        """What draws signs at random in training."""
        return None

    def settle(self) -> None:
        """Clip latents."""
        latent = self.parameters[self.WEIGHT].tensor
        torch.maximum(torch.minimum(latent, self.first), -self.first, out=latent)


class DrawnBinaryConnect(BinaryConnect):
    """The same with signs that are drawn in training, the likelier the larger the latent."""

    def drawn(self) -> torch.Generator | None:
        """The generator."""
        return self.generator


class Xnor(BinaryConnect):
    """Signs times the mean magnitude of the latents as they are."""

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Signs times their scale, with the gradient of both."""
        return binary.xnor_weight(parameters[self.WEIGHT])

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The signs, and the mean magnitude."""
        latent = parameters[self.WEIGHT].detach()
        return binary.signs_of(latent), latent.abs().mean(-1, keepdim=True)

    def settle(self) -> None:
        """Latents are free: the gradient ends where they leave [-1, 1]."""


class Ternary(TrainedWeight):
    """TWN: codes and scales follow from the latents at every step; the gradient passes unchanged."""

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The ternary weight."""
        codes, scale = self.quantized(parameters)
        return qat.passing(codes * scale, parameters[self.WEIGHT])

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """By the rule of the paper."""
        return ternary.twn_ternary(parameters[self.WEIGHT].detach())


class AbsMean(TrainedWeight):
    """BitNet's ternary weights, with a scale for each group."""

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The ternary weight."""
        return ternary.absmean_weight(parameters[self.WEIGHT])

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The nearest codes of the mean magnitude."""
        latent = parameters[self.WEIGHT].detach()
        scale = latent.abs().mean(-1, keepdim=True).clamp(min=1e-8)
        return torch.clamp(torch.round(latent / scale), -1, 1), scale


class TrainedTernary(TrainedWeight):
    """TTQ: what large weights become, above zero and below it, is learned.

    The two levels are codes of a format of 4 or 8 bits: the larger for its range is the last code, the other the
    nearest.
    """

    UP, DOWN = "up", "down"

    def extra(self, latent: Tensor) -> dict[str, Parameter]:
        """Both levels begin at the mean magnitude of the weights that are not zero."""
        used = latent.abs() > ternary.TTQ_SHARE * latent.abs().amax(-1, keepdim=True)
        mean = (latent.abs() * used).sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp(min=1)
        mean = mean.clamp(min=1e-8)
        return {name: Parameter(mean.clone(), mean.clone(), kind="scale") for name in (self.UP, self.DOWN)}

    def trained(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The ternary weight, whose levels are those of the codes."""
        up, down, scale = self._levels(parameters)
        held = [qat.passing(code * scale, parameters[name]) for code, name in ((up, self.UP), (down, self.DOWN))]
        return ternary.trained_ternary(parameters[self.WEIGHT], *held)

    def quantized(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The codes of the levels."""
        up, down, scale = self._levels(parameters)
        signs = ternary.ttq_signs(parameters[self.WEIGHT].detach())
        return torch.where(signs > 0, up, torch.where(signs < 0, -down, torch.zeros_like(signs))), scale

    def _levels(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """How many steps up and down the levels are, and the step."""
        up, down = parameters[self.UP].detach(), parameters[self.DOWN].detach()
        high, low = self.high.clamp(min=1), (-self.low).clamp(min=1)
        scale = self.stored(torch.maximum(up / high, down / low))
        steps = [torch.minimum((level / scale).round(), end) for level, end in ((up, high), (down, low))]
        return steps[0], steps[1], scale

    def settle(self) -> None:
        """Levels stay positive."""
        for name in (self.UP, self.DOWN):
            level = self.parameters[name]
            torch.maximum(level.tensor, level.unit * _SMALLEST, out=level.tensor)
