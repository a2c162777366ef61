"""MomentumSMoE (arXiv 2410.14574): equal to the authors' own numbers.

A table reads the authors' arrays off our parameters, and their gradients off
ours; backwards it says where to put the authors' weights.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import (
  blocks,
  config,
  models,
  objectives,
  parallel,
  residuals,
  routers,
  trunk,
)
from tests.helpers import golden
from tests.helpers.golden import (
  jit,
  Params,
  TOL,
  TOL_AUX,
  TOL_F32,
  TOL_LOSS,
  with_weights,
)

Arrays = dict[str, np.ndarray]


def settings(g: golden.Golden) -> str:
  """The meta of a file without what differs between the seeds of a variant."""
  return json.dumps(
    {k: v for k, v in g.meta.items() if k not in ('seed', 'margin')}
  )


def take(a: Arrays, prefix: str) -> Arrays:
  """Takes the arrays with this prefix out of `a`; their names lose it."""
  names = [name for name in a if name.startswith(prefix)]
  return {name.removeprefix(prefix): a.pop(name) for name in names}


def rule(meta: dict[str, Any]) -> dict[str, Any]:
  """The residual rule and its options, as a config line says them."""
  hp = meta.get('hp', meta)
  name = meta['variant'].removeprefix('lm_').removeprefix('glam_')
  name = name.removeprefix('vmoe_').split('_')[0]
  if name in ('smoe', 'base'):
    return config.choice('residual', 'plain')
  if name == 'mom':
    gamma = hp['gamma2'] if 'gamma2' in hp else hp['gamma']
    return config.choice(
      'residual', 'heavy_ball', mu=hp['mu'], gamma=gamma, sign=-1.0
    )
  if name == 'robust':  # the authors reuse the flags of heavy ball
    return config.choice('residual', 'robust', rho=hp['mu'], kappa=hp['gamma'])
  if name == 'complex':
    return config.choice(
      'residual', 'complex', b1=hp['beta1'], b2=hp['beta2'], gamma=hp['gamma2']
    )
  assert name in ('adam', 'adamall'), name
  return config.choice(
    'residual',
    'adam',
    gamma=hp['gamma1'],
    b1=hp['beta1'],
    b2=hp['beta2'],
    mu=hp['mu'],
    momentum_gamma=hp['gamma2'],
    layers='all' if name == 'adamall' else 'first',
  )


@dataclasses.dataclass
class Seen:
  """What passed through one call's layers, layer by layer.

  Attributes:
    h_TxD, gate_TxE, y_TxD: into the experts, and their answer.
    joined: what the residual rule answered, (x_TxD, memory).
    ahead: the memories that it looked ahead with.
  """

  h_TxD: list[Any] = dataclasses.field(default_factory=list)
  gate_TxE: list[Any] = dataclasses.field(default_factory=list)
  y_TxD: list[Any] = dataclasses.field(default_factory=list)
  joined: list[Any] = dataclasses.field(default_factory=list)
  ahead: list[Any] = dataclasses.field(default_factory=list)


def watched(layers: trunk.Trunk) -> Callable[[], Seen]:
  """Watches the layers; returns what gives the Seen of the last call.

  The layers then are called in compiled functions alone.
  """
  spec, rule, log = layers.spec, layers.spec.residual, []

  def note(kind, *arrays):
    keep = lambda *arrays: log.append((kind, jax.tree.map(_whole, arrays)))
    jax.debug.callback(keep, *jax.tree.map(_halves, arrays), ordered=True)

  class Watching(parallel.Layout):
    def __call__(self, h_TxD, plan, experts):
      y_TxD, overflow = super().__call__(h_TxD, plan, experts)
      note('step', h_TxD, plan, y_TxD)
      return y_TxD, overflow

  def apply(*operands):
    joined = rule.apply(*operands)
    note('joined', *joined)
    return joined

  def lookahead(h_TxD, memory):
    note('ahead', memory)
    return rule.lookahead(h_TxD, memory)

  def last():
    jax.effects_barrier()
    seen = Seen()
    for kind, arrays in log:
      if kind == 'step':
        h_TxD, plan, y_TxD = arrays
        seen.h_TxD.append(h_TxD)
        seen.gate_TxE.append(golden.gates(plan))
        seen.y_TxD.append(y_TxD)
      elif kind == 'joined':
        seen.joined.append(arrays)
      else:
        seen.ahead.append(*arrays)
    log.clear()
    return seen

  layers.spec = dataclasses.replace(
    spec,
    layout=Watching(),
    residual=residuals.Residual(rule.init, apply, lookahead),
  )
  return last


# The thread of a callback may have no float64.


def _halves(a):
  return jax.lax.bitcast_convert_type(a, jnp.uint32) if _is_wide(a) else a


def _whole(a):
  a = np.array(a)
  return a.view(np.float64)[..., 0] if a.dtype == np.uint32 else a


def _is_wide(a):
  return a.dtype == jnp.float64


def same_choice(gate_NxTxE: np.ndarray, route_NxTxK: Any, a: Arrays) -> None:
  """The experts of every token, and their weights."""
  expert_NxTxK, gate_NxTxK = a.pop('topk_idx'), a.pop('topk_weight')
  np.testing.assert_array_equal(np.sort(route_NxTxK), np.sort(expert_NxTxK))
  dense_NxTxE = [
    golden.dense(*chosen, gate_NxTxE.shape[-1])
    for chosen in zip(expert_NxTxK, gate_NxTxK, strict=True)
  ]
  golden.near(gate_NxTxE, np.stack(dense_NxTxE), TOL)


def router_logits(body: Params, h_NxTxD: list[Any]) -> np.ndarray:
  """[MoE layers, T, E]: of what the experts and so the routers saw."""
  router = body['moe']['feed']['routers']  # over [G, 1, 1]
  logits_NxTxE = []
  for n, h_TxD in enumerate(h_NxTxD):
    logits_TxE = routers.logits(h_TxD, router['w_DxE'][n, 0, 0])
    if 'bias_logit_E' in router:
      logits_TxE += router['bias_logit_E'][n, 0, 0][None]
    logits_NxTxE.append(logits_TxE)
  return np.stack(logits_NxTxE)


def part(stacked: Params, *place: int) -> Params:
  """The params at that place of their leading axes."""
  return jax.tree.map(lambda a: a[place], stacked)


def turned(a: Any) -> Any:
  """[.., in, out] of [.., out, in], as torch has it, or back."""
  return a.swapaxes(-1, -2)


# --- A stack of MoE layers ---------------------------------------------------


def _stack(meta: dict[str, Any]) -> trunk.Trunk:
  fields = dict(
    N=meta['L'],
    D=meta['D'],
    E=meta['E'],
    expert_F=meta['F'],
    block='momentum_lm_preln' if meta['preln'] else 'momentum_lm',
    residual=rule(meta),
    router=config.router('topk', k=meta['K'], bias=True, init='torch'),
    norm='layer',
    eps=1e-5,
    activation='relu',
    bias=True,
    init='momentum_smoe',
  )
  return golden.without_attention(golden.layers(fields))


def _stack_table(params: Params) -> dict[str, Any]:
  """Ours are over [G, R = 1], routers over [G, R, I = 1], experts over [G]."""
  moe, experts = params['body']['moe'], params['body']['pools']
  router = moe['feed']['routers']
  return {
    'exp_w1': turned(experts['up_ExDxF']),
    'exp_b1': experts['bias_up_ExF'],
    'exp_w2': turned(experts['down_ExFxD']),
    'exp_b2': experts['bias_down_ExD'],
    'router': turned(router['w_DxE'][:, 0, 0]),
    'router_b': router['bias_logit_E'][:, 0, 0],
    'ln_inner_w': moe['norm_inner']['scale_D'][:, 0],
    'ln_inner_b': moe['norm_inner']['bias_D'][:, 0],
    'ln_outer_w': moe['norm_feed']['scale_D'][:, 0],
    'ln_outer_b': moe['norm_feed']['bias_D'][:, 0],
  }


@functools.cache  # the seeds of a variant are one program
def _compiled_stack(text, balance):
  """(layers, a function of them, Seen).

  (params, x, cotangent, weight of the balance loss) -> the answer, aux, the
  layers' inputs, and the gradients of params and x.
  """
  meta = json.loads(text)
  layers = _stack(meta)
  last = watched(layers)

  @jit
  def run(params, x_BxLxD, cotangent_BxLxD, weight):
    def loss(params, x_BxLxD):
      B, L = x_BxLxD.shape[:2]
      bound = models.bind(layers, params, {})
      ctx = golden.context(B, L, train=True)
      view = golden.view(B, L)
      # A trunk's cache is of its layers' inputs.
      zeros_NxBxLxD = jnp.zeros((meta['L'], *x_BxLxD.shape))
      out_BxLxD, aux, h_NxBxLxD = bound(x_BxLxD, ctx, view, cache=zeros_NxBxLxD)
      loss = jnp.sum(out_BxLxD * cotangent_BxLxD)
      # Theirs divides the probabilities by the choices T k, not by T.
      balancing = objectives.weighted({'balance': balance / meta['K']}, aux)
      return loss + weight * balancing, (out_BxLxD, aux[0], h_NxBxLxD)

    slopes, kept = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BxLxD)
    return *kept, slopes

  return layers, run, last


def stack(g: golden.Golden) -> None:
  """momentum_*: each layer's arrays, and all gradients, of three layers."""
  a, meta = dict(g.arrays), g.meta
  a.pop('meta')  # settings, all of which are in `_stack`
  balance = float(a.pop('bal_coeff', 0.0))
  like, run, last = _compiled_stack(settings(g), balance)
  params, unread = with_weights(golden.start(like), _stack_table, take(a, 'w_'))
  assert not unread
  x_BxLxD, cotangent_BxLxD = a.pop('x'), a.pop('R')
  B, L, D = x_BxLxD.shape

  checks = [('g_', 0.0, TOL)]
  if balance:
    checks.append(('gbal_', 1.0, TOL_AUX))
  for prefix, weight, tol in checks:
    out_BxLxD, aux, h_NxBxLxD, (d_params, d_x_BxLxD) = jax.device_get(
      run(params, x_BxLxD, cotangent_BxLxD, weight)
    )
    seen = last()
    found = {**_stack_table(d_params), 'x': d_x_BxLxD}
    golden.gradients_near(found, take(a, prefix), tol)
  golden.near(out_BxLxD, a.pop('out'), TOL)
  golden.near(out_BxLxD, a.pop('out_f32'), TOL_F32)
  if balance:
    loss_N = aux['losses']['balance'][:, 0, 0] / meta['K']
    golden.near(loss_N, a.pop('bal_loss'), TOL_LOSS)

  rows = lambda arrays: np.stack(arrays).reshape(-1, B, L, D)
  golden.near(h_NxBxLxD, a.pop('h_in'), TOL)
  golden.near(rows([*h_NxBxLxD[1:], out_BxLxD]), a.pop('h_out'), TOL)
  golden.near(rows(seen.h_TxD), a.pop('moe_in'), TOL)
  golden.near(rows(seen.y_TxD), a.pop('core_out'), TOL)
  answers, memories = zip(*seen.joined, strict=True)
  if not meta['preln']:
    bound = models.bind(like, params, {})
    layer = lambda n: blocks.at(blocks.at(bound.body.moe, n), 0)
    answers = [layer(n).norm_inner(x) for n, x in enumerate(answers)]
  golden.near(rows(answers), a.pop('smoe_out'), TOL)
  for name, memory in _states(meta, memories).items():
    golden.near(rows(memory), a.pop(name), TOL)

  logits_NxTxE = router_logits(params['body'], seen.h_TxD)
  golden.near(logits_NxTxE, a.pop('router_logits'), TOL)
  gate_NxTxE = np.stack(seen.gate_TxE)
  golden.near(gate_NxTxE, a.pop('combine'), TOL)
  same_choice(gate_NxTxE, aux['route'][:, 0, 0], a)
  assert not a, f'unchecked: {sorted(a)}'


