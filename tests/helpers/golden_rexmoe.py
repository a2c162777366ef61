"""ReXMoE (arXiv 2510.17483): equal to its equations.

The authors have no code. The files are of loops in float64 over tokens and
experts, with inputs and results in float32.
"""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import blocks, config, models, objectives, routers, trunk
from moe_jax.routers import rexmoe
from tests.helpers import golden
from tests.helpers.golden import jit, Params, TOL_F32, TOL_LOSS

LOSSES = {'balance': 'A', 'balance_kept': 'B'}
# Their experts' weights, [.., out, in], and ours, [.., in, out].
WEIGHTS = {'w_gate': 'gate_ExDxF', 'w_up': 'up_ExDxF', 'w_down': 'down_ExFxD'}
MODES = {
  '': {},
  'neginf_': {'mask': 'neginf'},
  'renorm_': {'renormalise': True},
}


def _layers(
  L: int, r: int, N: int, k: int, D: int, F: int, **router
) -> trunk.Trunk:
  """L layers that own N experts each, in pools of r."""
  fields = dict(
    N=L,
    D=D,
    H=1,
    E=N,
    expert_F=F,
    shared_F=router.pop('shared_F', 0),
    layers_per_pool=r,
    ragged_pool=bool(L % r),
    router=config.router('rexmoe', k=k, **router),
  )
  return golden.layers(fields)


def _keeping(keep_LxM: jax.Array):
  """While it lasts, these are the candidates of each layer, not random ones."""
  keep = lambda router, ctx: keep_LxM[ctx.depth, : router.E]
  return mock.patch.object(rexmoe.Router, '_keep', keep)


def _double(a: np.ndarray) -> np.ndarray:
  return a.astype(np.float64) if a.dtype == np.float32 else a


# --- One layer ---------------------------------------------------------------


def _layer_table(params: Params) -> dict[str, Any]:
  """The files' arrays off the params of a pool and its first layer."""
  experts = params['body']['pools']
  feed = jax.tree.map(lambda a: a[0, 0], params['body']['moe']['feed'])
  found = {'router_w': feed['routers']['w_DxE'][0].T}
  for name, ours in WEIGHTS.items():
    found[name] = experts[ours][0].swapaxes(-1, -2)
    found[f'shared_{name}'] = feed['shared']['one'][ours][0].T
  return found


@functools.cache  # the stages and seeds of a pool are one program
def _layer_program(mode, r, N, k, D, F):
  """(layers, a function of them), which the files of a pool share.

  (params, x, keep, cotangent, weights of the losses) -> the answer and its aux,
  all experts by score, the answer out of training where that is checked, and
  the gradients of params and x.
  """
  layers = _layers(r, r, N, k, D, F, shared_F=F, **MODES[mode])

  def forward(params, x_TxD, train):
    bound = models.bind(layers, params, {})
    feed = blocks.at(blocks.at(bound.body.moe, 0), 0).feed
    ctx = golden.context(1, len(x_TxD), train=train).at(moe_layer=0)
    with golden.watched():
      out_TxD, _, aux = feed(
        x_TxD, (), blocks.at(bound.body.pools, 0), bound.spec, ctx
      )
    return out_TxD, jax.tree.map(lambda a: a[0], aux)  # of one iteration

  def scores(params, x_TxD, keep_M):
    # All M of them, chosen from best to worst. Ours zeroes the gates of the
    # masked; the scores in the file are of before.
    return rexmoe.route(
      routers.logits(x_TxD, _layer_table(params)['router_w'].T),
      keep_M if mode == 'neginf_' else jnp.ones_like(keep_M),
      r * N,
      golden.context(1, len(x_TxD)),
      mask=MODES[mode].get('mask', 'zero'),
    )

  @jit
  def run(params, x_TxD, keep_M, cotangent_TxD, weights):
    def loss(params, x_TxD):
      with _keeping(keep_M[None]):
        out_TxD, aux = forward(params, x_TxD, train=True)
      _, _, y_TxD = aux['steps']  # without the shared expert
      loss = jnp.sum(y_TxD * cotangent_TxD)
      for kind, weight in zip(LOSSES, weights, strict=True):
        loss += weight * objectives.weighted({kind: 1.0}, [aux])
      return loss, (out_TxD, aux)

    slopes, kept = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_TxD)
    eval_TxD = None if mode else forward(params, x_TxD, train=False)[0]
    return *kept, scores(params, x_TxD, keep_M), eval_TxD, slopes

  return layers, run


