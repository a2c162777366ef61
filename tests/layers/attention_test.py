"""Every kind of attention against loops over heads and tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import attention, config, init
from tests.helpers import oracle

B, L, D, H = 2, 7, 24, 4
S = D // H
THETA = 50.0
SPAN = 3
SEGMENT_BxL = np.array([[0, 0, 0, 1, 1, 1, 1], [5, 5, 2, 2, 2, 2, 9]], np.int32)
ONE_BxL = np.zeros((B, L), np.int32)
LATENT = {'nope': 3, 'rope': 4, 'value': 5, 'rank': 7, 'theta': THETA}
YARN = {
  'yarn_factor': 8.0,
  'yarn_beta_fast': 2.0,
  'yarn_beta_slow': 0.5,
  'yarn_mscale': 0.3,
  'yarn_mscale_all_dim': 0.7,
  'yarn_length': 40,
}
OPTIONS = {
  'gqa': {'num_kv_heads': 2, 'theta': THETA},
  'mla': LATENT,
  'adaptive_span': {'span': SPAN},
}  # of the kinds whose defaults are too large, or too plain, for these tests
BY_DOCUMENT = ['gqa', 'mla', 'full']


def _normal(shape, seed):
  draw = np.random.default_rng(seed)
  return np.float32(draw.normal(size=shape))


def _x(seed=1, length=L):
  return _normal((B, length, D), seed)


@functools.cache
def _setup(name, seed=0, **options):
  """The call (weights, x_BxLxD, view, *source) -> y_BxLxD, jitted; weights."""
  kind = attention.get(name)
  options = {**OPTIONS.get(name, {}), **options}
  make = lambda: kind(
    D, H, scheme=init.get('lecun'), rngs=nnx.Rngs(0), **options
  )
  graph, state = nnx.split(nnx.eval_shape(make))

  @jax.jit
  def call(weights, x_BxLxD, view, *source):
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)(x_BxLxD, view, *source)

  draw = np.random.default_rng(seed)
  weights = jax.tree.map(
    lambda a: np.float32(0.5 * draw.normal(size=a.shape)),
    nnx.to_pure_dict(state),
  )
  return call, weights


def _view(segment_BxL=ONE_BxL, causal=True, **more):
  return attention.View(segment_BxL, segment_BxL, causal, **more)


def _shared(name):
  """What the layers share, drawn."""
  kind, options = attention.get(name), OPTIONS.get(name, {})
  shared = kind.shared(H, D, nnx.Rngs(0), **options)
  return {name: _normal(param.shape, 8) for name, param in shared.items()}


def _wide(weights):
  return jax.tree.map(np.float64, weights)


def _turned(x_S, place, frequency=None):
  """Each pair (i, i + S/2) is a complex number, turned by place * frequency."""
  half = len(x_S) // 2
  if frequency is None:
    frequency = THETA ** (-np.arange(half) / half)
  z = x_S[:half] + 1j * x_S[half:]
  z *= np.exp(1j * place * frequency)
  return np.concatenate([z.real, z.imag])


def _attended(q_S, k, v, scale):
  """One query's answer from lists of its keys and their values."""
  return oracle.softmax(np.stack(k) @ q_S * scale) @ np.stack(v)


def _close(got, expected):
  np.testing.assert_allclose(got, expected, 1e-4, 1e-4)


# The contract.


@pytest.mark.parametrize('name', attention.names())
def test_every_kind_answers_in_the_dtype_of_its_input(name):
  call, weights = _setup(name)
  view = _view(shared=_shared(name))
  y_BxLxD = call(weights, _x(), view)
  assert (y_BxLxD.shape, y_BxLxD.dtype) == ((B, L, D), jnp.float32)
  half = call(weights, jnp.asarray(_x(), jnp.bfloat16), view)
  assert half.dtype == jnp.bfloat16
  far = np.abs(np.float32(half) - y_BxLxD).mean()
  assert far < 0.03 * np.abs(y_BxLxD).mean()


@pytest.mark.parametrize('name', attention.names())
def test_no_kind_sees_a_later_token(name):
  (call, weights), view = _setup(name), _view(shared=_shared(name))
  y_BxLxD = call(weights, _x(), view)
  for cut in range(1, L):
    moved = np.concatenate([_x()[:, :cut], _x(2)[:, cut:]], axis=1)
    other = call(weights, moved, view)
    np.testing.assert_array_equal(other[:, :cut], y_BxLxD[:, :cut])
    assert (np.abs(other - y_BxLxD)[:, cut:].max(axis=2) > 1e-3).all()


