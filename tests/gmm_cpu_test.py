"""Grouped matmul on CPU against a dumb float64 oracle."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cpu

# name: (M, A, B, group_E)
CASES = {
  'even': (256, 32, 48, (64, 64, 64, 64)),
  'skewed': (300, 32, 24, (3, 251, 17, 1, 28)),
  'empty_experts': (200, 16, 32, (0, 90, 0, 0, 110, 0)),
  'one_hot': (257, 24, 16, (0, 0, 257, 0)),
  'odd_rows': (331, 40, 24, (100, 131, 100)),
  'one_expert': (65, 16, 16, (65,)),
  'one_row': (1, 16, 16, (0, 1, 0)),
  'sum_below_M': (300, 16, 24, (50, 0, 99, 40)),
  'no_rows_used': (20, 8, 8, (0, 0)),
  'no_rows': (0, 8, 8, (0, 0)),
  'decode': (
    8,
    32,
    16,
    tuple(int(e in (1, 5, 6, 20, 33, 40, 41, 63)) for e in range(64)),
  ),
  'many_small': (256, 8, 8, tuple(e % 5 for e in range(128))),
  'large_tiles': (5000, 8, 16, (1, 4000, 777, 222)),
  'narrow': (90, 1, 1, (40, 0, 50)),
}
TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2, 'float64': 1e-13}
PAIRS = [(name, 'float32') for name in CASES] + [
  (name, dtype)
  for dtype in ('bfloat16', 'float64')
  for name in ('empty_experts', 'sum_below_M')
]


def draw(name, dtype='float32'):
  """x, w, dy, group as jax arrays; the rows past the groups are NaN."""
  M, A, B, group = CASES[name]
  rng = np.random.default_rng(len(name))
  x_MxA, dy_MxB = rng.normal(size=(M, A)), rng.normal(size=(M, B))
  w_ExAxB = rng.normal(size=(len(group), A, B))
  # Experts of very different scale: an absolute tolerance would hide some.
  scale_E = 10.0 ** rng.integers(-3, 4, size=len(group))
  w_ExAxB *= scale_E[:, None, None]
  x_MxA[: sum(group)] *= np.repeat(scale_E[::-1], group)[:, None]
  x_MxA[sum(group) :] = np.nan
  dy_MxB[sum(group) :] = np.nan
  cast = functools.partial(jnp.asarray, dtype=dtype)
  return cast(x_MxA), cast(w_ExAxB), cast(dy_MxB), jnp.asarray(group, jnp.int32)


def oracle(x_MxA, w_ExAxB, dy_MxB, group_E):
  """Per expert y, dx, dw in float64."""
  x_MxA, w_ExAxB, dy_MxB = (
    np.asarray(a).astype(np.float64) for a in (x_MxA, w_ExAxB, dy_MxB)
  )
  y, dx, dw, row = [], [], [], 0
  for e, size in enumerate(np.asarray(group_E)):
    x, dy = x_MxA[row : row + size], dy_MxB[row : row + size]
    y.append(x @ w_ExAxB[e])
    dx.append(dy @ w_ExAxB[e].T)
    dw.append(x.T @ dy)
    row += size
  return y, dx, dw


def by_expert(y_MxB, group_E):
  ends = np.cumsum(np.asarray(group_E))
  return np.split(np.asarray(y_MxB), ends)[:-1]


def check(got, want, tolerance):
  """Each expert's error, relative to that expert's own norm."""
  assert len(got) == len(want)
  for e, (g, w) in enumerate(zip(got, want, strict=True)):
    g = np.asarray(g).astype(np.float64)
    norm = np.linalg.norm(w)
    if norm == 0:
      assert not g.any(), f'expert {e} must be exactly zero'
    else:
      error = np.linalg.norm(g - w) / norm
      assert error <= tolerance, f'expert {e}: {error}'


def vjp(x_MxA, w_ExAxB, dy_MxB, group_E, gmm=cpu.gmm):
  y, back = jax.vjp(lambda x, w: gmm(x, w, group_E), x_MxA, w_ExAxB)
  return (y, *back(dy_MxB))


@pytest.mark.parametrize('name,dtype', PAIRS)
def test_values_and_gradients(name, dtype):
  x64 = dtype == 'float64'
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    x, w, dy, group = draw(name, dtype)
    y, dx, dw = jax.jit(vjp)(x, w, dy, group)
    for got, like in (y, dy), (dx, x), (dw, w):
      assert got.shape == like.shape and got.dtype == like.dtype
    want_y, want_dx, want_dw = oracle(x, w, dy, group)
    check(by_expert(y, group), want_y, TOLERANCE[dtype])
    check(by_expert(dx, group), want_dx, TOLERANCE[dtype])
    check(dw, want_dw, TOLERANCE[dtype])


def test_group_sizes_are_dynamic():
  x, w, dy, group = draw('skewed')
  step = jax.jit(functools.partial(vjp))
  for sizes in (group, group[::-1], group // 2, jnp.zeros_like(group)):
    y, dx, dw = step(x, w, dy, sizes)
    want_y, want_dx, want_dw = oracle(x, w, dy, sizes)
    check(by_expert(y, sizes), want_y, 1e-5)
    check(by_expert(dx, sizes), want_dx, 1e-5)
    check(dw, want_dw, 1e-5)
  assert step._cache_size() == 1


def test_random_groups():
  rng = np.random.default_rng(0)
  M, E = 700, 6
  x = jnp.asarray(rng.normal(size=(M, 8)), jnp.float32)
  dy = jnp.asarray(rng.normal(size=(M, 12)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(E, 8, 12)), jnp.float32)
  step = jax.jit(vjp)
  for _ in range(40):
    share = rng.dirichlet(np.full(E + 1, 0.3))
    group = jnp.asarray(rng.multinomial(M, share)[:E], jnp.int32)
    used = (jnp.arange(M) < group.sum())[:, None]
    xs, dys = jnp.where(used, x, jnp.nan), jnp.where(used, dy, jnp.nan)
    y, dx, dw = step(xs, w, dys, group)
    want_y, want_dx, want_dw = oracle(x, w, dy, group)
    check(by_expert(y, group), want_y, 1e-5)
    check(by_expert(dx, group), want_dx, 1e-5)
    check(dw, want_dw, 1e-5)


@pytest.mark.parametrize('remat', [False, True])
def test_inside_scan_jit_grad(remat):
  rng = np.random.default_rng(1)
  layers, M, A, group = 3, 120, 16, jnp.asarray((50, 0, 70), jnp.int32)
  x = jnp.asarray(rng.normal(size=(M, A)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(layers, 3, A, A)) / 4, jnp.float32)

  def dense(x, w, group):
    ends = np.cumsum(np.asarray(group))
    return jnp.concatenate(
      [r @ w[e] for e, r in enumerate(jnp.split(x, ends)[:-1])]
    )

  def loss(x, w, gmm):
    def layer(h, w):
      return h + jnp.tanh(gmm(h, w, group)), None

    layer = jax.checkpoint(layer) if remat else layer
    return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)

  got = jax.jit(jax.grad(lambda x, w: loss(x, w, cpu.gmm), (0, 1)))(x, w)
  want = jax.grad(lambda x, w: loss(x, w, dense), (0, 1))(x, w)
  check(by_expert(got[0], group), by_expert(want[0], group), 1e-5)
  for layer in range(layers):
    check(got[1][layer], np.asarray(want[1][layer], np.float64), 1e-5)


@pytest.mark.parametrize('axes', [(0, 0, 0, 0), (0, None, 0, None)])
def test_vmap(axes):
  x, w, dy, group = draw('skewed')
  two = [
    jnp.stack([a, a[::-1]]) if axis == 0 else a
    for a, axis in zip((x, w, dy, group), axes, strict=True)
  ]
  got = jax.jit(jax.vmap(vjp, in_axes=axes))(*two)
  for i in range(2):
    one = [a[i] if axis == 0 else a for a, axis in zip(two, axes, strict=True)]
    want_y, want_dx, want_dw = oracle(*one)
    check(by_expert(got[0][i], one[3]), want_y, 1e-5)
    check(by_expert(got[1][i], one[3]), want_dx, 1e-5)
    check(got[2][i], want_dw, 1e-5)


def test_checked_shard_map_sums_the_gradient_of_a_replicated_weight():
  P = jax.sharding.PartitionSpec
  devices = jax.devices()
  mesh = jax.sharding.Mesh(devices, ('data',))
  x, w, dy, group = draw('skewed')
  x, dy, group = (jnp.stack([a] * len(devices)) for a in (x, dy, group))

  def local(x, w, dy, group):
    y, dx, dw = vjp(x[0], w, dy[0], group[0])
    return y[None], dx[None], dw

  y, dx, dw = jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(P('data'), P(), P('data'), P('data')),
      out_specs=(P('data'), P('data'), P()),
    )
  )(x, w, dy, group)
  want_y, want_dx, want_dw = oracle(x[0], w, dy[0], group[0])
  for d in range(len(devices)):
    check(by_expert(y[d], group[d]), want_y, 1e-5)
    check(by_expert(dx[d], group[d]), want_dx, 1e-5)
  check(dw, [g * len(devices) for g in want_dw], 1e-5)


def test_refuses_what_it_does_not_support():
  x, w, _, group = draw('even')
  with pytest.raises(ValueError, match='gmm wants'):
    cpu.gmm(x[:, 1:], w, group)
  with pytest.raises(ValueError, match='gmm wants'):
    cpu.gmm(x, w, group[1:])
  with pytest.raises(NotImplementedError, match='float16'):
    cpu.gmm(x.astype(jnp.float16), w.astype(jnp.float16), group)
  with pytest.raises(NotImplementedError, match='one dtype'):
    cpu.gmm(x, w.astype(jnp.bfloat16), group)
  with pytest.raises(NotImplementedError, match='int32'):
    cpu.gmm(x, w, group.astype(jnp.int16))


def test_program_size_does_not_grow_with_experts_or_rows():
  def lines(M, E):
    shapes = (
      jax.ShapeDtypeStruct((M, 8), jnp.float32),
      jax.ShapeDtypeStruct((E, 8, 8), jnp.float32),
      jax.ShapeDtypeStruct((M, 8), jnp.float32),
      jax.ShapeDtypeStruct((E,), jnp.int32),
    )
    return len(jax.jit(vjp).lower(*shapes).as_text().splitlines())

  assert lines(512, 4) == lines(32768, 256)