def layer(g: golden.Golden) -> None:
  """rexmoe_layer_*: one layer over a pool, as each way of masking has it."""
  a = {name: _double(array) for name, array in g.arrays.items()}
  r, N, k = (int(a.pop(name)) for name in ('r', 'N', 'K'))
  M, F, D = a['w_gate'].shape
  assert M == r * N
  x_TxD, cotangent_TxD, keep_M = a.pop('x'), a.pop('cotangent'), a.pop('keep')
  names = ['router_w', *WEIGHTS, *(f'shared_{name}' for name in WEIGHTS)]
  weights = {name: a.pop(name) for name in names}
  assert keep_M.sum() == a.pop('n_t')  # how many of which: `schedule`

  for mode in MODES:
    layers, program = _layer_program(mode, r, N, k, D, F)
    params, _ = golden.with_weights(golden.start(layers), _layer_table, weights)
    run = lambda *weighed, p=params, f=program: jax.device_get(
      f(p, x_TxD, keep_M, *weighed)
    )
    out_TxD, aux, scores, eval_TxD, slopes = run(cotangent_TxD, (0.0, 0.0))
    _, _, y_TxD = aux['steps']
    golden.near(y_TxD, a.pop(f'{mode}out'), TOL_F32)
    chosen = a.pop(f'{mode}topk_idx'), a.pop(f'{mode}gates')
    np.testing.assert_array_equal(aux['route'], chosen[0])
    (step,) = golden.unstacked([jax.tree.map(_one, aux)])
    golden.near(step.gate_TxE, golden.dense(*chosen, M), TOL_F32)
    golden.near(golden.dense(*scores, M), a.pop(f'{mode}scores'), TOL_F32)
    found = _gradients(slopes, mode)
    expected = {name: a.pop(name) for name in found}
    golden.gradients_near(found, expected, TOL_F32)
    if mode:
      continue
    golden.near(out_TxD, a.pop('out_with_shared'), TOL_F32)
    if keep_M.all():  # then the stage is also what inference is
      golden.near(eval_TxD, out_TxD, 1e-12)
    load_M = aux['load_E']
    np.testing.assert_array_equal(load_M, a.pop('load'))
    # Of the load, which is all that the library reports.
    golden.near(load_M / load_M.mean() - 1, a.pop('lbv'), TOL_LOSS)
    for i, (kind, name) in enumerate(LOSSES.items()):
      golden.near(aux['losses'][kind], a.pop(f'aux_{name}'), TOL_LOSS)
      *_, slopes = run(0 * cotangent_TxD, (1.0 - i, 1.0 * i))
      found = _gradients(slopes, f'aux_{name}_')
      for weight in WEIGHTS:  # no expert has a part in it
        assert not np.any(found.pop(f'aux_{name}_g_{weight}'))
      expected = {name: a.pop(name) for name in found}
      golden.gradients_near(found, expected, TOL_LOSS)
  assert not a, f'unchecked: {sorted(a)}'


def _gradients(slopes, prefix):
  """The gradients by the names that they have in the file."""
  d_params, d_x = slopes
  found = {**_layer_table(d_params), 'x': d_x}
  return {
    f'{prefix}g_{name}': gradient
    for name, gradient in found.items()
    if not name.startswith('shared_')  # not in the answer that is weighed
  }


def _one(a):
  """Of the one pool, layer and iteration that there is."""
  return a[None, None, None]


# --- A stack -----------------------------------------------------------------


def _stack_table(params: Params, N: int) -> dict[str, Any]:
  """The files' arrays: experts by the layer that owns them."""
  segments = [params[name] for name in trunk.SEGMENTS if name in params]
  found = {}
  for name, ours in WEIGHTS.items():
    owned = [np.asarray(s['pools'][ours]) for s in segments]
    owned = [w.reshape(-1, N, *w.shape[-2:]) for w in owned]
    found[name] = np.concatenate(owned).swapaxes(-1, -2)
  for segment in segments:
    w_GxRxIxDxE = segment['moe']['feed']['routers']['w_DxE']
    for i in np.ndindex(w_GxRxIxDxE.shape[:2]):
      found[f'router_w_{len(found) - len(WEIGHTS)}'] = w_GxRxIxDxE[i][0].T
  return found