def _macs(jaxpr):
  """Multiplications of all matrix products in a program without loops."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      contracted = eqn.params['dimension_numbers'][0][0]
      left = eqn.invars[0].aval.shape
      inner = math.prod(left[i] for i in contracted)
      total += inner * math.prod(eqn.outvars[0].aval.shape)
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      total += _macs(inner) if hasattr(inner, 'eqns') else 0
  return total


def _abstract(name, **options):
  kind = attention.get(name)
  return nnx.eval_shape(
    lambda: kind(D, H, scheme=init.get('lecun'), rngs=nnx.Rngs(0), **options)
  )


@pytest.mark.parametrize('name', attention.names())
def test_what_a_token_multiplies_is_what_is_counted(name):
  """A token alone: its weights once, those of a cache's keys and values too."""
  kind = _abstract(name, **OPTIONS.get(name, {}))
  graph, state = nnx.split(kind)
  weights = 2 * D * D * kind.caches + sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      nnx.to_pure_dict(state)
    )
    if path[-1].key.partition('_')[0] not in ('bias', 'scale')
  )
  one_1x1 = jnp.zeros((1, 1), jnp.int32)
  view = attention.View(one_1x1, one_1x1, True, shared=_shared(name))
  call = lambda state, x: nnx.merge(graph, state)(x, view)
  found = _macs(jax.make_jaxpr(call)(state, jnp.zeros((1, 1, D))).jaxpr)
  assert found == weights + kind.products(1, 1, causal=True)


@pytest.mark.parametrize(
  'name, options, causal, products',
  [
    ('gqa', {'num_kv_heads': 2}, True, 2 * D * 4),
    ('gqa', {'size': 16}, True, 2 * H * 16 * 4),
    ('gqa', {'window': 3}, True, 2 * D * (1 + 2 + 5 * 3) / 7),
    ('gqa', {'window': 30}, True, 2 * D * 4),
    ('mla', LATENT, True, H * (3 + 4 + 5) * 4),
    ('full', {}, True, 2 * D * 4),
    ('full', {}, False, 2 * D * 9),
    ('adaptive_span', {'span': 5}, True, 3 * D * 5),
  ],
)
def test_keys_are_counted_that_a_query_sees(name, options, causal, products):
  found = _abstract(name, **options).products(L, L if causal else 9, causal)
  assert found == pytest.approx(products)


@pytest.mark.parametrize('name', BY_DOCUMENT)
@pytest.mark.parametrize('row, document', [(0, 0), (0, 1), (1, 5), (1, 2)])
def test_documents_are_kept_apart(name, row, document):
  """Another document's tokens, earlier or later, change nothing."""
  (call, weights), x_BxLxD = _setup(name), _x()
  y_BxLxD = np.array(call(weights, x_BxLxD, _view(SEGMENT_BxL)))
  own_L = SEGMENT_BxL[row] == document
  moved = x_BxLxD.copy()
  moved[row, ~own_L] = _x(2)[row, ~own_L]
  other = np.array(call(weights, moved, _view(SEGMENT_BxL)))
  np.testing.assert_array_equal(other[row, own_L], y_BxLxD[row, own_L])
  assert not np.array_equal(other[row], y_BxLxD[row])


@pytest.mark.parametrize('name', attention.names())
def test_the_scheme_and_the_output_scale_are_followed(name):
  def make(scheme, **more):
    options = {**OPTIONS.get(name, {}), **more}
    module = attention.get(name)(
      64, 2, scheme=scheme, rngs=nnx.Rngs(0), **options
    )
    return dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))

  constant = lambda c: lambda key, shape, *fans: jnp.full(shape, c)
  ones = init.Init(constant(1.0), constant(2.0))
  twos = init.Init(constant(4.0), constant(8.0))
  params = make(init.Scheme(twos, twos, ones, twos, False), out_scale=0.5)
  for (*_, leaf), param in params.items():
    if not leaf.startswith('scale'):
      biases = {'bias_out_D': 8.0}.get(leaf, 2.0)
      weights = 2.0 if leaf.startswith('out') else 1.0
      expected = biases if leaf.startswith('bias') else weights
      np.testing.assert_array_equal(param[...], expected, err_msg=leaf)

  fans = lambda key, shape, fan_in, fan_out: jnp.full(shape, fan_in * fan_out)
  sizes = init.Init(fans, lambda key, shape, fan_in: jnp.full(shape, fan_in))
  for (*_, leaf), param in make(
    init.Scheme(twos, twos, sizes, sizes, False)
  ).items():
    # A projection's fans multiply to its size; a bias has the fan of its sum.
    if not leaf.startswith('scale'):
      expected = 64 if leaf.startswith('bias') else param.size
      np.testing.assert_array_equal(param[...], expected, err_msg=leaf)


