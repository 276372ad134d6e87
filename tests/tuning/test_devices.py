"""Training elsewhere than on the CPU: no operator is given tensors of two places.

There need not be a GPU: PyTorch's `meta` device has shapes and types, and no values. Who reads some gets made-up ones.
"""

from contextlib import ExitStack, nullcontext

import pytest

from qcompiler.errors import SchemeError
from qcompiler.sites import find_sites
from tests.builders import context, decoder, quantized, run, token_batches
from tests.passes.test_tune import images, losses, network, prepared, trained

pytestmark = pytest.mark.torch


def readable(torch):
    """Gives numbers to who wants to read from the meta device."""

    class Readable(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            first = args[0] if args else None
            if isinstance(first, torch.Tensor) and first.device.type == "meta":
                name = getattr(function, "__name__", "")
                if name in ("__float__", "item"):
                    return 0.5
                if name == "__bool__":
                    return True
                if name in ("cpu", "tolist"):
                    made = torch.ones(first.shape, dtype=first.dtype, device="cpu")
                    return made if name == "cpu" else made.tolist()
            return function(*args, **(kwargs or {}))

    return Readable()


def strict(torch):
    """Refuses operators on tensors of two places, backward ones too; counts those on the meta device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Strict(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            flat = [each for value in (*args, *kwargs.values()) for each in (value if type(value) is list else [value])]
            places = {each.device.type for each in flat if isinstance(each, torch.Tensor) and each.ndim}
            moves = ("aten::copy_", "aten::_to_copy")
            assert len(places) < 2 or function.name().partition(".")[0] in moves, function.name()
            self.count += "meta" in places
            return function(*args, **kwargs)

    return Strict()


def student_of(method, scheme):
    """A student that descends in one stage or, with a language model, in several; its sites and data."""
    import torch

    from qcompiler.blocks import plan_blocks
    from qcompiler.tuning import LOSSES, METHODS, Adam, Student

    blocks, how = [], METHODS[method]
    if scheme == "w4a16-g16":
        data = token_batches(3, 2, 9, vocabulary=64)
        model = quantized(decoder(), context(scheme=scheme))
        linear = [site for site in find_sites(model)[0] if site.role != "embedding"]
        blocks = plan_blocks(model, linear, data[0], "CPUExecutionProvider")
        sites = [site for site in linear if site.role != "lm_head"]
    else:
        data = images(3)
        model, _ = prepared(scheme, data, network())
        sites = [site for site in find_sites(model)[0] if site.quantized is not None]
    return Student.of(model, sites, blocks, how, LOSSES["kl"], Adam, torch.float32, 0), data


CASES = [
    ("lsq", "w4a16-g16"),
    ("qat", "w4a4"),
    ("lsq", "w2a2"),
    ("pact", "w3a3"),
    ("binaryconnect-drawn", "w1.58a8-static"),
    ("xnor", "w1.58a8-static"),
    ("twn", "w1.58a8-static"),
    ("absmean", "w1.58a8-static"),
    ("ttq", "w4a8-static"),
]


@pytest.mark.parametrize(("method", "scheme"), CASES)
def test_everything_is_on_one_device(monkeypatch, method, scheme):
    import torch

    from qcompiler.tuning import Example, Settings, distill

    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # it has no meta device
    student, data = student_of(method, scheme)
    device = torch.device("meta")
    with ExitStack() as stack:
        student.to(device)
        stack.enter_context(readable(torch))
        guard = stack.enter_context(strict(torch))
        examples = [Example(feeds, student.answers(feeds)) for feeds in data]
        settings = Settings(steps=2, batch=2, device="meta")
        distill(student.stages, student.head, examples[:2], examples[2:], settings)
    assert guard.count > 100
    learned = [each for stage in student.stages for each in stage.weights]
    assert learned
    for each in learned:
        assert {parameter.tensor.device for parameter in each.parameters.values()} == {device}
        assert each.steps == settings.steps


def test_tensors_of_two_places_meet_on_the_device():
    import torch

    from qcompiler.torch_graph.devices import OneDevice

    far, near = torch.ones(2, 3, device="meta"), torch.ones(2, 3)
    with OneDevice(far.device):
        mixed = near + far, near + far[0, 0], torch.cat([near, far]), torch.where(near > 0, far, near)
        for found in (*mixed, far.clone().add_(near), far[near > 0]):
            assert found.device == far.device
        assert (near + near).device == near.device
        assert near.add_(far) is near  # never a copy of what is to be changed


def test_devices_that_are_not_there_are_refused(monkeypatch):
    import torch

    from qcompiler.torch_graph.devices import find_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == find_device("auto", "CUDAExecutionProvider").type == "cpu"
    with pytest.raises(SchemeError, match="no CUDA device"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto", "CUDAExecutionProvider").type == find_device("cuda").type == "cuda"
    assert find_device("auto", "CPUExecutionProvider").type == "cpu"


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16-g16"])
def test_a_gpu_learns_what_the_cpu_learns(scheme):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = {}
    for device in ("cpu", "cuda"):
        model, ctx = prepared(scheme, images())
        before, after = losses(trained(model, ctx, device=device, precision="float32"))
        found[device] = after / before, run(model, images(1)[0])[0]
    assert abs(found["cpu"][0] - found["cuda"][0]) < 0.1
