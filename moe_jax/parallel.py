"""Where rows meet weights: the mesh, what lies where, and the strategies.

A batch is cut into rows over all axes of the mesh. Routers, residual rules and
models are written for the whole batch, and XLA cuts them; the routed layer
alone is a `jax.shard_map`, because only a plan says where its rows have to go.

  mesh axis  cuts of an expert pool        cuts of every other matrix
  data       nothing: a replica has all    nothing
  fsdp       D, gathered for its layer     its longest axis, gathered for its
  expert     E: rows go to their experts   layer: by that one of these three
  tensor     F: rows meet a part of each   that divides it and has most devices

By one alone: a gather from all devices of a torus is an all-reduce to the TPU's
compiler, of twice the bytes.

A strategy is (x_TxD, plan, experts, axis) -> y_TxD, overflow: the tokens of
this device and their plan for all experts, and `experts`, those that are here;
the rows that found no place in a buffer, a count.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils

from moe_jax import exact, plans, ranges
from moe_jax.plans import Plan

# -1: as many as the other axes leave.
Size = Annotated[int, ranges.Within('[-1, 2^31)')]


class Sizes(TypedDict):
  """Devices along each axis of a mesh."""

  data: Size
  fsdp: Size
  expert: Size
  tensor: Size


AXES = ('data', 'fsdp', 'expert', 'tensor')
P = jax.sharding.PartitionSpec
ROWS = P(AXES)
LOCAL_STRATEGIES = ('local', 'fused')  # all experts are on the device
# Of an array under `pools`: what cuts an axis, by the axis' letter.
POOL = {'E': 'expert', 'D': 'fsdp', 'F': 'tensor'}
REST = ('fsdp', 'expert', 'tensor')


# --- strategies ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Axis:
  """What a strategy has to know of the mesh axis 'expert'.

  Attributes:
    n: its devices.
    buffer_factor: size of the receive buffer relative to balanced load; None
      has a place for every row that could ever come.
    emulate: `ragged_all_to_all` is done with other collectives.
  """

  n: int = 1
  buffer_factor: float | None = None
  emulate: bool = True


def local(x_TxD: jax.Array, plan: Plan, experts: Callable, axis: Axis):
  """All experts are here."""
  del axis
  return _within(x_TxD, plan, experts, None)


def fused(x_TxD: jax.Array, plan: Plan, experts: Callable, axis: Axis):
  """`local` without copies of tokens and with less saved, see fused.py."""
  del axis
  return experts.routed(x_TxD, plans.sort(plan)), jnp.int32(0)


def all_gather(x_TxD: jax.Array, plan: Plan, experts: Callable, axis: Axis):
  """Everybody's tokens come here and meet the experts that are here."""
  places = _places(plan, axis)
  x_NxD, plan = jax.tree.map(_gathered('expert'), (x_TxD, plan))
  E = plan.E // axis.n
  plan = plan.local_experts(jax.lax.axis_index('expert') * E, E)
  y_NxD, overflow = _within(x_NxD, plan, experts, places)
  return jax.lax.psum_scatter(y_NxD, 'expert', tiled=True), overflow


def all_to_all(x_TxD: jax.Array, plan: Plan, experts: Callable, axis: Axis):
  """A device sends each expert the same number of rows, some of them empty."""
  (T, D), E, n = x_TxD.shape, plan.E // axis.n, axis.n
  rows = plans.sort(plan)
  C = plan.max_rows(1)
  if axis.buffer_factor is not None:
    C = min(C, exact.ceil(axis.buffer_factor, len(rows.token_M), plan.E))
  overflow = jnp.sum(jnp.maximum(rows.group_sizes_E - C, 0), dtype=jnp.int32)
  rows = plans.pad_to_capacity(rows, C, T)
  exchange = functools.partial(
    jax.lax.all_to_all, axis_name='expert', split_axis=0, concat_axis=0
  )
  sent_NxExCxD = plans.dispatch(x_TxD, rows).reshape(n, E, C, D)
  rows_ExNxCxD = exchange(sent_NxExCxD).swapaxes(0, 1)
  group_sizes_E = jnp.full((E,), n * C, jnp.int32)
  y_MxD = experts(rows_ExNxCxD.reshape(E * n * C, D), group_sizes_E)
  y_NxExCxD = exchange(y_MxD.reshape(E, n, C, D).swapaxes(0, 1))
  return plans.combine(y_NxExCxD.reshape(n * E * C, D), rows, T), overflow


