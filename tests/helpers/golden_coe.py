"""Chain-of-Experts (arXiv 2506.18945): equal to the authors' own numbers.

A table reads the authors' arrays off our parameters. It reads gradients off
ours as well and, backwards, says where to put the authors' weights.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config, models, objectives, routers
from tests.helpers import golden
from tests.helpers.golden import jit, TOL, TOL_AUX, TOL_F32, TOL_LOSS


def _fields(meta: dict[str, Any]) -> dict[str, Any]:
  """The authors' flags as a config says them; the defaults are theirs."""
  inner = meta.get('inner_residual', True)
  outer = meta.get('outer_residual', False)
  return dict(
    D=meta['D'],
    E=meta['E'],
    expert_F=meta['F'],
    shared_F=meta['F'] * meta['n_shared'],
    iterations=meta['inner_iter'],
    routing='each' if meta.get('use_igate', True) else 'shared',
    inner_residual='add' if inner else 'replace',
    residual=config.choice('residual', 'plain' if outer else 'replace'),
    router=config.router(
      'topk',
      k=meta['K'],
      renormalise=meta.get('norm_topk_prob', False),
      scale=meta.get('routed_scaling_factor', 1.0),
      init='torch',
    ),
    activation='swiglu',
    norm='rms',
    eps=meta['rms_eps'],
  )


def _losses(meta):
  kind = 'sequence_balance' if meta.get('seq_aux', True) else 'balance'
  return {kind: meta['aux_alpha']}


# --- One layer ---------------------------------------------------------------


def _layer_table(params: golden.Params) -> dict[str, Any]:
  """The authors' arrays of a layer: theirs are [out, in], ours [in, out]."""
  moe, experts = params['body']['moe'], params['body']['pools']
  feed = jax.tree.map(lambda a: a[0, 0], moe['feed'])  # pool 0, layer 0
  found = {
    'rmsnorm': moe['norm_feed']['scale_D'][0, 0],
    'router': feed['routers']['w_DxE'].swapaxes(-1, -2),  # [I, E, D]
    'exp_gate_proj': experts['gate_ExDxF'][0].swapaxes(-1, -2),
    'exp_up_proj': experts['up_ExDxF'][0].swapaxes(-1, -2),
    'exp_down_proj': experts['down_ExFxD'][0].swapaxes(-1, -2),
  }
  if 'shared' in feed:
    one = feed['shared']['one']
    found['shared_gate_proj'] = one['gate_ExDxF'][0].T
    found['shared_up_proj'] = one['up_ExDxF'][0].T
    found['shared_down_proj'] = one['down_ExFxD'][0].T
  return found


@functools.cache
def _program(settings: str):
  """(layers, a function of them), which the seeds of a variant share.

  (params, x, cotangent, weight of the auxiliary loss) -> the answer in
  training and its aux, the routers' logits, the answer out of training, and
  the gradients of params and x.
  """
  meta = json.loads(settings)
  layers = golden.without_attention(golden.layers({'N': 1, **_fields(meta)}))

  def forward(params, x_BxLxD, train):
    B, L, _ = x_BxLxD.shape
    ctx = golden.context(B, L, train=train)
    with golden.watched():
      bound = models.bind(layers, params, {})
      out_BxLxD, aux, _ = bound(x_BxLxD, ctx, golden.view(B, L))
    return out_BxLxD, aux

  @jit
  def run(params, x_BxLxD, cotangent_BxLxD, weight):
    def loss(params, x_BxLxD):
      out_BxLxD, aux = forward(params, x_BxLxD, train=True)
      loss = jnp.sum(out_BxLxD * cotangent_BxLxD)
      loss += weight * objectives.weighted(_losses(meta), aux)
      return loss, (out_BxLxD, aux)

    slopes, (out_BxLxD, aux) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
      params, x_BxLxD
    )
    eval_BxLxD, _ = forward(params, x_BxLxD, train=False)
    return out_BxLxD, aux, _logits(params, aux, meta), eval_BxLxD, slopes

  return layers, run


def _logits(params, aux, meta):
  """[I, T, E]: of what the routers saw."""
  w_IxDxE = params['body']['moe']['feed']['routers']['w_DxE'][0, 0]
  h_IxTxD, _, _ = aux[0]['steps']
  logits_IxTxE = [
    routers.logits(h_TxD, w_IxDxE[i if meta['use_igate'] else 0])
    for i, h_TxD in enumerate(h_IxTxD[0, 0])
  ]
  return jnp.stack(logits_IxTxE)


def _settings(meta: dict[str, Any]) -> str:
  """What is the same for all seeds of a variant."""
  return json.dumps(
    {k: v for k, v in meta.items() if k not in ('seed', 'margin')}
  )