def test_names_and_options():
  assert {'adaptive_span', 'full', 'gqa', 'mla'} <= set(attention.names())
  options = lambda name: config.attend(name).to_dict()
  assert {
    'num_kv_heads': None,
    'theta': 10_000.0,
    'window': None,
  }.items() <= options('gqa').items()
  assert options('full') == {'name': 'full'}
  with pytest.raises(
    ValueError, match=r"'rotar'.*adaptive_span.*full.*gqa.*mla"
  ):
    attention.get('rotar')
  make = lambda name: attention.get(name)(
    24, H, scheme=init.get('lecun'), rngs=nnx.Rngs(0)
  )
  assert [make(name).caches for name in ('gqa', 'adaptive_span')] == [0, 256]


@pytest.mark.parametrize(
  'name, width, options, message',
  [
    (
      'gqa',
      24,
      {'num_kv_heads': 3},
      r'num_kv_heads \(3\) does not divide H \(4\)',
    ),
    ('gqa', 12, {}, 'odd size 3'),
    ('gqa', 26, {}, r'H \(4\) does not divide D \(26\)'),
    ('gqa', 24, {'size': 5}, 'odd size 5'),
    ('gqa', 24, {'window': 0}, 'window=0'),
    ('gqa', 24, {'qk_norm': 'rms'}, "qk_norm='rms'; there are none, head"),
    ('full', 26, {}, r'H \(4\) does not divide D \(26\)'),
    ('adaptive_span', 26, {}, r'H \(4\) does not divide D \(26\)'),
    ('mla', 24, {'rope': 3}, 'rope=3'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(name, width, options, message):
  with pytest.raises(ValueError, match=message):
    attention.get(name)(
      width, H, scheme=init.get('lecun'), rngs=nnx.Rngs(0), **options
    )


# attend.


_attend = jax.jit(attention.attend, static_argnames=('scale', 'window'))


def _attend_by_mask(q, k, v, seen_BxLxM, scale):
  """In float64, with the mask whole; zero where nothing is seen."""
  k, v = (np.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
  score = np.einsum('blhs,bmhs->bhlm', np.float64(q), np.float64(k)) * scale
  weight = np.exp(score - score.max(-1, keepdims=True))
  weight *= seen_BxLxM[:, None]
  probs = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-300)
  return np.einsum('bhlm,bmhu->blhu', probs, np.float64(v))


@pytest.mark.parametrize('length', [1, 128, 300])
def test_causal_blocks_are_one_attention(length):
  q, k, v = (
    _normal((1, length, heads, size), seed)
    for seed, heads, size in [(0, 4, 2), (1, 2, 2), (2, 2, 3)]
  )
  segment = np.int32(np.arange(length)[None] // 70)
  seen = np.tri(length, dtype=bool) & (segment[:, :, None] == segment[:, None])
  expected = _attend_by_mask(q, k, v, seen, 2**-0.5)
  _close(_attend(q, k, v, _view(segment)), expected)


@pytest.mark.parametrize('window', [1, 60, 200])
def test_blocks_of_a_window_are_one_attention(window):
  """A block leaves out keys that none of its queries sees."""
  q, k, v = (_normal((1, 300, 2, 2), seed) for seed in range(3))
  segment = np.int32(np.arange(300)[None] // 170)
  seen = np.tri(300, dtype=bool) & ~np.tri(300, k=-window, dtype=bool)
  seen = seen & (segment[:, :, None] == segment[:, None])
  expected = _attend_by_mask(q, k, v, seen, 2**-0.5)
  _close(_attend(q, k, v, _view(segment), window=window), expected)


def test_cross_attention_sees_all_but_padding():
  q, k, v = (
    _normal((B, length, heads, size), seed)
    for seed, length, heads, size in [(0, 5, 4, 2), (1, 9, 2, 2), (2, 9, 2, 3)]
  )
  key = np.int32([[-1, -1, 0, 0, 0, 0, 0, 0, 0], [0] * 6 + [1, 1, -1]])
  query = np.int32([[0] * 5, [0, 0, 0, 1, 1]])
  view = attention.View(query, key, False)
  seen = query[:, :, None] == key[:, None]
  got = _attend(q, k, v, view, 0.3)
  _close(got, _attend_by_mask(q, k, v, seen, 0.3))


@pytest.mark.parametrize('causal', [False, True])
def test_a_query_that_sees_no_key_answers_zero(causal):
  q, k, v = (_normal((1, 3, 2, 2), seed) for seed in range(3))
  view = attention.View(np.int32([[0, 4, 0]]), np.int32([[0, 0, -1]]), causal)
  run = lambda q, k, v: _attend(q, k, v, view)
  y = run(q, k, v)
  np.testing.assert_array_equal(y[:, 1], 0)
  assert (np.abs(y[:, [0, 2]]) > 0).all()
  grads = jax.grad(lambda *a: jnp.sum(run(*a) ** 2), argnums=(0, 1, 2))(q, k, v)
  assert all(np.isfinite(g).all() for g in grads)
  np.testing.assert_array_equal(grads[0][:, 1], 0)
  np.testing.assert_array_equal(grads[2][:, 2], 0)


# Rotary.


def _rotary_by_hand(
  w, x_BxLxD, segment_BxL, qk_norm='none', window=L, turn=_turned
):
  w, J = _wide(w), OPTIONS['gqa']['num_kv_heads']
  S = w['query_DxHxS'].shape[2]

  def heads(x_D, name, letter):
    y_HxS = np.einsum('d,dhs->hs', x_D, w[f'{name}_Dx{letter}xS'])
    return y_HxS + w.get(f'bias_{name}_{letter}xS', 0)

  def normed(y_HxS, name):
    if qk_norm == 'none':
      return y_HxS
    scale = w[f'norm_{name}']['scale_D']
    if qk_norm == 'head':
      return np.stack([_rms(y_S, scale) for y_S in y_HxS])
    return _rms(y_HxS.reshape(-1), scale).reshape(y_HxS.shape)

  y_BxLxD = np.zeros(x_BxLxD.shape) + w.get('bias_out_D', 0)
  for b, l, h in np.ndindex(B, L, H):
    j = h // (H // J)  # heads share key-value heads in consecutive groups
    q_S = turn(normed(heads(x_BxLxD[b, l], 'query', 'H'), 'query')[h], l)
    seen = [
      m
      for m in range(l + 1)
      if segment_BxL[b, m] == segment_BxL[b, l] and l - m < window
    ]
    keys = [normed(heads(x_BxLxD[b, m], 'key', 'J'), 'key')[j] for m in seen]
    k = [turn(k_S, m) for k_S, m in zip(keys, seen, strict=True)]
    v = [heads(x_BxLxD[b, m], 'value', 'J')[j] for m in seen]
    y_BxLxD[b, l] += _attended(q_S, k, v, S**-0.5) @ w['out_HxSxD'][h]
  return y_BxLxD


@pytest.mark.parametrize(
  'options',
  [
    {'size': 4},
    {'window': 3},
    {'qk_norm': 'head'},
    {'qk_norm': 'all', 'size': 8, 'bias': True, 'window': 1},
  ],
  ids=str,
)
def test_the_options_of_published_models_agree_with_the_loops(options):
  call, weights = _setup('gqa', **options)
  told = {k: v for k, v in options.items() if k not in ('size', 'bias')}
  expected = _rotary_by_hand(weights, _x(), SEGMENT_BxL, **told)
  _close(call(weights, _x(), _view(SEGMENT_BxL)), expected)


def test_the_norm_of_queries_has_the_eps_it_is_given():
  (call, weights), (other, _) = (
    _setup('gqa', qk_norm='head', eps=eps) for eps in (1e-6, 10.0)
  )
  y_BxLxD, far = (f(weights, _x(), _view()) for f in (call, other))
  assert np.abs(y_BxLxD - far).max() > 0.01


@pytest.mark.parametrize('amplitude', [None, 0.6])
def test_rotary_takes_yarn_too(amplitude):
  """Heads of 4: the pairs of the latent's test below."""
  options = {k: YARN[k] for k in YARN if 'mscale' not in k}
  call, weights = _setup('gqa', size=4, yarn_amplitude=amplitude, **options)
  frequency = np.array([1, THETA**-0.5 * (0.5 + 0.5 / 8)])
  factor = 1 + 0.1 * math.log(8) if amplitude is None else amplitude
  turn = lambda x_S, place: factor * _turned(x_S, place, frequency)
  expected = _rotary_by_hand(weights, _x(), ONE_BxL, turn=turn)
  _close(call(weights, _x(), _view()), expected)


def test_rotary_agrees_with_the_loops():
  call, weights = _setup('gqa')
  expected = _rotary_by_hand(weights, _x(), SEGMENT_BxL)
  _close(call(weights, _x(), _view(SEGMENT_BxL)), expected)


def test_grouped_queries_are_repeated_key_value_heads():
  (call, weights), (many, _) = _setup('gqa'), _setup('gqa', num_kv_heads=None)
  repeated = dict(weights)
  for name in ('key_DxJxS', 'value_DxJxS'):
    repeated[name] = np.repeat(weights[name], 2, axis=1)
  got = many(repeated, _x(), _view(SEGMENT_BxL))
  expected = call(weights, _x(), _view(SEGMENT_BxL))
  np.testing.assert_allclose(got, expected, 1e-5, 1e-5)


def test_rotation_depends_on_distance_alone():
  """<rotated q at m, rotated k at n> is a function of m - n."""
  draw = np.random.default_rng(3)
  q_S, k_S = draw.normal(size=(2, S)).astype(np.float32)
  everywhere = lambda x_S: np.broadcast_to(x_S, (1, L, 1, S))
  frequency = THETA ** (-np.arange(0, S, 2, dtype=np.float32) / S)
  q_LxS, k_LxS = (
    np.asarray(attention.rotate(everywhere(x), frequency))[0, :, 0]
    for x in (q_S, k_S)
  )
  score_LxL = q_LxS @ k_LxS.T
  for distance in range(-L + 1, L):
    along = np.diagonal(score_LxL, distance)
    np.testing.assert_allclose(along, along[0], 1e-4, 1e-4)
  assert np.ptp(score_LxL[0]) > 0.1
  np.testing.assert_array_equal(q_LxS[0], q_S)
  np.testing.assert_allclose(q_LxS[4], _turned(q_S, 4), 1e-5, 1e-6)


# Latent.


def _rms(x, scale):
  return x / np.sqrt((x**2).mean() + 1e-6) * scale


def _latent_by_hand(
  w, x_BxLxD, frequency, amplitude=1.0, scale=1.0, interleaved=True
):
  """Causal, one document; pairs are (2i, 2i + 1), or as in _turned."""
  w, W = _wide(w), LATENT['nope']

  def turned(x_P, place):
    if interleaved:
      x_P = np.concatenate([x_P[0::2], x_P[1::2]])
    return amplitude * _turned(x_P, place, frequency)

  scale *= (W + LATENT['rope']) ** -0.5
  y_BxLxD = np.zeros(x_BxLxD.shape)
  for b, l, h in np.ndindex(B, L, H):
    x_D = x_BxLxD[b, l]
    if 'query_DxY' in w:
      small_Y = _rms(x_D @ w['query_DxY'], w['norm_query']['scale_D'])
      q_S = small_Y @ w['query_YxHxS'][:, h]
    else:
      q_S = x_D @ w['query_DxHxS'][:, h]
    q_S = np.concatenate([q_S[:W], turned(q_S[W:], l)])
    k, v = [], []
    for m in range(l + 1):
      x_D = x_BxLxD[b, m]
      latent_Z = _rms(x_D @ w['latent_DxZ'], w['norm_latent']['scale_D'])
      key_P = turned(x_D @ w['key_DxP'], m)  # for all heads
      k.append(np.concatenate([latent_Z @ w['key_ZxHxW'][:, h], key_P]))
      v.append(latent_Z @ w['value_ZxHxU'][:, h])
    y_BxLxD[b, l] += _attended(q_S, k, v, scale) @ w['out_HxUxD'][h]
  return y_BxLxD


@pytest.mark.parametrize('query_rank', [None, 6])
def test_latent_agrees_with_the_loops(query_rank):
  call, weights = _setup('mla', query_rank=query_rank)
  frequency = np.array([1, THETA**-0.5])
  _close(
    call(weights, _x(), _view()), _latent_by_hand(weights, _x(), frequency)
  )


def test_latent_may_have_its_pairs_apart():
  call, weights = _setup('mla', interleaved=False)
  frequency = np.array([1, THETA**-0.5])
  expected = _latent_by_hand(weights, _x(), frequency, interleaved=False)
  _close(call(weights, _x(), _view()), expected)


def test_llama_3_slows_pairs_by_their_wavelength():
  """Factor 8, kept below 8192 / 4 tokens a turn, slowed above 8192 / 1."""
  plain = 500_000.0 ** (-np.arange(0, 64, 2) / 64)
  found = attention.Yarn(8.0, 4.0, 1.0, 8192, by_turns=True).frequency(5e5, 64)
  kinds = set()
  for before, after in zip(plain, found, strict=True):
    wavelength = 2 * np.pi / before
    if wavelength < 8192 / 4:
      kinds.add('kept')
      expected = before
    elif wavelength > 8192:
      kinds.add('slowed')
      expected = before / 8
    else:
      kinds.add('between')
      part = (8192 / wavelength - 1) / (4 - 1)
      expected = part * before + (1 - part) * before / 8
    np.testing.assert_allclose(after, expected, rtol=1e-12)
  assert kinds == {'kept', 'between', 'slowed'}


def test_yarn_where_all_pairs_turn_too_seldom_or_often():
  """The ends of its ramp then change places; as in transformers."""
  before = attention.Yarn(0.0, 4.0, 1.0, 2).frequency(10.0, 8)
  seldom = attention.Yarn(2.0, 4.0, 1.0, 2).frequency(10.0, 8)
  np.testing.assert_allclose(seldom, before)  # its end is below the first pair
  before = attention.Yarn(0.0, 4.0, 1.0, 64).frequency(1.3, 8)
  often = attention.Yarn(2.0, 4.0, 1.0, 64).frequency(1.3, 8)
  np.testing.assert_allclose(often, before / 2)  # its start beyond the last


def test_yarn_slows_the_slow_pairs_and_sharpens_the_scores():
  """Pair i turns 40 / (2 pi 50^(i/2)) times in 40 tokens: 6.4 and 0.9 times."""
  call, weights = _setup('mla', **YARN)
  turns_at = lambda pair: 40 / (2 * math.pi * THETA ** (pair / 2))
  # 2 turns are between the pairs 0 and 1, half a turn between 1 and 2: from
  # pair 0, which keeps its frequency, to pair 2, which would be 8 times slower.
  assert turns_at(0) > 2 > turns_at(1) > 0.5 > turns_at(2)
  frequency = np.array([1, THETA**-0.5 * (0.5 + 0.5 / 8)])
  m = lambda a: 1 + 0.1 * a * math.log(8)
  expected = _latent_by_hand(
    weights, _x(), frequency, m(0.3) / m(0.7), m(0.7) ** 2
  )
  _close(call(weights, _x(), _view()), expected)


def test_a_factor_of_one_extends_nothing():
  call, weights = _setup('mla')
  one, _ = _setup('mla', **{**YARN, 'yarn_factor': 1.0})
  got = one(weights, _x(), _view())
  np.testing.assert_allclose(got, call(weights, _x(), _view()), 1e-5, 1e-6)


# Span.


def _span_by_hand(w, x_BxLxD, position_SxP, cache_BxPxD, span):
  w, position_SxP = _wide(w), np.float64(position_SxP)
  past_BxMxD = np.concatenate([cache_BxPxD, x_BxLxD], axis=1)
  y_BxLxD = np.zeros(x_BxLxD.shape)
  for b, l, h in np.ndindex(*x_BxLxD.shape[:2], H):
    q_S = x_BxLxD[b, l] @ w['query_DxHxS'][:, h]
    before = past_BxMxD[b, l : l + span]  # oldest first, l itself left out
    k = before @ w['key_DxHxS'][:, h] + position_SxP.T
    v = before @ w['value_DxHxS'][:, h]
    y_BxLxD[b, l] += _attended(q_S, k, v, S**-0.5) @ w['out_HxSxD'][h]
  return y_BxLxD


@pytest.mark.parametrize('length, span', [(7, 3), (3, 7), (1, 1), (290, 5)])
def test_span_agrees_with_the_loops(length, span):
  """Also where a block is shorter than the span, and where there are blocks."""
  call, weights = _setup('adaptive_span', span=span)
  x_BxLxD, cache_BxPxD = _x(1, length), _x(2, span)
  position_SxP = _normal((S, span), 5)
  segment_BxL = np.int32(np.arange(B * length).reshape(B, -1))  # not looked at
  view = _view(segment_BxL, shared={'position_SxP': position_SxP})
  zero = np.zeros_like(cache_BxPxD)
  expected = _span_by_hand(weights, x_BxLxD, position_SxP, zero, span)
  _close(call(weights, x_BxLxD, view), expected)
  view = view.replace(cache_BxCxD=cache_BxPxD)
  expected = _span_by_hand(weights, x_BxLxD, position_SxP, cache_BxPxD, span)
  _close(call(weights, x_BxLxD, view), expected)


def test_a_stream_in_two_blocks_is_the_stream():
  call, weights = _setup('adaptive_span')
  view, x_BxLxD = _view(shared=_shared('adaptive_span')), _x()
  whole = call(weights, x_BxLxD, view)
  cache_BxPxD = x_BxLxD[:, 4 - SPAN : 4]
  second = call(weights, x_BxLxD[:, 4:], view.replace(cache_BxCxD=cache_BxPxD))
  np.testing.assert_allclose(second, whole[:, 4:], 1e-5, 1e-5)


def test_positions_are_normal_and_one_for_all_heads():
  rngs = nnx.Rngs(0)
  position_SxP = attention.get('adaptive_span').shared(4, 128, rngs, span=500)[
    'position_SxP'
  ]
  assert position_SxP.shape == (32, 500)
  assert np.std(position_SxP) == pytest.approx(1, rel=0.02)
  assert attention.get('gqa').shared(4, 128, rngs, num_kv_heads=2) == {}


def test_a_cache_of_another_length_is_refused():
  call, weights = _setup('adaptive_span')
  view = _view(shared=_shared('adaptive_span'), cache_BxCxD=_x(2, SPAN + 1))
  with pytest.raises(ValueError, match='a cache of 4 inputs, not 3'):
    call(weights, _x(), view)


# Full.


def _full_by_hand(w, x_BxLxD, source_BxMxD, sees):
  w = _wide(w)
  y_BxLxD = np.zeros(x_BxLxD.shape) + w['bias_out_D']
  project = lambda x_D, n, h: (
    x_D @ w[f'{n}_DxHxS'][:, h] + w[f'bias_{n}_HxS'][h]
  )
  for b, l, h in np.ndindex(*x_BxLxD.shape[:2], H):
    q_S = project(x_BxLxD[b, l], 'query', h)
    seen = [x_D for m, x_D in enumerate(source_BxMxD[b]) if sees(b, l, m)]
    k = [project(x_D, 'key', h) for x_D in seen]
    v = [project(x_D, 'value', h) for x_D in seen]
    y_BxLxD[b, l] += _attended(q_S, k, v, S**-0.5) @ w['out_HxSxD'][h]
  return y_BxLxD


@pytest.mark.parametrize('causal', [False, True])
def test_full_agrees_with_the_loops(causal):
  call, weights = _setup('full')
  sees = lambda b, l, m: (
    SEGMENT_BxL[b, l] == SEGMENT_BxL[b, m] and (m <= l or not causal)
  )
  expected = _full_by_hand(weights, _x(), _x(), sees)
  _close(call(weights, _x(), _view(SEGMENT_BxL, causal)), expected)


def test_full_reads_a_source_without_its_padding():
  call, weights = _setup('full')
  source_BxMxD = _x(3, 5)
  key_BxM = np.int32([[-1, -1, 0, 0, 0], [0, 0, 0, 0, -1]])
  view = attention.View(ONE_BxL, key_BxM, False)
  sees = lambda b, l, m: key_BxM[b, m] == 0
  expected = _full_by_hand(weights, _x(), source_BxMxD, sees)
  _close(call(weights, _x(), view, source_BxMxD), expected)