def ragged(x_TxD: jax.Array, plan: Plan, experts: Callable, axis: Axis):
  """Rows go straight to their places before their experts, and no others."""
  rows, places = plans.sort(plan), _places(plan, axis)
  there, back, group_sizes_E, overflow = _ragged_all_to_all_args(
    rows.group_sizes_E, axis.n, places
  )
  rows_MxD = plans.dispatch(x_TxD, rows)
  rows_RxD = _ragged_all_to_all(axis.emulate, places, rows_MxD, there, back)
  y_RxD = experts(rows_RxD, group_sizes_E)
  y_MxD = _ragged_all_to_all(axis.emulate, len(rows_MxD), y_RxD, back, there)
  return plans.combine(y_MxD, rows, len(x_TxD)), overflow


STRATEGIES = {
  'local': local,
  'fused': fused,
  'all_gather': all_gather,
  'all_to_all': all_to_all,
  'ragged': ragged,
}


def _within(x_TxD, plan, experts, places):
  """The routed layer where all that it needs is here, and so many places."""
  rows = plans.sort(plan, places)
  y_MxD = experts(plans.dispatch(x_TxD, rows), rows.group_sizes_E)
  overflow = plan.num_routed() - jnp.sum(rows.group_sizes_E, dtype=jnp.int32)
  return plans.combine(y_MxD, rows, len(x_TxD)), overflow


