"""Every grouped matmul against a dumb float64 oracle."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import ops
from pallas_kernels.shapes import CASES

# Every implementation that runs on CPU, through the doorway.
IMPLS = ('cpu', 'interpret', 'xla')
GMM = {impl: functools.partial(ops.gmm, impl=impl) for impl in IMPLS}
TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-2, 'float64': 1e-13}
FEW = ('empty_experts', 'sum_below_M')
ALL = [
  (impl, name, dtype)
  for impl in IMPLS
  for dtype in TOLERANCE
  for name in (CASES if dtype == 'float32' else FEW)
  if (impl, dtype) != ('interpret', 'float64')
]


def draw(name, dtype='float32', cases=CASES):
  """x, w, dy, group as jax arrays; the rows past the groups are NaN."""
  M, A, B, group = cases[name]
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


def vjp(x_MxA, w_ExAxB, dy_MxB, group_E, gmm=GMM['cpu']):
  y, back = jax.vjp(lambda x, w: gmm(x, w, group_E), x_MxA, w_ExAxB)
  return (y, *back(dy_MxB))


@pytest.mark.parametrize('impl,name,dtype', ALL)
def test_values_and_gradients(impl, name, dtype):
  x64 = dtype == 'float64'
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    x, w, dy, group = draw(name, dtype)
    step = jax.jit(functools.partial(vjp, gmm=GMM[impl]))
    y, dx, dw = step(x, w, dy, group)
    for got, like in (y, dy), (dx, x), (dw, w):
      assert got.shape == like.shape and got.dtype == like.dtype
    want_y, want_dx, want_dw = oracle(x, w, dy, group)
    check(by_expert(y, group), want_y, TOLERANCE[dtype])
    check(by_expert(dx, group), want_dx, TOLERANCE[dtype])
    check(dw, want_dw, TOLERANCE[dtype])


@pytest.mark.parametrize('impl', IMPLS)
def test_group_sizes_are_dynamic(impl):
  x, w, dy, group = draw('skewed')
  step = jax.jit(functools.partial(vjp, gmm=GMM[impl]))
  for sizes in (group, group[::-1], group // 2, jnp.zeros_like(group)):
    y, dx, dw = step(x, w, dy, sizes)
    want_y, want_dx, want_dw = oracle(x, w, dy, sizes)
    check(by_expert(y, sizes), want_y, 1e-5)
    check(by_expert(dx, sizes), want_dx, 1e-5)
    check(dw, want_dw, 1e-5)
  assert step._cache_size() == 1


@pytest.mark.parametrize('impl', IMPLS)
def test_random_groups(impl):
  rng = np.random.default_rng(0)
  M, E = 700, 6
  x = jnp.asarray(rng.normal(size=(M, 8)), jnp.float32)
  dy = jnp.asarray(rng.normal(size=(M, 12)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(E, 8, 12)), jnp.float32)
  step = jax.jit(functools.partial(vjp, gmm=GMM[impl]))
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


@pytest.mark.parametrize('impl', IMPLS)
@pytest.mark.parametrize('remat', [False, True])
def test_inside_scan_jit_grad(remat, impl):
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

  got = jax.jit(jax.grad(lambda x, w: loss(x, w, GMM[impl]), (0, 1)))(x, w)
  want = jax.grad(lambda x, w: loss(x, w, dense), (0, 1))(x, w)
  check(by_expert(got[0], group), by_expert(want[0], group), 1e-5)
  for layer in range(layers):
    check(got[1][layer], np.asarray(want[1][layer], np.float64), 1e-5)


@pytest.mark.parametrize('impl', ['cpu', 'interpret'])
@pytest.mark.parametrize('axes', [(0, 0, 0, 0), (0, None, 0, None)])
def test_vmap(axes, impl):
  x, w, dy, group = draw('skewed')
  two = [
    jnp.stack([a, a[::-1]]) if axis == 0 else a
    for a, axis in zip((x, w, dy, group), axes, strict=True)
  ]
  got = jax.jit(jax.vmap(functools.partial(vjp, gmm=GMM[impl]), in_axes=axes))(
    *two
  )
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


@pytest.mark.parametrize('impl', ['cpu', 'interpret'])
def test_refuses_what_it_does_not_support(impl):
  gmm = GMM[impl]
  x, w, _, group = draw('even')
  with pytest.raises(ValueError, match='gmm wants'):
    gmm(x[:, 1:], w, group)
  with pytest.raises(ValueError, match='gmm wants'):
    gmm(x, w, group[1:])
  with pytest.raises(NotImplementedError, match='float16'):
    gmm(x.astype(jnp.float16), w.astype(jnp.float16), group)
  with pytest.raises(NotImplementedError, match='one dtype'):
    gmm(x, w.astype(jnp.bfloat16), group)
  with pytest.raises(NotImplementedError, match='int32'):
    gmm(x, w, group.astype(jnp.int16))


def test_doorway_refuses_what_is_not_there():
  with pytest.raises(ValueError, match="'triton'; there are cpu, tpu"):
    ops.choose_gmm('triton')
  with pytest.raises(ValueError, match="'tpu' on cpu; 'interpret' runs"):
    ops.choose_gmm('tpu')
  assert ops.choose_gmm(None) == 'cpu'


def test_doorway_names_a_package_that_is_missing(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  for impl, package in ('tokamax', 'tokamax'), ('cpu', 'pallas_kernels'):
    with pytest.raises(ValueError, match=f'{package} is not installed'):
      ops.choose_gmm(impl)
  assert ops.choose_gmm('xla') == 'xla'


def test_xla_works_with_pallas_kernels_deleted(tmp_path):
  root = pathlib.Path(ops.__file__).parent.parent
  shutil.copytree(root / 'moe_jax', tmp_path / 'moe_jax')
  code = """
import jax.numpy as jnp
from moe_jax import ops
import sys
x, w, group = jnp.ones((5, 2)), jnp.ones((2, 2, 3)), jnp.array([2, 1])
y = ops.gmm(x, w, group, impl='xla')
assert y[:3].tolist() == [[2.0] * 3] * 3, y
assert ops.__file__.startswith(sys.argv[1]), ops.__file__
try:
  ops.choose_gmm('cpu')
except ValueError as error:
  print(error)
"""
  # -S: no site-packages hook that would find the package elsewhere.
  paths = [str(tmp_path), *[p for p in sys.path if 'site-packages' in p]]
  done = subprocess.run(
    [sys.executable, '-S', '-c', code, str(tmp_path)],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)},
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert 'pallas_kernels is not installed' in done.stdout


def test_cpu_program_size_does_not_grow_with_experts_or_rows():
  def lines(M, E):
    shapes = (
      jax.ShapeDtypeStruct((M, 8), jnp.float32),
      jax.ShapeDtypeStruct((E, 8, 8), jnp.float32),
      jax.ShapeDtypeStruct((M, 8), jnp.float32),
      jax.ShapeDtypeStruct((E,), jnp.int32),
    )
    return len(jax.jit(vjp).lower(*shapes).as_text().splitlines())

  assert lines(512, 4) == lines(32768, 256)
