"""Nodes whose gradients are checked: what moves, selects and resamples values, and what runs bodies."""

import numpy as np

from tests.torch_graph.gradient_cases import case, spread

SHAPES = {
    "Reshape": [
        case("y = Reshape(x0, s)", (2, 3, 2), s=[0, -1]),
        case("y = Reshape <allowzero = 1> (x0, s)", (2, 3, 2), s=[3, 4]),
    ],
    "Flatten": [
        case("y = Flatten(x0)", (2, 3, 2)),
        case("y = Flatten <axis = 0> (x0)", (2, 3)),
        case("y = Flatten <axis = -1> (x0)", (2, 3, 2)),
    ],
    "Squeeze": [
        case("y = Squeeze(x0, a)", (1, 3, 1, 2), a=[0, -2]),
        case("y = Squeeze(x0)", (1, 3, 1, 2)),
        case("y = Squeeze <axes = [2]> (x0)", (1, 3, 1, 2), opset=12),
    ],
    "Unsqueeze": [
        case("y = Unsqueeze(x0, a)", (3, 2), a=[-1, 0]),
        case("y = Unsqueeze <axes = [0, 3]> (x0)", (3, 2), opset=12),
    ],
    "Transpose": [case("y = Transpose <perm = [2, 0, 1]> (x0)", (2, 3, 2)), case("y = Transpose(x0)", (2, 3, 2))],
    "Concat": [
        case("y = Concat <axis = -1> (x0, x1, x2)", (2, 1), (2, 3), (2, 2)),
        case("y = Concat <axis = 0> (x0, x1, x0)", (2,), (1,)),
    ],
    "Split": [
        case("y, z = Split <axis = 1> (x0, s)", (2, 5), s=[2, 3]),
        case("y, z, w = Split <num_outputs = 3> (x0)", (5, 2)),
        case("y, z = Split <axis = -1, split = [1, 2]> (x0)", (2, 3), opset=12),
        case("y, z = Split(x0)", (4, 2), opset=12),
    ],
    "Expand": [case("y = Expand(x0, s)", (3, 1), s=[2, 1, 4]), case("y = Expand(x0, s)", (), s=[2, 2])],
    "Tile": [case("y = Tile(x0, r)", (2, 3), r=[2, 3])],
    # The limit says how many there are.
    "Range": [case("y = Range(x0, limit, x1)", np.array(0.3), np.array(0.7), limit=3.0)],
    "Trilu": [
        case("y = Trilu(x0)", (2, 3, 3)),
        case("y = Trilu(x0, k)", (3, 4), k=1),
        case("y = Trilu <upper = 0> (x0, k)", (3, 4), k=-1),
    ],
    "DepthToSpace": [
        case("y = DepthToSpace <blocksize = 2> (x0)", (1, 8, 1, 2)),
        case('y = DepthToSpace <blocksize = 2, mode = "CRD"> (x0)', (1, 8, 1, 2)),
    ],
    "SpaceToDepth": [
        case("y = SpaceToDepth <blocksize = 2> (x0)", (1, 2, 2, 4)),
        case('y = SpaceToDepth <blocksize = 2, mode = "CRD"> (x0)', (1, 2, 2, 4)),
    ],
    "Pad": [
        case("y = Pad(x0, p, x1)", (2, 3), (), p=[1, 0, 0, 2]),
        case("y = Pad(x0, p, x1, a)", (2, 3, 2), (1,), p=[-1, 1, 2, -1], a=[1, -1]),
        case("y = Pad(x0, p)", (2, 3), p=[0, 1, 1, 0]),
        case('y = Pad <mode = "reflect"> (x0, p)', (2, 4), p=[0, 2, 1, 3]),
        case('y = Pad <mode = "edge"> (x0, p, , a)', (2, 3), p=[2, 1], a=[1]),
        case('y = Pad <mode = "wrap"> (x0, p)', (2, 3), p=[1, 2, 0, 4]),
        case("y = Pad <pads = [0, 1, 2, -1], value = 1.5> (x0)", (2, 3), opset=10),
        case('y = Pad <pads = [0, 1, 1, 2], mode = "reflect"> (x0)', (2, 3), opset=10),
    ],
    "CenterCropPad": [
        case("y = CenterCropPad(x0, s)", (5, 2), s=[2, 5]),
        case("y = CenterCropPad <axes = [-1]> (x0, s)", (2, 4), s=[3]),
    ],
    "OneHot": [
        case("y = OneHot(i, depth, x0)", (2,), i=[[0, 2], [-1, 9]], depth=3),
        case("y = OneHot <axis = 0> (i, depth, x0)", (2,), i=[0, 1], depth=[3]),
    ],
}