def _states(meta, memories):
  """{the file's name: of each layer}."""
  name = rule(meta)['name']
  if name == 'plain':
    return {}
  if name == 'adam':
    p, v, m = zip(*memories, strict=True)
    return {'state_p': p, 'state_v': v, 'state_m': m}
  if name == 'complex':
    memories = [np.asarray(re) + 1j * np.asarray(im) for re, im in memories]
  return {'state_m': memories}


# --- The language model ------------------------------------------------------

# Norms that the authors' blocks have and do not use; ours do not have them.
UNUSED = {'m': 'norm3', 'd': 'norm2'}


def _kinds(meta) -> str:
  """Of each layer, m or d: in their string s is attention, f a dense layer."""
  return ''.join('d' if kind == 'f' else 'm' for kind in meta['arch'][1::2])


def _lm_fields(meta):
  kinds = _kinds(meta)
  return dict(
    N=len(kinds),
    D=meta['D'],
    H=meta['heads'],
    F=meta['F'],
    E=meta['E'],
    expert_F=meta['F'],
    pattern='md' if 'd' in kinds else 'm',
    block='momentum_lm',
    residual=rule(meta),
    router=config.router('topk', k=meta['K'], bias=True, init='torch'),
    attention=config.attend('adaptive_span', span=meta['span']),
    norm='layer',
    eps=1e-5,
    activation='relu',
    bias=True,
    tied=False,
    init='momentum_smoe',
  )


