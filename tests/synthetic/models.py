"""A small causal language model, with a key-value cache and without, and a residual network with normalizations."""

import numpy as np

from tests.builders import normal, parse

VOCABULARY, WIDTH, HEADS, LONGEST = 512, 32, 2, 64


def _language_weights(sharp, seed):
    weights = {
        "table": normal((VOCABULARY, WIDTH), seed),
        "positions": normal((LONGEST, WIDTH), seed + 1, scale=0.3),
        "wh": normal((WIDTH, VOCABULARY), seed + 2, scale=sharp / WIDTH),
        "heads": np.array([HEADS, WIDTH // HEADS], np.int64),
        "width": np.array([WIDTH], np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "first": np.array([0], np.int64),
        "second": np.array([1], np.int64),
        "nothing": np.array(0, np.float32),
        "low": np.array(-1e9, np.float32),
    }
    for place, name in enumerate(("wq", "wk", "wv", "wo")):
        weights[name] = normal((WIDTH, WIDTH), seed + 3 + place, scale=WIDTH**-0.5)
    return weights


def language_model(*, cache=False, sharp=6.0, causal=True, output="logits", seed=0):
    """Ids [B, S] -> logits [B, S, V] through one block of attention, as exporters write it; the larger `sharp` is,
    the surer the model of its choice."""
    size = WIDTH // HEADS
    past = f", float[B,{HEADS},P,{size}] past_key, float[B,{HEADS},P,{size}] past_value"
    present = f", float[B,{HEADS},T,{size}] present_key, float[B,{HEADS},T,{size}] present_value"
    head = f"g (int64[B,S] input_ids, int64[B,T] attention_mask{past if cache else ''}) => "
    head += f"(float[B,S,{VOCABULARY}] {output}{present if cache else ''})"
    if cache:
        joined = "sizes = Shape <start = 2, end = 3> (past_key) start = Squeeze(sizes) "
        kept = """present_key = Concat <axis = 2> (past_key, k)
            present_value = Concat <axis = 2> (past_value, v)"""
        keys, values = "present_key", "present_value"
    else:
        joined, kept, keys, values = "start = Identity(zero)", "", "k", "v"
    masked = "LessOrEqual(row, column)" if causal else "Equal(row, row)"
    text = f"""{head} {{
        {joined}
        rows = Shape <start = 0, end = 1> (input_ids)
        lengths = Shape <start = 1, end = 2> (input_ids)
        length = Squeeze(lengths)
        end = Add(start, length)
        places = Range(start, end, one)
        [embed] words = Gather(table, input_ids)
        [place] where = Gather(positions, places)
        x = Add(words, where)
        apart = Concat <axis = 0> (rows, lengths, heads)
        [q] q0 = MatMul(x, wq) q1 = Reshape(q0, apart) q = Transpose <perm = [0, 2, 1, 3]> (q1)
        [k] k0 = MatMul(x, wk) k1 = Reshape(k0, apart) k = Transpose <perm = [0, 2, 1, 3]> (k1)
        [v] v0 = MatMul(x, wv) v1 = Reshape(v0, apart) v = Transpose <perm = [0, 2, 1, 3]> (v1)
        {kept}
        kt = Transpose <perm = [0, 1, 3, 2]> ({keys})
        scores = MatMul(q, kt)
        all = Range(zero, end, one)
        row = Unsqueeze(all, first)
        column = Unsqueeze(places, second)
        seen = {masked}
        unseen = Where(seen, nothing, low)
        heard = Add(scores, unseen)
        p = Softmax <axis = -1> (heard)
        a0 = MatMul(p, {values})
        a1 = Transpose <perm = [0, 2, 1, 3]> (a0)
        together = Concat <axis = 0> (rows, lengths, width)
        a = Reshape(a1, together)
        [o] o = MatMul(a, wo)
        h = Add(x, o)
        [head] {output} = MatMul(h, wh)
    }}"""
    model = parse(text, _language_weights(sharp, seed))
    for value in (*model.graph.inputs, *model.graph.outputs):  # the text of a graph cannot have dots in names
        for part in ("key", "value"):
            if value.name == f"past_{part}":
                value.name = f"past_key_values.0.{part}"
            elif value.name == f"present_{part}":
                value.name = f"present.0.{part}"
    return model


def pictures(count, size=12, seed=0):
    """Smooth pictures between 0 and 1, float32 [count, 3, size, size]."""
    waves = np.random.default_rng(seed).uniform(-1, 1, (count, 3, 3, 3))
    grid = np.linspace(0, np.pi, size)
    basis = np.stack([np.cos(k * grid) for k in range(3)])
    return (1 / (1 + np.exp(-2 * np.einsum("bcij,ix,jy->bcxy", waves, basis, basis)))).astype(np.float32)


def network(data, channels=8, seed=0, batch="B"):
    """A residual network whose normalizations know the statistics of `data` [N, 3, H, W]; needs torch."""
    import torch
    from torch.nn import functional

    size = data.shape[-1]
    layers = {"a": (channels, 3), "b": (channels, channels), "c": (channels, channels)}
    weights = {}

    def known(name, x):
        x = functional.conv2d(x, torch.from_numpy(weights[f"w{name}"]), padding=1)
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        weights[f"{name}_mean"], weights[f"{name}_var"] = mean.numpy(), variance.numpy()
        scale, shift = (torch.from_numpy(weights[f"{name}_{part}"]) for part in ("scale", "shift"))
        broadcast = (-1, 1, 1)
        x = (x - mean.reshape(broadcast)) / (variance.reshape(broadcast) + 1e-5).sqrt()
        return torch.relu(x * scale.reshape(broadcast) + shift.reshape(broadcast))

    for place, (name, (rows, columns)) in enumerate(layers.items()):
        weights[f"w{name}"] = normal((rows, columns, 3, 3), seed + place, scale=(9 * columns) ** -0.5)
        weights[f"{name}_scale"] = 1 + normal(rows, seed + 10 + place, scale=0.2)
        weights[f"{name}_shift"] = normal(rows, seed + 20 + place, scale=0.2)
    x = known("a", torch.from_numpy(data))
    known("c", known("b", x))
    weights["wd"] = normal((channels, 10), seed + 30)

    def layer(name, source):
        return f"""[{name}] {name}0 = Conv <pads = [1, 1, 1, 1]> ({source}, w{name})
            {name}1 = BatchNormalization({name}0, {name}_scale, {name}_shift, {name}_mean, {name}_var)
            {name}2 = Relu({name}1)"""

    text = f"""g (float[{batch},3,{size},{size}] image) => (float[{batch},10] logits) {{
        {layer("a", "image")} {layer("b", "a2")} {layer("c", "b2")}
        sum = Add(a2, c2)
        pooled = GlobalAveragePool(sum)
        flat = Flatten(pooled)
        [d] logits = MatMul(flat, wd)
    }}"""
    return parse(text, weights)