def _places(plan, axis):
  """Rows for which one device has places; `plan` is of one device's tokens."""
  most = axis.n * plan.max_rows(plan.E // axis.n)
  if axis.buffer_factor is None:
    return most
  return min(most, exact.ceil(axis.buffer_factor, plan.num_choices()))


def _gathered(axis, dim=0):
  return lambda a: jax.lax.all_gather(a, axis, axis=dim, tiled=True)


# --- ragged -------------------------------------------------------------------


def _ragged_all_to_all_args(group_sizes_E, n, places):
  """The way of the rows to the experts and back.

  A sender's rows for one expert are a segment; it arrives behind those of the
  senders before it and of the experts before, so that the arrivals are grouped
  by expert. What exceeds a receiver's places does not leave, of the last
  experts first. A leg is what `jax.lax.ragged_all_to_all` needs, for n * E
  segments: where each begins, its length, where it arrives, and the lengths of
  those that come.

  Args:
    group_sizes_E: rows here for each of the experts of all devices.

  Returns:
    there, back, the rows that come for each expert here, and how many of those
    here overflow.
  """
  E = len(group_sizes_E) // n
  count_SxRxE = jax.lax.all_gather(group_sizes_E, 'expert').reshape(n, n, E)
  by_arrival_RxM = count_SxRxE.transpose(1, 2, 0).reshape(n, E * n)
  end_RxM = jnp.minimum(
    jnp.cumsum(by_arrival_RxM, axis=1, dtype=jnp.int32), places
  )
  zero_Rx1 = jnp.zeros_like(end_RxM[:, :1])
  begin_RxM = jnp.concatenate([zero_Rx1, end_RxM[:, :-1]], axis=1)
  by_sender = lambda a_RxM: a_RxM.reshape(n, E, n).transpose(2, 0, 1)
  arrive_SxRxE = by_sender(begin_RxM)
  size_SxRxE = by_sender(end_RxM - begin_RxM)
  flat_SxM = count_SxRxE.reshape(n, n * E)
  leave_SxM = jnp.cumsum(flat_SxM, axis=1, dtype=jnp.int32) - flat_SxM
  leave_SxRxE = leave_SxM.reshape(n, n, E)
  me = jax.lax.axis_index('expert')
  sent = lambda a_SxRxE: a_SxRxE[me].reshape(n * E)
  come = lambda a_SxRxE: a_SxRxE[:, me].reshape(n * E)
  there = (
    sent(leave_SxRxE), sent(size_SxRxE), sent(arrive_SxRxE), come(size_SxRxE),
  )  # fmt: skip
  back = (
    come(arrive_SxRxE), come(size_SxRxE), come(leave_SxRxE), sent(size_SxRxE),
  )  # fmt: skip
  came_E = jnp.sum(size_SxRxE[:, me], axis=0, dtype=jnp.int32)
  overflow = jnp.sum((count_SxRxE - size_SxRxE)[me], dtype=jnp.int32)
  return there, back, came_E, overflow


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_all_to_all(emulate, size, x_MxD, leg, other):
  """[size, D]: the rows that one leg brings, zero where none arrives.

  The transpose of a leg is the other one.
  """
  del other
  y_RxD = jnp.zeros_like(x_MxD, shape=(size, x_MxD.shape[1]))
  if emulate:
    return _emulated(x_MxD, y_RxD, leg)
  return jax.lax.ragged_all_to_all(x_MxD, y_RxD, *leg, axis_name='expert')


def _ragged_fwd(emulate, size, x_MxD, leg, other):
  return _ragged_all_to_all(emulate, size, x_MxD, leg, other), (
    x_MxD[:, :0],
    leg,
    other,
  )


def _ragged_bwd(emulate, size, saved, d_y_RxD):
  del size
  like_Mx0, leg, other = saved
  d_x_MxD = _ragged_all_to_all(emulate, len(like_Mx0), d_y_RxD, other, leg)
  return d_x_MxD, None, None


_ragged_all_to_all.defvjp(_ragged_fwd, _ragged_bwd)


def _emulated(x_MxD, y_RxD, leg):
  """`ragged_all_to_all` by an all-gather: the same values, where it is not."""
  everywhere = functools.partial(jax.lax.all_gather, axis_name='expert')
  x_SxMxD = everywhere(x_MxD)
  S, M, D = x_SxMxD.shape
  me = jax.lax.axis_index('expert')
  leave, size, arrive = (
    everywhere(a).reshape(S, S, -1)[:, me, :, None] for a in leg[:3]
  )
  place = jnp.arange(len(y_RxD), dtype=jnp.int32)[None, None]
  mine = (place >= arrive) & (place < arrive + size)
  first = jnp.arange(S, dtype=jnp.int32)[:, None, None] * M
  from_R = jnp.sum(
    jnp.where(mine, first + leave + place - arrive, 0),
    axis=(0, 1),
    dtype=jnp.int32,
  )
  moved_RxD = x_SxMxD.reshape(S * M, D)[from_R]
  return jnp.where(jnp.any(mine, axis=(0, 1))[:, None], moved_RxD, y_RxD)


def _varying(a, cut=()):
  """An array that is the same along the axes but `cut`, typed as different.

  Then its gradient is summed over them.
  """
  same = tuple(axis for axis in AXES if axis not in cut)
  return jax.lax.pcast(a, same, to='varying') if same else a


def _assembled(a, cut, axes=REST):
  """A piece of a parameter that is `cut`, whole along these mesh axes."""
  a = _varying(a, cut)
  for dim, by in enumerate(cut):
    if by in axes:
      a = _gathered(by, dim)(a)
  return a


# --- the layout of a model on a mesh ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
  """A strategy on a mesh; None is one device."""

  mesh: jax.sharding.Mesh | None = None
  strategy: str = 'local'
  axis: Axis = Axis()

  def rows(self, x: jax.Array) -> jax.Array:
    """The same; its first axis is cut as a batch is."""
    if self._alone():
      return x
    sharding = jax.NamedSharding(self.mesh, ROWS)
    return jax.lax.with_sharding_constraint(x, sharding)

  def whole(self, name: str, w: jax.Array) -> jax.Array:
    """The same parameter, gathered; its gradient is cut again.

    For one that XLA would rather leave cut, and gather the batch: a matrix with
    as many columns as there are words.
    """
    if self._alone():
      return w
    cut = jax.NamedSharding(self.mesh, self._cut(name, w))
    return _whole(jax.NamedSharding(self.mesh, P()), cut, w)

  def lookup(
    self, name: str, table_VxD: jax.Array, ids_BxL: jax.Array
  ) -> jax.Array:
    """[B, L, D]: rows of a parameter, which is gathered, and not the batch."""
    if self._alone():
      return table_VxD[ids_BxL]
    cut = self._cut(name, table_VxD)

    def here(table_VxD, ids_BxL):
      return _assembled(table_VxD, cut)[ids_BxL]

    return jax.shard_map(
      here, mesh=self.mesh, in_specs=(cut, ROWS), out_specs=ROWS
    )(table_VxD, ids_BxL)

  def _alone(self):
    return self.mesh is None or self.mesh.size == 1

  def _cut(self, name, w):
    path = (jax.tree_util.DictKey(name),)
    return spec(path, w.shape, self.mesh)

  def __call__(
    self, x_TxD: jax.Array, plan: Plan, experts: nnx.Module
  ) -> tuple[jax.Array, jax.Array]:
    """y_TxD, and how many rows of all devices found no place."""
    if self._alone() and self.strategy in LOCAL_STRATEGIES:
      return STRATEGIES[self.strategy](x_TxD, plan, experts, self.axis)
    for a in jax.tree.leaves((x_TxD, plan)):
      if len(a) % self.mesh.size:
        raise ValueError(
          f'{self.mesh.size} devices do not divide the {len(a)} tokens, or'
          f' groups of tokens, of a routed layer: {a.shape}'
        )
    graph, state = nnx.split(experts)
    weights = nnx.to_pure_dict(state)
    specs = jax.tree_util.tree_map_with_path(self._pool_spec, weights)

    def here(x_TxD, plan, weights):
      gather = functools.partial(self._of_this_layer, x_TxD.dtype)
      weights = jax.tree_util.tree_map_with_path(gather, weights, specs)
      nnx.replace_by_pure_dict(state, weights)
      return self._here(x_TxD, plan, nnx.merge(graph, state))

    cut = jax.shard_map(
      here, mesh=self.mesh, in_specs=(ROWS, ROWS, specs), out_specs=(ROWS, P())
    )
    return cut(x_TxD, plan, weights)

  def _here(self, x_TxD, plan, experts):
    """The layer on one device, with a part of the width F of its experts."""
    parts = self.mesh.shape['tensor']
    if parts > 1:
      x_TxD, plan = jax.tree.map(_gathered('tensor'), (x_TxD, plan))
    strategy = STRATEGIES[self.strategy]
    y_TxD, overflow = strategy(x_TxD, plan, experts, self.axis)
    if parts > 1:
      y_TxD = jax.lax.psum_scatter(y_TxD, 'tensor', tiled=True)
    # A plan by expert has a count that is typed as the same along some axes.
    overflow += _varying(jnp.int32(0))
    # All parts of an expert lose the same rows.
    return y_TxD, jax.lax.psum(overflow, AXES) // parts

  def _pool_spec(self, path, a):
    return spec(path, a.shape, self.mesh, pool=True)

  def _of_this_layer(self, dtype, path, a, cut):
    """A weight of the experts that are here, whole but for F."""
    a = _assembled(a.astype(dtype), cut, ('fsdp',))
    if path[-1].key == 'bias_down_ExD':  # added by one part of F alone
      a = jnp.where(jax.lax.axis_index('tensor') == 0, a, 0)
    return a


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(everywhere, cut, w):
  del cut
  return jax.lax.with_sharding_constraint(w, everywhere)


def _whole_fwd(everywhere, cut, w):
  return _whole(everywhere, cut, w), None


def _whole_bwd(everywhere, cut, saved, d_w):
  del everywhere, saved
  return (jax.lax.with_sharding_constraint(d_w, cut),)


_whole.defvjp(_whole_fwd, _whole_bwd)


def spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh, pool=False) -> P:
  """How an array is cut, by its name's axes, the table above.

  Axes before those of the name are of stacked layers, and never cut.
  """
  name = str(getattr(path[-1], 'key', '')) if path else ''
  letters = name.rsplit('_', 1)[-1].split('x') if '_' in name else []
  if len(letters) < 2 or len(letters) > len(shape):
    return P()
  ahead = len(shape) - len(letters)
  cut = [None] * len(shape)
  if pool or any(getattr(k, 'key', None) == 'pools' for k in path):
    for i, letter in enumerate(letters, ahead):
      axis = POOL.get(letter)
      if axis and shape[i] % mesh.shape[axis] == 0:
        cut[i] = axis
    return P(*cut)
  i = max(range(ahead, len(shape)), key=lambda i: shape[i])
  divide = [axis for axis in REST if shape[i] % mesh.shape[axis] == 0]
  if divide:
    cut[i] = max(divide, key=mesh.shape.get)
  return P(*cut)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Where each array of a train state lies, see `spec`."""

  def one(path, a):
    if getattr(path[0], 'name', '') == 'cache_BxNxCxD':
      return jax.NamedSharding(mesh, ROWS)
    return jax.NamedSharding(mesh, spec(path, a.shape, mesh))

  return jax.tree_util.tree_map_with_path(one, tree)


def layout(
  mesh: jax.sharding.Mesh,
  k: float,
  *,
  strategy: Annotated[str, ranges.OneOf(('auto', *STRATEGIES))],
  buffer_factor: ranges.Positive | None,
) -> tuple[Layout, str]:
  """The layout, and what a log says of it.

  Args:
    k, strategy: of `choose`.
    buffer_factor: of `Axis`.

  Raises:
    ValueError: there is no such strategy, or none on such a mesh.
  """
  ranges.check(
    layout, {'strategy': strategy, 'buffer_factor': buffer_factor}, 'parallel.'
  )
  n, platform = mesh.shape['expert'], mesh.devices.flat[0].platform
  name = said = choose(strategy, n, k, platform)
  if name == 'ragged' and platform == 'tpu' and not _takes_ragged(mesh):
    name, said = 'all_to_all', 'all_to_all: this network takes no ragged one'
  return Layout(mesh, name, Axis(n, buffer_factor, platform == 'cpu')), said


def choose(strategy: str, n: int, k: float, platform: str) -> str:
  """The name in STRATEGIES, with n devices along the axis 'expert'.

  'auto' is `local` where experts are not cut; `all_gather` on CPU, where a
  token has as many experts, k, as there are devices, so that it would go almost
  everywhere anyway; else `ragged`.

  Raises:
    ValueError: there is no such strategy on such a mesh.
  """
  if strategy in LOCAL_STRATEGIES and n > 1:
    raise ValueError(
      f'parallel.strategy={strategy!r} has all experts here, mesh.expert={n}'
    )
  if strategy != 'auto':
    return strategy
  if n == 1:
    return 'local'
  return 'all_gather' if platform == 'cpu' or k >= n else 'ragged'


def check(
  sizes: dict[str, int], *, batch_size: int, accumulate: int, E: int, F: int
) -> None:
  """ValueError if a mesh of these sizes does not divide what is laid on it.

  Args:
    E: experts that a layer owns.
    F: their width.
  """
  rows = math.prod(sizes.values()) * accumulate
  if batch_size % rows:
    axes = ' x '.join(f'mesh.{k}={v}' for k, v in sizes.items())
    raise ValueError(
      f'batch_size={batch_size} is not a multiple of {rows}: {axes}'
      f' x optimizer.accumulate={accumulate}'
    )
  for axis, key, size in (('expert', 'E', E), ('tensor', 'expert_F', F)):
    if size % sizes[axis]:
      raise ValueError(
        f'mesh.{axis}={sizes[axis]} does not divide model.{key}={size}'
      )


def _takes_ragged(mesh):
  """Whether `ragged_all_to_all` compiles for these devices."""
  rows = jax.ShapeDtypeStruct(
    (mesh.size * 8, 128), jnp.float32, sharding=jax.NamedSharding(mesh, ROWS)
  )
  zeros = lambda: _varying(jnp.zeros((mesh.shape['expert'],), jnp.int32))

  def move(x):
    return jax.lax.ragged_all_to_all(
      x, x, zeros(), zeros(), zeros(), zeros(), axis_name='expert'
    )

  probe = jax.shard_map(move, mesh=mesh, in_specs=ROWS, out_specs=ROWS)
  try:
    jax.jit(probe).lower(rows).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def filled(sizes: dict[str, int], devices: int) -> dict[str, int]:
  """The sizes of a mesh, the one that is -1 filled in.

  Raises:
    ValueError: a size is 0, two are -1, or the others do not divide `devices`.
  """
  text = ' x '.join(f'mesh.{axis}={n}' for axis, n in sizes.items())
  if 0 in sizes.values():
    raise ValueError(f'{text}: a size is at least 1, or -1 for the rest')
  open_axes = [axis for axis, n in sizes.items() if n == -1]
  if len(open_axes) > 1:
    raise ValueError(f'{text}: at most one size may be -1')
  if not open_axes:
    return sizes
  others = -math.prod(sizes.values())
  if devices % others:
    raise ValueError(
      f'{text}: the other axes, {others} devices, do not divide the {devices}'
      ' that there are'
    )
  return {**sizes, open_axes[0]: devices // others}


def mesh(
  sizes: dict[str, int], devices: list[Any] | None = None
) -> jax.sharding.Mesh:
  """A mesh over the first devices that it needs; all of a TPU.

  Neighbours on the chips' network are neighbours on the mesh's later axes. Of
  several TPU slices, between which the network is slower, `data` goes over all.

  Args:
    sizes: devices along each of AXES; see `filled` for -1.
    devices: to choose from; None is all that jax has.

  Raises:
    ValueError: these devices make no such mesh.
  """
  ranges.check(Sizes, sizes, 'mesh.')
  devices = jax.devices() if devices is None else devices
  sizes = filled(sizes, len(devices))
  shape = [sizes[axis] for axis in AXES]
  need, tpu = math.prod(shape), devices[0].platform == 'tpu'
  text = ' x '.join(f'{axis}={n}' for axis, n in zip(AXES, shape, strict=True))
  if need > len(devices) or (tpu and need < len(devices)):
    raise ValueError(
      f'mesh {text} needs {need} devices, there are {len(devices)}'
    )
  if tpu:
    placed = _on_a_torus(shape, devices, text)
  else:
    placed = np.asarray(devices[:need]).reshape(shape)
  return jax.sharding.Mesh(
    placed, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
  )


def _on_a_torus(shape, devices, text):
  slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if shape[0] % slices:
    raise ValueError(
      f'mesh {text}: data is not a multiple of the {slices} slices'
    )
  within = (shape[0] // slices, *shape[1:])
  if slices == 1:
    return mesh_utils.create_device_mesh(
      within, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    within, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
  )


def rows_here(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """int64 [B]: the rows of a batch that lie on this process' devices."""
  cut = jax.NamedSharding(mesh, ROWS)
  places = cut.addressable_devices_indices_map((batch_size,)).values()
  rows = [np.arange(batch_size)[place] for place in places]
  return np.unique(np.concatenate(rows))


def put_batch(
  batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int
) -> Any:
  """The batch on the devices, from the rows of it that `rows_here` names."""
  cut = jax.NamedSharding(mesh, ROWS)

  def put(a):
    shape = (batch_size, *a.shape[1:])
    return jax.make_array_from_process_local_data(cut, a, shape)

  return jax.tree.map(put, batch)