def _lm_table(params: Params, meta: dict[str, Any]) -> dict[str, Any]:
  """torch's names; their layers are ours, in order."""
  body = params['trunk']['body']
  flat = lambda a_DxHxS: a_DxHxS.reshape(len(a_DxHxS), -1).T
  found = {
    'key_pe': params['trunk']['position_SxP'][None],
    'in_emb.weight': params['embed_VxD'],
    'out_emb.weight': params['head_DxV'].T,
    'out_emb.bias': params['bias_V'],
  }
  kinds = _kinds(meta)
  for i, kind in enumerate(kinds):
    n = kinds[:i].count('m') - (kind == 'd')  # its place among the periods
    layer = (
      part(body['moe'], n, 0) if kind == 'm' else part(body['dense'], n, 0, 0)
    )
    heads, feed = layer['attention'], layer['feed']
    own = {
      'attn.proj_query.weight': flat(heads['query_DxHxS']),
      'attn.proj_key.weight': flat(heads['key_DxHxS']),
      'attn.proj_val.weight': flat(heads['value_DxHxS']),
      'attn.proj_out.weight': heads['out_HxSxD'].reshape(-1, meta['D']).T,
      'norm1.weight': layer['norm_attention']['scale_D'],
      'norm1.bias': layer['norm_attention']['bias_D'],
    }
    if kind == 'm':
      router, experts = part(feed['routers'], 0), part(body['pools'], n)
      own |= {
        'smoe.gate.gate.weight': router['w_DxE'].T,
        'smoe.gate.gate.bias': router['bias_logit_E'],
        'smoe.experts.htoh4.weight': turned(experts['up_ExDxF']),
        'smoe.experts.htoh4.bias': experts['bias_up_ExF'],
        'smoe.experts.h4toh.weight': turned(experts['down_ExFxD']),
        'smoe.experts.h4toh.bias': experts['bias_down_ExD'],
        'smoe.layer_norm.weight': layer['norm_inner']['scale_D'],
        'smoe.layer_norm.bias': layer['norm_inner']['bias_D'],
        'norm2.weight': layer['norm_feed']['scale_D'],
        'norm2.bias': layer['norm_feed']['bias_D'],
      }
    else:
      one = part(feed['one'], 0)
      own |= {
        'ff.fc1.weight': one['up_ExDxF'].T,
        'ff.fc1.bias': one['bias_up_ExF'],
        'ff.fc2.weight': one['down_ExFxD'].T,
        'ff.fc2.bias': one['bias_down_ExD'],
        'norm3.weight': layer['norm_feed']['scale_D'],
        'norm3.bias': layer['norm_feed']['bias_D'],
      }
    found |= {f'layers.{i}.{name}': value for name, value in own.items()}
  return found


