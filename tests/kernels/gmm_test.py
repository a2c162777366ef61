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
# Cases of which only the groups matter: 'skewed' is multiplied with them too.
WITHIN = ('even', 'empty_experts', 'one_hot', 'sum_below_M', 'no_rows_used')
ALL = [
  (impl, name, dtype)
  for impl in IMPLS
  for dtype in TOLERANCE
  for name in (CASES if dtype == 'float32' else ['skewed'])
  if name not in WITHIN and (impl, dtype) != ('interpret', 'float64')
]


def groups(name):
  """int32 [E] each: a case's own and others; for 'skewed' a great many."""
  M, A, B, own = CASES[name]
  E = len(own)
  padded = lambda group: np.int32((*group, *[0] * E)[:E])
  found = [padded(own)]
  if A == B == 1:  # other sums might cancel, as each result is one number
    return found
  found += [padded(own)[::-1], padded(own) // 2, padded([0] * (E // 2) + [M])]
  if name != 'skewed':
    return found
  found += [
    padded(group)
    for _, _, _, group in CASES.values()
    if sum(group) <= M and not any(group[E:])
  ]
  rng = np.random.default_rng(0)
  for _ in range(40):
    share = rng.dirichlet(np.full(E + 1, 0.3))
    found.append(np.int32(rng.multinomial(M, share)[:-1]))
  return found


def test_groups_within_another_case_fit_it():
  found = [
    group_sizes_E[group_sizes_E > 0].tolist()
    for group_sizes_E in groups('skewed')
  ]
  for name in WITHIN:
    assert [rows for rows in CASES[name][3] if rows] in found, name


def draw(name, dtype='float32', cases=CASES, group_sizes_E=None):
  """x, w, dy, group; the rows past the groups are NaN."""
  M, A, B, own = cases[name]
  group_sizes_E = (
    np.array(own, np.int32) if group_sizes_E is None else group_sizes_E
  )
  rows = sum(group_sizes_E)
  rng = np.random.default_rng(len(name))
  x_MxA, dy_MxB = rng.normal(size=(M, A)), rng.normal(size=(M, B))
  w_ExAxB = rng.normal(size=(len(group_sizes_E), A, B))
  # Experts of very different scale: an absolute tolerance would hide some.
  scale_E = 10.0 ** rng.integers(-3, 4, size=len(group_sizes_E))
  w_ExAxB *= scale_E[:, None, None]
  x_MxA[:rows] *= np.repeat(scale_E[::-1], group_sizes_E)[:, None]
  x_MxA[rows:] = np.nan
  dy_MxB[rows:] = np.nan
  cast = lambda a: a.astype(jnp.dtype(dtype))
  return cast(x_MxA), cast(w_ExAxB), cast(dy_MxB), group_sizes_E


def oracle(x_MxA, w_ExAxB, dy_MxB, group_sizes_E):
  """Per expert y, dx, dw in float64."""
  x_MxA, w_ExAxB, dy_MxB = (
    np.asarray(a).astype(np.float64) for a in (x_MxA, w_ExAxB, dy_MxB)
  )
  y, dx, dw, row = [], [], [], 0
  for e, size in enumerate(np.asarray(group_sizes_E)):
    x, dy = x_MxA[row : row + size], dy_MxB[row : row + size]
    y.append(x @ w_ExAxB[e])
    dx.append(dy @ w_ExAxB[e].T)
    dw.append(x.T @ dy)
    row += size
  return y, dx, dw


def by_expert(y_MxB, group_sizes_E):
  ends = np.cumsum(np.asarray(group_sizes_E))
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


def vjp(x_MxA, w_ExAxB, dy_MxB, group_sizes_E, gmm=GMM['cpu']):
  y, back = jax.vjp(lambda x, w: gmm(x, w, group_sizes_E), x_MxA, w_ExAxB)
  return (y, *back(dy_MxB))


def check_all(found, operands, tolerance):
  """What `vjp` gave for operands against the oracle."""
  y, dx, dw = jax.block_until_ready(found)
  x, w, dy, group = operands
  for got, like in (y, dy), (dx, x), (dw, w):
    assert got.shape == like.shape and got.dtype == like.dtype
  want_y, want_dx, want_dw = oracle(x, w, dy, group)
  check(by_expert(y, group), want_y, tolerance)
  check(by_expert(dx, group), want_dx, tolerance)
  check(dw, want_dw, tolerance)


@pytest.mark.parametrize('impl,name,dtype', ALL)
def test_values_and_gradients(impl, name, dtype):
  """By one program for all group sizes."""
  x64 = dtype == 'float64'
  with jax.enable_x64(True) if x64 else contextlib.nullcontext():
    step = jax.jit(functools.partial(vjp, gmm=GMM[impl]))
    for group_sizes_E in groups(name):
      operands = draw(name, dtype, group_sizes_E=group_sizes_E)
      check_all(step(*operands), operands, TOLERANCE[dtype])
  assert step._cache_size() == 1


def _deep_loss(x, w, gmm, remat):
  """Of layers h + tanh(gmm(h)), by a scan."""
  group_sizes_E = np.array((50, 0, 70), np.int32)

  def layer(h, w):
    return h + jnp.tanh(gmm(h, w, group_sizes_E)), None

  layer = jax.checkpoint(layer) if remat else layer
  return jnp.sum(jax.lax.scan(layer, x, w)[0] ** 2)


@functools.cache
def _deep():
  """Arguments of the loss of three layers, and its gradients."""
  rng = np.random.default_rng(1)
  x = np.float32(rng.normal(size=(120, 16)))
  w = np.float32(rng.normal(size=(3, 3, 16, 16)) / 4)

  def dense(x, w, group_sizes_E):
    own_MxE = np.eye(3, dtype=np.float32)[
      np.repeat(np.arange(3), group_sizes_E)
    ]
    return jnp.einsum('ma,eab,me->mb', x, w, own_MxE, precision='highest')

  loss = functools.partial(_deep_loss, gmm=dense, remat=False)
  return (x, w), jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(x, w))


@pytest.mark.parametrize(
  'impl, remat', [('cpu', False), ('interpret', True), ('xla', True)]
)
def test_inside_scan_jit_grad(impl, remat):
  args, want = _deep()
  loss = functools.partial(_deep_loss, gmm=GMM[impl], remat=remat)
  got = jax.jit(jax.grad(loss, (0, 1)))(*args)
  group = 50, 0, 70
  check(by_expert(got[0], group), by_expert(want[0], group), 1e-5)
  for found, expected in zip(got[1], np.float64(want[1]), strict=True):
    check(found, expected, 1e-5)


@pytest.mark.parametrize(
  'impl, axes', [('cpu', (0, 0, 0, 0)), ('interpret', (0, None, 0, 0))]
)
def test_vmap(impl, axes):
  one = draw('skewed')
  two = [
    np.stack([a, a[::-1]]) if axis == 0 else a
    for a, axis in zip(one, axes, strict=True)
  ]
  step = jax.vmap(functools.partial(vjp, gmm=GMM[impl]), in_axes=axes)
  got = jax.jit(step)(*two)
  for i in range(2):
    one = [a[i] if axis == 0 else a for a, axis in zip(two, axes, strict=True)]
    check_all([a[i] for a in got], one, 1e-5)


def test_checked_shard_map_sums_the_gradient_of_a_replicated_weight():
  P = jax.sharding.PartitionSpec
  devices = jax.devices()
  mesh = jax.sharding.Mesh(devices, ('data',))
  x, w, dy, group = draw('skewed')
  x, dy, group = (np.stack([a] * len(devices)) for a in (x, dy, group))

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
