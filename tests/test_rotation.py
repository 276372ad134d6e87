"""What `rotation` does to constants, in every orientation, against a plain product in float64."""

import numpy as np
import pytest

from qcompiler.errors import NumericsError
from qcompiler.graph import read_weight
from qcompiler.numerics.hadamard import orthogonal
from qcompiler.rotation import Changes, Mix, find_streams
from qcompiler.sites import find_sites
from tests.builders import normal, parse, serialized

K, N = 12, 6
LAYOUTS = {
    "NK": lambda w: parse(f"g (float[B,{K}] x) => (float[B,{N}] y) {{ [fc] y = Gemm <transB = 1> (x, w) }}", {"w": w}),
    "KN": lambda w: parse(f"g (float[B,{K}] x) => (float[B,{N}] y) {{ [fc] y = MatMul(x, w) }}", {"w": w.T.copy()}),
    "1KN": lambda w: parse(
        f"g (float[B,S,{K}] x) => (float[B,S,{N}] y) {{ [fc] y = MatMul(x, w) }}", {"w": w.T[None].copy()}
    ),
}


def mix_of(groups, size, count, seed=0):
    """Orthogonal matrices for groups of channels in random order."""
    generator = np.random.default_rng(seed)
    index = generator.permutation(count)[: groups * size].reshape(groups, size)
    return Mix(index, np.array([orthogonal(size, generator) for _ in range(groups)]))


def dense(mix, count):
    """The matrix [K, K] that a mix stands for."""
    matrix = np.eye(count)
    for index, block in zip(mix.index, mix.matrices, strict=True):
        matrix[np.ix_(index, index)] = block
    return matrix


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_columns(layout):
    weight, gain = normal((N, K), 1), 1 + normal(K, 2).astype(np.float64)
    model = LAYOUTS[layout](weight)
    (site,) = find_sites(model)[0]
    assert site.layout == layout
    rows, columns = mix_of(1, 4, N, 3), mix_of(3, 3, K, 4)
    changes = Changes()
    changes.rows(site, rows)
    changes.columns(site, columns, gain)
    assert changes.commit() == []
    expected = dense(rows, N).T @ (weight.astype(np.float64) * gain) @ dense(columns, K)
    assert np.array_equal(read_weight(site), expected.astype(np.float32))
    # On top of what is there already.
    again = Changes()
    again.columns(site, columns)
    again.commit()
    assert np.allclose(read_weight(site), expected @ dense(columns, K), rtol=1e-4, atol=1e-5)


def test_a_long_table_in_parts():
    """9000 rows are more than two parts."""
    table = normal((9000, 4), 1)
    model = parse("g (int64[B] i) => (float[B,4] y) { [look] y = Gather(t, i) }", {"t": table})
    (site,) = find_sites(model)[0]
    mix = mix_of(1, 4, 4)
    changes = Changes()
    changes.columns(site, mix)
    changes.commit()
    assert np.array_equal(read_weight(site), (table.astype(np.float64) @ dense(mix, 4)).astype(np.float32))


def test_what_float16_cannot_hold():
    weight = np.full((N, K), 6e4, np.float16)
    model = parse(f"g (float16[B,{K}] x) => (float16[B,{N}] y) {{ [fc] y = MatMul(x, w) }}", {"w": weight.T.copy()})
    before = serialized(model)
    (site,) = find_sites(model)[0]
    changes = Changes()
    half = np.array([[1, 1], [1, -1]]) / 2**0.5
    changes.columns(site, Mix(np.arange(K).reshape(-1, 2), np.array([half] * (K // 2))))
    with pytest.raises(NumericsError, match="'fc' leaves the range of float16"):
        changes.commit()
    assert serialized(model) == before


def test_streams_of_another_size_are_refused():
    """The gain is that of half of the channels, which the runtime would refuse too."""
    text = """g (int64[B] i) => (float[B,6] y) { h = Gather(t, i) k = MatMul(h, w) m = Add(h, k)
        [norm] n = SimplifiedLayerNormalization(m, gamma) [fc] y = MatMul(n, v) }"""
    weights = {"t": normal((9, K), 1), "w": normal((K, K), 2), "gamma": normal(6, 3), "v": normal((K, N), 4)}
    (stream,) = find_streams(parse(text, weights))
    assert "has 6 channels where others have 12" in stream.reason


def test_a_stream_knows_what_belongs_to_it():
    text = f"""g (int64[B,S] i) => (float[B,S,{N}] y) {{ h = Gather(t, i) [w] k = MatMul(h, w) m = Add(h, k)
        n = SimplifiedLayerNormalization(m, gamma) [v] y = MatMul(n, v) }}"""
    weights = {"t": normal((9, K), 1), "w": normal((K, K), 2), "gamma": normal(K, 3), "v": normal((K, N), 4)}
    (stream,) = find_streams(parse(text, weights))
    assert (stream.reason, stream.size, stream.residual, stream.keep_ones) == ("", K, True, False)
    assert {value.name for value in stream.values} == {"h", "k", "m"}
    assert [site.name for site in stream.writers] == ["w"]
    assert {(reader.site.name, reader.gain is not None) for reader in stream.readers} == {("v", True), ("w", False)}