@functools.cache  # the stages and seeds of a stack are one program
def _stack_programs(L, r, N, k, D, F):
  """What the files of a shape share: the layers and their gradients."""
  layers = golden.without_attention(_layers(L, r, N, k, D, F))

  def loss(params, x_TxD, keep_LxM, cotangent_TxD, weight):
    T = len(x_TxD)
    cache_LxBxTxD = jnp.zeros((L, 1, T, D), x_TxD.dtype)
    ctx = golden.context(1, T, train=True)
    with golden.watched(), _keeping(keep_LxM):
      # The cache that comes back is the input of every layer.
      out_BxTxD, aux, input_LxBxTxD = models.bind(layers, params, {})(
        x_TxD[None], ctx, golden.view(1, T), None, cache_LxBxTxD
      )
    loss = jnp.sum(out_BxTxD[0] * cotangent_TxD)
    loss += objectives.weighted({'balance': 1.0}, aux) * weight
    h_LxTxD = jnp.concatenate([input_LxBxTxD[:, 0], out_BxTxD])
    return loss, (h_LxTxD, aux)

  return layers, jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def stack(g: golden.Golden) -> None:
  """rexmoe_stack_*: layers that reuse each other's experts."""
  a = {name: _double(array) for name, array in g.arrays.items()}
  L, r, N, k = (int(a.pop(name)) for name in ('L', 'r', 'N', 'K'))
  F, D = a['w_gate'].shape[-2:]
  layers, gradients = _stack_programs(L, r, N, k, D, F)
  keep_LxM = np.zeros((L, r * N), bool)
  for l in range(L):
    keep_M = a.pop(f'keep_{l}')
    keep_LxM[l, : len(keep_M)] = keep_M
  names = [*WEIGHTS, *(f'router_w_{l}' for l in range(L))]
  weights = {name: a.pop(name) for name in names}
  table = functools.partial(_stack_table, N=N)
  params = golden.start(layers)
  for segment in params.values():  # the files' norms only normalise
    segment['moe']['norm_feed']['scale_D'] += 1
  params, unread = golden.with_weights(params, table, weights)
  assert unread == L * D  # those

  (loss, (h_LxTxD, aux)), (d_params, d_x) = jax.device_get(
    gradients(
      params, a.pop('x'), keep_LxM, a.pop('cotangent'), a.pop('aux_coef')
    )
  )
  golden.near(loss, a.pop('loss'), TOL_F32)
  found = {'x': d_x, **table(d_params)}
  found = {f'g_{name}': gradient for name, gradient in found.items()}
  expected = {name: a.pop(name) for name in found}
  golden.gradients_near(found, expected, TOL_F32)
  reports = [
    jax.tree.map(lambda b, i=i: b[i][0], segment)
    for segment in aux
    for i in np.ndindex(segment['load_E'].shape[:2])
  ]
  assert len(reports) == L
  for l, (report, step) in enumerate(
    zip(reports, golden.unstacked(aux), strict=True)
  ):
    golden.near(step.y_TxD, a.pop(f'moe_out_{l}'), TOL_F32)
    golden.near(h_LxTxD[l + 1], a.pop(f'h_{l + 1}'), TOL_F32)
    chosen = a.pop(f'topk_idx_{l}'), a.pop(f'gates_{l}')
    np.testing.assert_array_equal(report['route'], chosen[0])
    M = len(report['load_E'])
    golden.near(step.gate_TxE, golden.dense(*chosen, M), TOL_F32)
    np.testing.assert_array_equal(report['load_E'], a.pop(f'load_{l}'))
    golden.near(report['losses']['balance'], a.pop(f'aux_A_{l}'), TOL_LOSS)
  groups, first = [], 0
  for segment in layers.segments().values():
    for _ in range(segment.G):
      groups += [list(range(first, first + segment.R))] * segment.R
      first += segment.R
  assert groups == [a.pop(f'group_{l}').tolist() for l in range(L)]
  assert not a, f'unchecked: {sorted(a)}'


# --- The schedule ------------------------------------------------------------


def schedule(g: golden.Golden) -> None:
  """rexmoe_schedule_*: how many candidates a training step has."""
  a = dict(g.arrays)
  N, r, start, end = (int(a.pop(name)) for name in ('N', 'r', 't_s', 't_e'))
  stages = ','.join(f'{step}:{size}' for step, size in a.pop('step_sched'))
  steps, batch = a.pop('t').astype(np.int32), {'row_B': jnp.zeros(1, jnp.int32)}

  def number(options, step):
    router = rexmoe.Router(2, r * N, first=N, rngs=nnx.Rngs(0), **options)
    ctx = routers.context(batch, jax.random.key(0), step, train=True)
    return jnp.sum(router._keep(ctx), dtype=jnp.int32)

  for name, options in (
    ('n_linear', {'start': float(start), 'end': float(end)}),
    ('n_step', {'schedule': 'stepwise', 'stages': stages}),
  ):
    count = jit(jax.vmap(functools.partial(number, options)))
    np.testing.assert_array_equal(count(steps), a.pop(name))
  assert not a, f'unchecked: {sorted(a)}'


CHECKS = {
  'rexmoe_layer_': layer,
  'rexmoe_stack_': stack,
  'rexmoe_schedule_': schedule,
}
