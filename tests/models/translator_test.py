"""The encoder-decoder: who sees whom, draws, dropout, state and cost."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import attention, config, models, objectives, routers, trunk
from moe_jax.models import translator
from tests.helpers import golden

V, D, S, L, B = 11, 8, 5, 4, 2
FIELDS = dict(
  N=3, encoder_N=3, D=D, H=2, F=12, E=4, expert_F=6, pattern='md', block='post'
)
TOPK = config.router('topk', k=2, bias_rate=0.01)
ONE = dict(N=1, encoder_N=1, E=1, router=config.router('random', per='batch'))


def _shapes(dtype='float32', **fields):
  """A model without arrays."""
  fields = {**FIELDS, **fields}
  key = repr((dtype, sorted(fields.items())))
  if key not in _made:
    # XLA's own grouped matmul compiles in half of the time.
    build = lambda: golden.build('translator', fields, dtype, gmm='xla', V=V)
    _made[key] = nnx.eval_shape(build)
  return _made[key]


_made = {}


def _weights(model):
  """Parameters of its shapes, none of them 0 or 1, and the router state."""
  rng = np.random.default_rng(0)
  draw = lambda a: np.asarray(rng.normal(size=a.shape) * 0.3, a.dtype)
  params, state = models.split(model)
  return jax.tree.map(draw, params), jax.tree.map(
    lambda a: np.zeros(a.shape, a.dtype), state
  )


def _run(model, *, train=False, state=None):
  """(batch, pass) -> logits, aux"""
  params, zeros = _weights(model)
  state = zeros if state is None else state
  run = _compiled(model, train)
  return lambda batch, pass_: run(params, state, batch, np.int32(pass_))


@functools.cache
def _compiled(model, train):
  @golden.jit
  def run(params, state, batch, pass_):
    ctx = routers.context(batch, jax.random.key(0), 0, train=train, pass_=pass_)
    return models.bind(model, params, state)(batch, ctx)

  return run


def _plain():
  """A model with learned routers, out of training."""
  return _run(_shapes(router=TOPK))


def _small():
  """The same with one layer on each side."""
  return _run(_shapes(router=TOPK, N=1, encoder_N=1))


def _batch(source, target, *, left=False, width=(S, L)):
  """Rows of ids, padded at the right or at the left with any ids."""
  rng = np.random.default_rng(left)

  def padded(rows, width):
    ids = rng.integers(0, V, (len(rows), width)).astype(np.int32)
    real = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
      place = slice(width - len(row), None) if left else slice(len(row))
      ids[i, place], real[i, place] = row, True
    return ids, real

  source_BxS, source_real = padded(source, width[0])
  ids_BxL, real_BxL = padded(target, width[1])
  return {
    'source_BxS': source_BxS,
    'source_mask_BxS': source_real.astype(np.float32),
    'ids_BxL': ids_BxL,
    'target_BxL': np.roll(ids_BxL, -1, axis=1),
    'mask_BxL': real_BxL.astype(np.float32),
    'segment_BxL': real_BxL.astype(np.int32) - 1,
    'pos_BxL': np.cumsum(real_BxL, axis=1, dtype=np.int32) - 1,
    'row_B': np.arange(len(source), dtype=np.int32),
  }


FULL = _batch([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]], [[5, 8, 9, 7], [9, 3, 2, 3]])


def test_a_target_sees_what_is_before_it_and_all_of_the_source():
  plain = _plain()
  logits_BxLxV, _ = plain(FULL, 0)
  assert logits_BxLxV.shape == (B, L, V) and logits_BxLxV.dtype == jnp.float32
  for place in range(L):
    ids_BxL = FULL['ids_BxL'].copy()
    ids_BxL[0, place] = 0
    other_BxLxV, _ = plain({**FULL, 'ids_BxL': ids_BxL}, 0)
    changed_BxL = np.abs(other_BxLxV - logits_BxLxV).max(axis=2) > 1e-6
    assert changed_BxL[0].tolist() == [i >= place for i in range(L)]
    assert not changed_BxL[1].any()
  for place in range(S):
    source_BxS = FULL['source_BxS'].copy()
    source_BxS[0, place] = 0
    other_BxLxV, _ = plain({**FULL, 'source_BxS': source_BxS}, 0)
    changed_BxL = np.abs(other_BxLxV - logits_BxLxV).max(axis=2) > 1e-6
    assert changed_BxL[0].all() and not changed_BxL[1].any()


def test_a_source_token_sees_those_after_it():
  model = _shapes(**ONE)
  params, state = _weights(model)

  @golden.jit
  def encode(params, batch):
    ctx = routers.context(batch, jax.random.key(0), 0, train=False)
    return models.bind(model, params, state).encode(batch, ctx)[0][0]

  source_BxS = FULL['source_BxS'].copy()
  source_BxS[:, -1] = 0
  moved = {**FULL, 'source_BxS': source_BxS}
  changed = encode(params, FULL) - encode(params, moved)
  assert (np.abs(changed[:, 0]).max(axis=1) > 1e-6).all()


def test_padding_on_either_side_changes_nothing():
  rows = [[3, 1, 4], [9, 2, 6]], [[5, 8, 9], [9, 3, 2]]
  small = _small()
  expected_BxLxV, routed = small(_batch(*rows, width=(3, 3)), 0)
  for left in (False, True):
    batch = _batch(*rows, left=left)
    assert (batch['mask_BxL'][:, -1] == left).all()
    logits_BxLxV, aux = small(batch, 0)
    for found, expected in zip(aux, routed, strict=True):
      for name in ('load_E', 'dropped', 'entropy', 'losses'):
        close = lambda a, b: np.testing.assert_allclose(a, b, 1e-5)
        jax.tree.map(close, found[name], expected[name])
    real_BxL = batch['mask_BxL'] > 0
    np.testing.assert_allclose(
      np.asarray(logits_BxLxV)[real_BxL].reshape(expected_BxLxV.shape),
      expected_BxLxV,
      rtol=0,
      atol=2e-6 * np.abs(expected_BxLxV).max(),
    )


def test_a_source_of_padding_alone_is_no_nan():
  batch = {**FULL, 'source_mask_BxS': np.zeros((B, S), np.float32)}
  assert np.isfinite(_plain()(batch, 0)[0]).all()


def test_every_pass_and_layer_draws_its_own_expert():
  fields = {'E': 16, 'router': config.router('random', per='batch')}
  model = _shapes(**fields)
  params, state = _weights(model)

  @golden.jit  # of which nothing but the draws is left
  def draws(params, pass_):
    ctx = routers.context(FULL, jax.random.key(0), 0, train=True, pass_=pass_)
    _, aux = models.bind(model, params, state)(FULL, ctx)
    return [found['route'][..., 0] for found in aux]

  drawn = [draws(params, np.int32(i)) for i in range(8)]
  drawn = [np.stack(routes) for routes in zip(*drawn, strict=True)]
  assert len(drawn) == 4  # encoder's body and cut layer, and the decoder's
  for route, T in zip(drawn, (B * S, B * S, B * L, B * L), strict=True):
    assert route.shape == (8, 1, 1, 1, T)
    assert (route == route[..., :1]).all()  # one for the whole batch
  drawn_PxN = np.stack([route[:, 0, 0, 0, 0] for route in drawn], axis=1)
  for draws in (drawn_PxN, drawn_PxN.T):
    assert len({tuple(draw) for draw in draws.tolist()}) == len(draws)


def test_dropout_is_of_the_pass_and_off_in_evaluation():
  model = _shapes(**ONE, dropout=0.5)
  train = _run(model, train=True)
  first, again, second = (train(FULL, i)[0] for i in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  # Another mask for every token, so every token's logits are others.
  assert (np.abs(first - second).max(axis=2) > 1e-3).all()
  off, _ = _run(model)(FULL, 0)
  without, _ = _run(_shapes(**ONE))(FULL, 0)
  np.testing.assert_array_equal(off, without)


def test_dropout_of_the_two_sides_differs(monkeypatch):
  seen = []

  def no_layers(self, x_BxLxD, *args, **kwargs):
    seen.append(np.asarray(x_BxLxD))
    return x_BxLxD, [], None

  monkeypatch.setattr(trunk.Trunk, '__call__', no_layers)
  model = _shapes(**ONE, dropout=0.5)
  batch = {  # the same tokens on both sides
    **FULL,
    'source_BxS': FULL['ids_BxL'],
    'source_mask_BxS': FULL['mask_BxL'],
  }
  ctx = routers.context(batch, jax.random.key(0), 0, train=True)
  models.bind(model, *_weights(model))(batch, ctx)
  source, target = seen
  kept = (source != 0) & (target != 0)
  assert kept.any()
  np.testing.assert_array_equal(source[kept], target[kept])
  assert ((source == 0) != (target == 0)).any(axis=2).all()


@pytest.mark.parametrize('block', ['pre', 'post'])
def test_two_passes_of_one_expert_agree_without_dropout(block):
  model = _shapes(**ONE, block=block)
  params, _ = models.split(model)
  assert ('norm_encoder' in params) == ('norm_decoder' in params)
  assert ('norm_decoder' in params) == (block == 'pre')
  forward = _run(model, train=True)
  loss, found = objectives.get('consistency', losses={})(forward, FULL)
  assert float(found['consistency_sum']) == 0
  once, _ = objectives.get('next_token', losses={}, smoothing=0.1)(
    forward, FULL
  )
  np.testing.assert_allclose(loss, 2 * once, rtol=1e-6)


def test_bfloat16_runs_and_is_near():
  logits_BxLxV, _ = _run(_shapes('bfloat16', **ONE))(FULL, 0)
  assert logits_BxLxV.dtype == jnp.float32
  expected_BxLxV, _ = _run(_shapes(**ONE))(FULL, 0)
  off = np.linalg.norm(logits_BxLxV - expected_BxLxV)
  assert 0 < off < 0.02 * np.linalg.norm(expected_BxLxV)


def test_state_of_the_routers_follows_the_load_of_their_own_layers():
  model = _shapes(router=TOPK)
  params, state = _weights(model)
  # Of encoder and decoder, body and cut layer: another expert has too much.
  full = [np.eye(4, dtype=np.int32)[i].reshape(1, 1, 1, 4) for i in range(4)]
  update = lambda load_E: models.bind(model, params, state).updated_state(
    [{'load_E': a} for a in load_E]
  )
  new = jax.jit(update)(full)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  for i, (side, segment) in enumerate(
    itertools.product(('encoder', 'decoder'), ('body', 'ragged'))
  ):
    found = new[side][segment]['moe']['feed']['routers']['bias_E']
    np.testing.assert_allclose(found, 0.01 * (1 - 2 * full[i]), rtol=1e-6)
  # Such biases, made large, keep all tokens away from that expert.
  large = jax.tree.map(lambda a: 1e4 * a, new)
  _, aux = _run(model, state=large)(FULL, 0)
  for found, load_E in zip(aux, full, strict=True):
    assert np.asarray(found['load_E'])[load_E == 1].tolist() == [0]


def test_a_router_without_state_has_none_to_update():
  model = _shapes(**ONE)
  load_E = jnp.zeros((1, 1, 1, 1), jnp.int32)
  aux = [{'load_E': load_E}] * 2
  assert models.bind(model, *_weights(model)).updated_state(aux) == {}


@pytest.mark.parametrize(
  ('block', 'N', 'encoder_N', 'pattern'),
  [('post', 3, 3, 'md'), ('pre', 4, 1, 'm'), ('pre', 2, 5, 'mdd')],
)
def test_cost(block, N, encoder_N, pattern):
  length, F, E, expert_F, k = 7, 12, 4, 6, TOPK.k
  model = _shapes(
    block=block,
    N=N,
    encoder_N=encoder_N,
    pattern=pattern,
    router=TOPK,
  )
  attention, norm = 4 * (D * D + D), 2 * D
  feed = lambda F: 2 * D * F + F + D
  active = total = V * D + 2 * norm * (block == 'pre')
  expert, meets = 0, 0.0
  for cross, layers in ((False, encoder_N), (True, N)):
    for i in range(layers):
      both = (attention + norm) * (1 + cross) + norm
      total, active = total + both, active + both
      if pattern[i % len(pattern)] == 'd':
        total, active = total + feed(F), active + feed(F)
      else:
        total += D * E + E * feed(expert_F)
        active += D * E + k * feed(expert_F)
        expert += E * feed(expert_F)
      for token in range(length):  # a product for each key, and for its value
        keys = token + 1 + length if cross else length
        meets += 2 * D * keys / length
  assert translator.cost(model, length) == {
    'params_total': total,
    'expert_params': expert,
    'params_active': active,
    'flops_per_token': round(6 * (active + meets)),
  }


def test_sines():
  pos_BxL = jnp.asarray([[0, 1, 5]], jnp.int32)
  found = np.asarray(translator.sinusoids(pos_BxL, 8))
  for j, place in enumerate((2, 3, 7)):  # two more than the position
    for i in range(4):
      angle = place * 10_000 ** (-i / 3)
      np.testing.assert_allclose(found[0, j, i], np.sin(angle), atol=1e-6)
      np.testing.assert_allclose(found[0, j, i + 4], np.cos(angle), atol=1e-6)


def test_initial_values():
  fields = {**FIELDS, **ONE, 'init': 'thor', 'embed_std': D**-0.5}

  @golden.jit  # of which only these are made
  def make():
    model = golden.build('translator', fields, 'float32', V=512)
    sides = model.encoder, model.decoder
    return model.embed_VxD[...], [s.body.pools.up_ExDxF[...] for s in sides]

  embed_VxD, ups = make()
  np.testing.assert_allclose(jnp.std(embed_VxD), D**-0.5, rtol=0.1)
  for up in ups:
    assert 0.8 * D**-0.5 < float(jnp.abs(up).max()) <= D**-0.5
  assert (ups[0] != ups[1]).all()


CUT = [
  ({'N': 3}, [(1, 1, 'md'), (1, 1, 'm')]),
  ({'N': 1}, [(1, 1, 'm')]),
  ({'N': 4}, [(2, 1, 'md')]),
  (
    {'N': 6, 'pattern': 'mdd', 'first_dense': 1},
    [(1, 1, 'mdd'), (1, 1, 'md')],
  ),
  (
    {'N': 5, 'layers_per_pool': 2, 'ragged_pool': True},
    [(1, 2, 'md'), (1, 1, 'm')],
  ),
]


@pytest.mark.parametrize(('fields', 'segments'), CUT)
def test_a_pattern_may_be_cut_off_after_its_experts(fields, segments):
  fields = {**FIELDS, **fields, 'encoder_N': fields['N'], 'gmm': 'xla'}
  values = config.model('translator', **fields).to_dict()
  del values['name']
  c = translator.Config(**values, V=V)
  assert list(c.segments) == segments
  assert c.depth == sum(G * R for G, R, _ in segments)


@pytest.mark.parametrize(('fields', 'segments'), CUT[3:])
def test_a_pattern_that_is_cut_off_has_its_layers(fields, segments):
  fields = {**fields, 'encoder_N': 1 + fields.get('first_dense', 0)}
  model = _shapes(**fields, router=config.router('random'))
  zeros_BxS = np.zeros((B, S), np.int32)
  view = attention.View(zeros_BxS, zeros_BxS, causal=False)

  def decode(params, source_BxSxD):
    ctx = routers.context(FULL, jax.random.key(0), 0, train=False)
    bound = models.bind(model, params, {})
    return bound.decode(FULL, (source_BxSxD, view), ctx)

  source_BxSxD = np.zeros((B, S, D), np.float32)
  _, aux = jax.eval_shape(decode, _weights(model)[0], source_BxSxD)
  found = [a['load_E'].shape[:2] for a in aux]
  assert found == [(G, R) for G, R, _ in segments]


@pytest.mark.parametrize(
  ('fields', 'error'),
  [
    ({'encoder_N': 0}, 'encoder_N=0'),
    ({'N': 4, 'pattern': 'dm'}, r'the encoder: .* \(2\) .* \(3\)'),
    ({'layers_per_pool': 2}, 'inside a pool of layers_per_pool=2'),
    ({'N': 6, 'encoder_N': 4, 'layers_per_pool': 3}, 'the encoder: layers_per'),
    ({'D': 2}, 'D=2'),
    ({'attention': config.attend('gqa')}, "attention='gqa'"),
    ({'block': 'vmoe'}, "block='vmoe'"),
  ],
)
def test_what_cannot_be_built_is_refused(fields, error):
  with pytest.raises(ValueError, match=error):
    _shapes(**fields)