@functools.cache
def _compiled_lm(text):
  """(model, params -> (loss, (metrics, logits, cache)), gradients, Seen)."""
  meta = json.loads(text)
  model = golden.shapes('decoder', _lm_fields(meta), V=meta['vocab'])
  last = watched(model.trunk)
  loss = objectives.get('next_token', losses={})

  @jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def gradients(params, batch, cache_NxBxCxD):
    kept = []

    def forward(batch, pass_):
      ctx = golden.context(*batch['ids_BxL'].shape, train=True)
      bound = models.bind(model, params, {})
      logits_BxLxV, aux, cache = bound.forward_with_cache(
        batch, ctx, cache_NxBxCxD
      )
      kept.extend([logits_BxLxV, cache])
      return logits_BxLxV, aux

    total, metrics = loss(forward, batch)
    return total, (metrics, *kept)

  return model, gradients, last


def language_model(g: golden.Golden) -> None:
  """momentum_lm_*: a block of text after its cache; all gradients."""
  a, meta = dict(g.arrays), g.meta
  a.pop('meta')  # settings, all of which are in `_lm_fields`
  weights, expected = take(a, 'p/'), take(a, 'g/')
  for i, kind in enumerate(_kinds(meta)):
    for name in ('weight', 'bias'):
      unused = f'layers.{i}.{UNUSED[kind]}.{name}'
      del weights[unused]
      assert not expected.pop(unused).any(), unused
  like, gradients, last = _compiled_lm(settings(g))
  table = functools.partial(_lm_table, meta=meta)
  params, unread = with_weights(golden.start(like), table, weights)
  assert not unread

  ids_BxL = a.pop('X').astype(np.int32)
  B, L = ids_BxL.shape
  batch = {
    'ids_BxL': ids_BxL,
    'target_BxL': a.pop('Y').astype(np.int32),
    'segment_BxL': np.zeros((B, L), np.int32),
    'mask_BxL': np.ones((B, L), bool),
  }
  (loss, kept), d_params = jax.device_get(
    gradients(params, batch, a.pop('h_cache'))
  )
  metrics, logits_BxLxV, next_NxBxCxD = kept
  seen = last()
  golden.near(loss, a.pop('loss'), TOL)
  golden.near(next_NxBxCxD, a.pop('h_cache_next'), TOL)
  log_BxLxV = golden.log_softmax(logits_BxLxV)
  golden.near(log_BxLxV, a.pop('log_probs'), TOL)
  golden.near(log_BxLxV, a.pop('log_probs_f32'), TOL_F32)
  golden.gradients_near(table(d_params), expected, TOL)

  logits_NxTxE = router_logits(params['trunk']['body'], seen.h_TxD)
  golden.near(logits_NxTxE, a.pop('router_logits'), TOL)
  route_NxTxK = metrics['aux'][0]['route'][:, 0, 0]
  same_choice(np.stack(seen.gate_TxE), route_NxTxK, a)
  assert not a, f'unchecked: {sorted(a)}'