def layer(g: golden.Golden) -> None:
  """coe_it*: outputs, routing, losses and all gradients of one layer."""
  a, meta = dict(g.arrays), g.meta
  a.pop('meta')  # settings, see `_fields`
  layers, run = _program(_settings(meta))
  weights = {k[2:]: a.pop(k) for k in list(a) if k.startswith('w_')}
  params, unread = golden.with_weights(
    golden.start(layers), _layer_table, weights
  )
  assert not unread
  x_BxLxD, cotangent_BxLxD = a.pop('x'), a.pop('R')

  for prefix, weight, tol in (
    ('g_', 1.0, TOL_AUX),
    ('gna_', 0.0, TOL),
  ):
    out_BxLxD, aux, logits_IxTxE, eval_BxLxD, (d_params, d_x) = jax.device_get(
      run(params, x_BxLxD, cotangent_BxLxD, weight)
    )
    expected = {k: a.pop(k) for k in list(a) if k.startswith(prefix)}
    found = {**_layer_table(d_params), 'x': d_x}
    found = {prefix + name: gradient for name, gradient in found.items()}
    golden.gradients_near(found, expected, tol)
  golden.near(out_BxLxD, a.pop('out'), TOL)
  golden.near(out_BxLxD, a.pop('out_f32'), TOL_F32)
  ((kind, alpha),) = _losses(meta).items()
  loss_I = alpha * aux[0]['losses'][kind][0, 0]
  golden.near(loss_I, a.pop('aux_loss'), TOL_LOSS)
  golden.near(eval_BxLxD, a.pop('out_eval'), TOL)

  found = golden.unstacked(aux)
  h_IxTxD = np.stack([step.h_TxD for step in found])
  golden.near(h_IxTxD.reshape(-1, *x_BxLxD.shape), a.pop('iter_in'), TOL)
  gate_IxTxE = np.stack([step.gate_TxE for step in found])
  golden.near(gate_IxTxE, a.pop('combine'), TOL)
  _same_experts(aux[0]['route'][0, 0], a['topk_idx'])
  chosen_I = zip(a.pop('topk_idx'), a.pop('topk_weight'), strict=True)
  for gate_TxE, chosen in zip(gate_IxTxE, chosen_I, strict=True):
    golden.near(gate_TxE, golden.dense(*chosen, meta['E']), TOL)
  golden.near(logits_IxTxE, a.pop('router_logits'), TOL)
  probs_IxTxE = np.exp(golden.log_softmax(logits_IxTxE))
  golden.near(probs_IxTxE, a.pop('router_probs'), TOL)
  assert not a, f'unchecked: {sorted(a)}'


def _same_experts(found, expected):
  """The same sets of experts, whatever their order."""
  np.testing.assert_array_equal(np.sort(found), np.sort(expected))


# --- A model -----------------------------------------------------------------


def _model_table(params: golden.Params, meta: dict[str, Any]) -> dict[str, Any]:
  """torch's names: [out, in], a module for each expert and iteration."""
  H, Z, P = meta['heads'], meta['kv_lora'], meta['qk_rope']
  stack = params['trunk']['body']
  experts = stack['pools']
  flat = lambda a_XxHxS: a_XxHxS.reshape(len(a_XxHxS), -1).T
  found = {
    'model.embed_tokens.weight': params['embed_VxD'],
    'model.norm.weight': params['norm']['scale_D'],
    'lm_head.weight': params['head_DxV'].T,
  }
  for l in range(2):
    moe = jax.tree.map(lambda a, l=l: a[l, 0], stack['moe'])
    mla, feed = moe['attention'], moe['feed']
    one = feed['shared']['one']
    # Each head's values follow its keys; the rotated key follows the latent.
    key_value = np.concatenate([mla['key_ZxHxW'], mla['value_ZxHxU']], axis=-1)
    assert key_value.shape[:2] == (Z, H)
    own = {
      'input_layernorm': moe['norm_attention']['scale_D'],
      'post_attention_layernorm': moe['norm_feed']['scale_D'],
      'self_attn.q_proj': flat(mla['query_DxHxS']),
      'self_attn.kv_a_proj_with_mqa': np.concatenate(
        [mla['latent_DxZ'], mla['key_DxP']], axis=1
      ).T,
      'self_attn.kv_a_layernorm': mla['norm_latent']['scale_D'],
      'self_attn.kv_b_proj': flat(key_value),
      'self_attn.o_proj': mla['out_HxUxD'].reshape(-1, meta['D']).T,
      'mlp.shared_experts.gate_proj': one['gate_ExDxF'][0].T,
      'mlp.shared_experts.up_proj': one['up_ExDxF'][0].T,
      'mlp.shared_experts.down_proj': one['down_ExFxD'][0].T,
    }
    assert mla['key_DxP'].shape[1] == P
    for i in range(meta['inner_iter']):
      own[f'mlp.gate.{i}'] = feed['routers']['w_DxE'][i].T
    for e in range(meta['E']):
      own[f'mlp.experts.{e}.gate_proj'] = experts['gate_ExDxF'][l, e].T
      own[f'mlp.experts.{e}.up_proj'] = experts['up_ExDxF'][l, e].T
      own[f'mlp.experts.{e}.down_proj'] = experts['down_ExFxD'][l, e].T
    for name, value in own.items():
      found[f'model.layers.{l}.{name}.weight'] = value
  return found