REDUCTIONS = ("add", "mul", "max", "min")

INDEXING = {
    "Gather": [
        case("y = Gather(x0, i)", (3, 2), i=[[0, 2], [-1, 0]]),
        case("y = Gather <axis = -1> (x0, i)", (2, 3), i=np.array(1, np.int32)),
        case("y = Gather <axis = 1> (x0, i)", (2, 3, 2), i=[1, 1, -3]),
    ],
    "GatherElements": [
        case("y = GatherElements(x0, i)", (3, 2), i=[[0, -1], [0, 1]]),
        case("y = GatherElements <axis = 1> (x0, i)", (2, 3), i=[[0, 0, 2], [-1, 1, 1]]),
    ],
    "GatherND": [
        case("y = GatherND(x0, i)", (2, 3), i=[[0, 1], [1, -1], [0, 1]]),
        case("y = GatherND(x0, i)", (2, 3, 2), i=[[[1]], [[1]]]),
        case("y = GatherND <batch_dims = 1> (x0, i)", (2, 3, 2), i=[[[1], [0]], [[-1], [-1]]]),
    ],
    "Scatter": [case("y = Scatter <axis = 1> (x0, i, x1)", (2, 3), (2, 2), opset=9, i=[[0, 2], [-2, 0]])],
    "ScatterElements": [
        case("y = ScatterElements(x0, i, x1)", (3, 2), (2, 2), i=[[0, 2], [-1, 1]]),
        *(
            case(
                f'y = ScatterElements <axis = 1, reduction = "{reduction}"> (x0, i, x1)',
                spread((2, 3), 0),
                spread((2, 3), 1) + 0.03,
                i=[[0, 2, 2], [1, -2, 1]],
            )
            for reduction in REDUCTIONS
        ),
    ],
    "ScatterND": [
        case("y = ScatterND(x0, i, x1)", (3, 2), (2, 2), i=[[2], [-3]]),
        case("y = ScatterND(x0, i, x1)", (2, 3), (2,), i=[[1, -1], [0, 0]]),
        *(
            case(
                f'y = ScatterND <reduction = "{reduction}"> (x0, i, x1)',
                spread((2, 2, 2), 0),
                spread((3, 2), 1) + 0.03,
                i=[[0, 1], [1, 1], [0, 1]],
            )
            for reduction in REDUCTIONS
        ),
    ],
    "Slice": [
        case("y = Slice(x0, s, e)", (3, 4), s=[1, -3], e=[9, -1]),
        case("y = Slice(x0, s, e, a, t)", (2, 5), s=[4], e=[-9], a=[-1], t=[-2]),
        case("y = Slice(x0, s, e, a, t)", (4, 5), s=[0, 1], e=[4, 5], a=[0, 1], t=[3, 2]),
        case("y = Slice <starts = [1], ends = [-1], axes = [1]> (x0)", (2, 4), opset=9),
    ],
    "Compress": [
        case("y = Compress <axis = 1> (x0, c)", (2, 3), c=[True, False, True]),
        case("y = Compress(x0, c)", (2, 3), c=[False, True, True, False]),
    ],
    "ReverseSequence": [
        case("y = ReverseSequence(x0, n)", (3, 2, 2), n=[2, 3]),
        case("y = ReverseSequence <batch_axis = 0, time_axis = 1> (x0, n)", (2, 3), n=[1, 2]),
    ],
    "TensorScatter": [
        case("y = TensorScatter(x0, x1, start)", (2, 1, 4, 2), (2, 1, 2, 2), start=[0, 2]),
        case("y = TensorScatter(x0, x1)", (2, 3, 2), (2, 1, 2)),
        case('y = TensorScatter <axis = 1, mode = "circular"> (x0, x1, start)', (2, 3), (2, 2), start=[2, 1]),
    ],
}