# --- The vision transformer --------------------------------------------------


def _encoder(meta: dict[str, Any]) -> nnx.Module:
  """A classifier of S - 1 patches; the files have only what encodes them."""
  assert meta['moe_layers'] == list(range(1, meta['L'], 2))
  assert not meta['noise_std']
  fields = dict(
    N=meta['L'],
    D=meta['D'],
    H=meta['heads'],
    F=meta['F'],
    E=meta['E'],
    expert_F=meta['F'],
    pattern='dm',
    block='vmoe' if meta['momentum'] else 'pre',
    residual=rule(meta),
    router=config.router(
      'vmoe', k=meta['K'], noise=0.0, group=meta['group_size']
    ),
    eps=1e-6,
    patch=1,
  )
  buffer_factor = {'capacity': 1.05, 'eval_capacity': 4.0}
  for name, default in buffer_factor.items():  # the files are of these two
    assert fields['router'][name] == default
  size = (1, meta['S'] - 1, 1)
  return golden.shapes('classifier', fields, V=1, size=size)


def _encoder_table(params: Params, meta: dict[str, Any]) -> dict[str, Any]:
  """Flax's names; kernels are [in, out] as ours."""
  body = params['trunk']['body']
  found = {
    'posembed_input/pos_embedding': params['position_LxD'][None],
    'encoder_norm/scale': params['norm']['scale_D'],
    'encoder_norm/bias': params['norm']['bias_D'],
  }
  for i in range(meta['L']):
    routed = i in meta['moe_layers']
    layer = (
      part(body['moe'], i // 2, 0)
      if routed
      else part(body['dense'], i // 2, 0, 0)
    )
    heads, own = layer['attention'], {}
    for name in ('query', 'key', 'value'):
      own[f'SelfAttention/{name}/kernel'] = heads[f'{name}_DxHxS']
      own[f'SelfAttention/{name}/bias'] = heads[f'bias_{name}_HxS']
    own['SelfAttention/out/kernel'] = heads['out_HxSxD']
    own['SelfAttention/out/bias'] = heads['bias_out_D']
    norms = ['norm_attention', 'norm_feed']
    if meta['momentum']:
      norms.append('norm_after')
    for n, name in enumerate(norms):
      own[f'LayerNorm_{n}/scale'] = layer[name]['scale_D']
      own[f'LayerNorm_{n}/bias'] = layer[name]['bias_D']
    if routed:
      feed, at = part(body['pools'], i // 2), 'Moe/Mlp'
      own['Moe/Router/dense/kernel'] = layer['feed']['routers']['w_DxE'][0]
    else:
      feed, at = part(layer['feed']['one'], 0), 'Mlp'
    own |= {
      f'{at}/Dense_0/kernel': feed['up_ExDxF'],
      f'{at}/Dense_0/bias': feed['bias_up_ExF'],
      f'{at}/Dense_1/kernel': feed['down_ExFxD'],
      f'{at}/Dense_1/bias': feed['bias_down_ExD'],
    }
    found |= {f'encoderblock_{i}/{name}': a for name, a in own.items()}
  return found


@functools.cache
def _compiled_encoder(text):
  """(model, a function of it, Seen).

  (params, x, its cotangents of the answer and of the loss) -> the answer, the
  loss, aux, the layers' answers, and the gradients of params and x.
  """
  meta = json.loads(text)
  model = _encoder(meta)
  last = watched(model.trunk)

  @jit
  def run(params, x_BxLxD, cotangents):
    def forward(params, x_BxLxD):
      bound = models.bind(model, params, {})
      layers, outs = bound.trunk, []

      def with_outs(x_BxLxD, ctx, view):
        # A trunk's cache is of its layers' inputs.
        zeros_NxBxLxD = jnp.zeros((meta['L'], *x_BxLxD.shape))
        last_BxLxD, aux, h_NxBxLxD = layers(
          x_BxLxD, ctx, view, cache=zeros_NxBxLxD
        )
        outs.extend([*h_NxBxLxD[1:], last_BxLxD])
        return last_BxLxD, aux, None

      bound.trunk = with_outs
      out_BxLxD, aux = bound.encode(
        x_BxLxD, _ctx(meta), jnp.zeros((len(x_BxLxD), 1), jnp.int32)
      )
      loss = objectives.weighted({'importance': meta['importance_w']}, aux)
      return (out_BxLxD, loss), (aux[0], outs)

    (out_BxLxD, loss), vjp, kept = jax.vjp(
      forward, params, x_BxLxD, has_aux=True
    )
    return out_BxLxD, loss, *kept, vjp(cotangents)

  return model, run, last


def _ctx(meta):
  """The router's capacity is 1.05 in training and 4 out of it; no noise."""
  train = {1.05: True, 4.0: False}[meta['capacity_factor']]
  return golden.context(meta['B'], meta['S'], train=train)


def encoder(g: golden.Golden) -> None:
  """momentum_vmoe_*: each layer's arrays, and all gradients."""
  a, meta = dict(g.arrays), g.meta
  a.pop('meta')  # settings, all of which are in `_encoder` and `_ctx`
  like, run, last = _compiled_encoder(settings(g))
  table = functools.partial(_encoder_table, meta=meta)
  params, unread = with_weights(golden.start(like), table, take(a, 'p/'))
  # The patches' map, the class token and the head.
  outside = ('patch_PxD', 'bias_D', 'class_D', 'head_DxV', 'bias_V')
  assert unread == sum(params[name].size for name in outside)
  x_BxLxD, cotangent_BxLxD = a.pop('x'), a.pop('R')
  B, L, D = x_BxLxD.shape

  zeros_BxLxD = np.zeros_like(cotangent_BxLxD)
  *_, (d_loss, _) = jax.device_get(run(params, x_BxLxD, (zeros_BxLxD, 1.0)))
  last()
  out_BxLxD, loss, aux, outs, (d_params, d_x_BxLxD) = jax.device_get(
    run(params, x_BxLxD, (cotangent_BxLxD, 0.0))
  )
  seen = last()
  golden.near(out_BxLxD, a.pop('out'), TOL)
  golden.near(loss[None], a.pop('aux'), TOL_LOSS)
  found = {**table(d_params), 'x': d_x_BxLxD}
  expected = {**take(a, 'g/'), 'x': a.pop('g_x')}
  golden.gradients_near(found, expected, TOL)
  expected = take(a, 'gaux/')  # of the routers alone
  assert len(expected) == len(meta['moe_layers'])
  found = {name: table(d_loss)[name] for name in expected}
  golden.gradients_near(found, expected, TOL_LOSS)

  for i, out_BxLxD in enumerate(outs):
    golden.near(out_BxLxD, a.pop(f'i/encoderblock_{i}/out'), TOL)
  if meta['momentum']:
    # What the next layer looks ahead with, be it dense or MoE.
    moments = [*seen.ahead[1:], seen.joined[-1][1]]
    for i, m_TxD in enumerate(moments):
      expected = a.pop(f'i/encoderblock_{i}/moment')
      golden.near(m_TxD.reshape(B, L, D), expected, TOL)
  logits_NxTxE = router_logits(params['trunk']['body'], seen.h_TxD)
  for n, i in enumerate(meta['moe_layers']):
    name = f'i/encoderblock_{i}/Moe'
    y_BxLxD = seen.y_TxD[n].reshape(B, L, D)
    golden.near(y_BxLxD, a.pop(f'{name}/out'), TOL)
    logits_TxE = a.pop(f'{name}/Router/dense/logits')[0]  # of one group
    golden.near(logits_NxTxE[n], logits_TxE, TOL)
    chosen_TxK = np.argsort(logits_TxE)[:, -meta['K'] :]
    np.testing.assert_array_equal(
      np.sort(aux['route'][n, 0, 0]), np.sort(chosen_TxK)
    )
  # Else the files would not tell one way of dropping from another.
  assert np.any(aux['dropped']) == (meta['capacity_factor'] < 4)
  assert not a, f'unchecked: {sorted(a)}'


CHECKS = {
  'momentum_': stack,
  'momentum_lm_': language_model,
  'momentum_vmoe_': encoder,
}