def _model_fields(meta):
  yarn = meta['rope_scaling'] or {}
  names = ('beta_fast', 'beta_slow', 'mscale', 'mscale_all_dim')
  options = {f'yarn_{name}': float(yarn[name]) for name in names if yarn}
  if yarn:
    options['yarn_factor'] = float(yarn['factor'])
    options['yarn_length'] = yarn['original_max_position_embeddings']
  latent = config.attend(
    'mla',
    nope=meta['qk_nope'],
    rope=meta['qk_rope'],
    value=meta['v_head'],
    rank=meta['kv_lora'],
    theta=meta['rope_theta'],
    **options,
  )
  fields = _fields(meta)
  return dict(fields, N=2, H=meta['heads'], attention=latent, tied=False)


@functools.cache
def _model_program(settings: str):
  """(model, the loss and the gradients of the params), as of `_program`."""
  meta = json.loads(settings)
  # The other model is enough for the CPU's kernel.
  gmm = 'xla' if meta['rope_scaling'] else 'cpu'
  model = golden.shapes('decoder', _model_fields(meta), gmm=gmm, V=meta['V'])
  next_token = objectives.get('next_token', losses=_losses(meta))

  def loss(params, batch):
    def forward(batch, pass_):
      ctx = golden.context(*batch['ids_BxL'].shape, train=True)
      with golden.watched():
        found.append(models.bind(model, params, {})(batch, ctx))
      return found[0]

    found = []
    loss, metrics = next_token(forward, batch)
    return loss, (metrics, found[0][0])

  return model, jit(jax.value_and_grad(loss, has_aux=True))


def model(g: golden.Golden) -> None:
  """coe_model_*: logits, routing, losses and all gradients of a model."""
  a = dict(g.arrays)
  a.pop('meta')  # settings, see `_model_fields`
  weights = {k[2:]: a.pop(k) for k in list(a) if k.startswith('p/')}
  expected = {k[2:]: a.pop(k) for k in list(a) if k.startswith('g/')}
  V, D = weights['lm_head.weight'].shape
  meta = {**g.meta, 'V': V, 'D': D}
  like, gradients = _model_program(_settings(meta))
  table = functools.partial(_model_table, meta=meta)
  params, unread = golden.with_weights(golden.start(like), table, weights)
  assert not unread
  ids_BxL = a.pop('input_ids').astype(np.int32)
  (B, L), place_L = ids_BxL.shape, np.arange(ids_BxL.shape[1])
  batch = {
    'ids_BxL': ids_BxL,
    'segment_BxL': np.zeros((B, L), np.int32),
    'target_BxL': np.roll(ids_BxL, -1, axis=1),
    'mask_BxL': np.broadcast_to(place_L < L - 1, (B, L)),
  }

  (total, (metrics, logits_BxLxV)), d_params = jax.device_get(
    gradients(params, batch)
  )
  golden.gradients_near(table(d_params), expected, TOL_AUX)
  loss = metrics['nll_sum'] / metrics['tokens']
  golden.near(loss, a.pop('loss'), TOL)
  (aux,), ((kind, alpha),) = metrics['aux'], _losses(meta).items()
  golden.near(total - loss, np.sum(a['aux_loss']), TOL_LOSS)
  golden.near(alpha * aux['losses'][kind][:, 0], a.pop('aux_loss'), TOL_LOSS)

  golden.near(logits_BxLxV, a.pop('logits'), TOL)
  golden.near(logits_BxLxV, a.pop('logits_f32'), TOL_F32)
  _same_experts(aux['route'][:, 0], a['topk_idx'])
  flat = lambda a_NxIxTxK: a_NxIxTxK.reshape(-1, *a_NxIxTxK.shape[2:])
  chosen = flat(a.pop('topk_idx')), flat(a.pop('topk_weight'))
  for step, *one in zip(golden.unstacked([aux]), *chosen, strict=True):
    golden.near(step.gate_TxE, golden.dense(*one, meta['E']), TOL)
  assert not a, f'unchecked: {sorted(a)}'

  latent = like.trunk.body.moe.attention
  golden.near(latent.scale, np.asarray(meta['softmax_scale']), TOL)


CHECKS = {'coe_it': layer, 'coe_model_': model}