def resize(attributes, shape, *, inputs="x0, , s", **fixed):
    return case(f"y = Resize {attributes} ({inputs})", shape, **fixed)


# Scales and the region are not differentiated: the standard says so, and sizes round.
RESIZING = {
    "Resize": [
        *(
            resize(f'<coordinate_transformation_mode = "{way}", mode = "{mode}">', (1, 3, 4), s=[1.0, 1.6, 0.7])
            for way in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric")
            for mode in ("linear", "cubic")
        ),
        *(
            resize(f'<nearest_mode = "{mode}">', (2, 4), s=[1.5, 0.6])
            for mode in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
        ),
        resize('<mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel">', (3,), s=[0.34]),
        resize('<mode = "linear", antialias = 1>', (2, 6), s=[1.0, 0.4]),
        resize('<mode = "cubic", antialias = 1, exclude_outside = 1>', (2, 6), s=[1.0, 0.5]),
        resize('<mode = "cubic", exclude_outside = 1, cubic_coeff_a = -0.5>', (5,), s=[1.7]),
        resize('<mode = "linear", axes = [1]>', (2, 4), inputs="x0, , , s", s=[7]),
        resize('<mode = "linear", keep_aspect_ratio_policy = "not_larger">', (2, 4), inputs="x0, , , s", s=[4, 6]),
        resize(
            '<mode = "linear", coordinate_transformation_mode = "tf_crop_and_resize", extrapolation_value = 2.0>',
            (3, 4),
            inputs="x0, roi, , s",
            roi=[0.1, 0.2, 0.9, 1.3],
            s=[1, 5],
        ),
        case('y = Resize <mode = "linear"> (x0, s)', (2, 4), opset=10, s=[1.5, 0.6]),
        case("y = Resize(x0, s)", (2, 4), opset=10, s=[1.5, 0.6]),
    ],
    "Upsample": [
        case('y = Upsample <mode = "linear"> (x0, s)', (2, 3), opset=9, s=[1.5, 2.0]),
        case("y = Upsample(x0, s)", (2, 3), opset=9, s=[1.0, 2.0]),
        case('y = Upsample <mode = "linear", scales = [2.0, 1.5]> (x0)', (2, 3), opset=8),
    ],
}

# Bodies read x1 from around them, and a tensor x0 that may also be one of their inputs.
BRANCHES = """y, z = If (flag) <
    then_branch = yes () => (double[2,3] a, double[2,3] b) { a = Mul(x0, x1) b = Exp(a) },
    else_branch = no () => (double[2,3] c, double[3] d) { c = Sub(x0, x1) d = Sin(x1) }
>"""
LOOP = """last, rows = Loop (n, going, x0) <
    body = step (int64 i, bool before, double[2] h) => (bool after, double[2] next, double[2] shown) {
        scaled = Mul(h, x1)
        next = Tanh(scaled)
        shown = Add(next, x0)
        size = ReduceSumSquare <keepdims = 0> (next)
        after = Greater(size, least)
    }
>"""
SCAN = """last, rows, others = Scan <num_scan_inputs = 2, scan_input_axes = [1, 0], scan_input_directions = [1, 0],
        scan_output_axes = [1, 0], scan_output_directions = [0, 1],
    body = step (double[2] h, double[2] a, double b) => (double[2] next, double[2] shown, double[2] other) {
        scaled = Mul(h, x3)
        moved = Add(scaled, a)
        next = Tanh(moved)
        shown = Mul(next, b)
        other = Sub(next, b)
    }
> (x0, x1, x2)"""

CONTROL = {
    "If": [case(BRANCHES, (2, 3), (3,), flag=flag) for flag in (True, False)],
    "Loop": [
        case(LOOP, (2,), (2,), n=3, going=True, least=0.0),
        # The body ends it.
        case(LOOP, np.array([0.5, -0.3]), np.array([0.6, -0.6]), n=9, going=True, least=0.02),
        case(LOOP.replace("(n,", "(,"), np.array([0.5, -0.3]), np.array([0.6, -0.6]), going=True, least=0.02),
    ],
    "Scan": [case(SCAN, (2,), (2, 3), (3,), (2,))],
}

TABLES = (SHAPES, INDEXING, RESIZING, CONTROL)
