"""THOR (Zuo et al. 2021, arXiv 2110.04260): what the authors' code computed.

Their float32 numbers, ours in float64. Their activations are [time, row, D],
their weights [out, in]: `w.T` in our shape is our weight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import attention, blocks, config, models, objectives, routers
from tests.helpers import golden

TOL = 2e-5

# Their name of a layer's parameter: ours in our block.
ATTENTION = {
  'q_proj.weight': 'query_DxHxS',
  'q_proj.bias': 'bias_query_HxS',
  'k_proj.weight': 'key_DxHxS',
  'k_proj.bias': 'bias_key_HxS',
  'v_proj.weight': 'value_DxHxS',
  'v_proj.bias': 'bias_value_HxS',
  'out_proj.weight': 'out_HxSxD',
  'out_proj.bias': 'bias_out_D',
}
NORM = {'weight': 'scale_D', 'bias': 'bias_D'}
BLOCK = {
  f'{theirs}.{name}': (ours, our_name)
  for theirs, ours, names in (
    ('self_attn', 'attention', ATTENTION),
    ('encoder_attn', 'cross', ATTENTION),
    ('self_attn_layer_norm', 'norm_attention', NORM),
    ('encoder_attn_layer_norm', 'norm_cross', NORM),
    ('final_layer_norm', 'norm_feed', NORM),
  )
  for name, our_name in names.items()
}
FEED = {
  'fc1.weight': 'up_ExDxF',
  'fc1.bias': 'bias_up_ExF',
  'fc2.weight': 'down_ExFxD',
  'fc2.bias': 'bias_down_ExD',
}  # of an expert e 'fc1.<e>.weight'
# Where our stacks have their layer: segment, kind and index.
LAYERS = {
  '0': ('body', 'moe', (0, 0)),
  '1': ('body', 'dense', (0, 0, 0)),
  '2': ('ragged', 'moe', (0, 0)),
}


def place(name):
  """(path, index) of our parameter, and whether the two are transposed."""
  if name == 'encoder.embed_tokens.weight':
    return ('embed_VxD',), (), False
  side, layer = (), '0'
  if name.startswith(('encoder.layers', 'decoder.layers')):
    *side, _, layer, name = name.split('.', 3)
  segment, kind, index = LAYERS[layer]
  if name in BLOCK:
    return (*side, segment, kind, *BLOCK[name]), index, True
  if name in FEED:
    return (*side, segment, kind, 'feed', 'one', FEED[name]), (*index, 0), True
  fc, expert, part = name.split('.')
  ours = FEED[f'{fc}.{part}']
  return (*side, segment, 'pools', ours), (0, int(expert)), True


class Weights:
  """The parameters of a model from a file, and gradients by the file's names.

  Each of our parameters must come from the file, and the file's must all go
  somewhere.
  """

  def __init__(self, model, theirs):
    self.theirs = theirs
    params, self.state = models.split(model)
    assert not jax.tree.leaves(self.state)  # nothing is carried over steps
    self.params = jax.tree.map(lambda a: np.full(a.shape, np.nan), params)
    for name, weight in theirs.items():
      path, index, turned = place(name)
      ours = _leaf(self.params, path)
      assert np.isnan(ours[index]).all(), name  # no two names for one
      turn = weight.T if turned else weight
      ours[index] = turn.reshape(ours[index].shape)
    for a in jax.tree.leaves(self.params):
      assert not np.isnan(a).any()

  def gradients(self, ours):
    """{their name: our gradient in their shape}"""
    found = {}
    for name, weight in self.theirs.items():
      path, index, turned = place(name)
      shape = weight.T.shape if turned else weight.shape
      gradient = _leaf(ours, path)[index].reshape(shape)
      found[name] = gradient.T if turned else gradient
    return found


def _leaf(tree, path):
  return functools.reduce(lambda tree, key: tree[key], path, tree)


def gradients_near(found, expected):
  """As golden.gradients_near, but for what is zero but for rounding.

  A bias of the keys moves all scores of a query alike, which a softmax does
  not see. Theirs is then the rounding of float32, more than 2e-5 * 1e-3 of the
  largest gradient in some files, ours that of float64.
  """
  largest = max(np.linalg.norm(g) for g in expected.values())
  zero = [name for name in expected if name.endswith('k_proj.bias')]
  for name in zero:
    assert np.linalg.norm(expected[name]) < 1e-6 * largest, name
    assert np.linalg.norm(found[name]) < 1e-14 * largest, name
  rest = lambda gradients: {k: gradients[k] for k in gradients.keys() - zero}
  golden.gradients_near(rest(found), rest(expected), TOL)


class Unread(dict):
  """Arrays of a file that no check has read so far."""

  def __init__(self, found):
    super().__init__(found.arrays)

  def take(self, *names):
    return [self.pop(name) for name in names]

  def prefixed(self, prefix):
    names = [name for name in self if name.startswith(prefix)]
    return {name[len(prefix) :]: self.pop(name) for name in names}

  def nothing_left(self):
    assert not self, f'unread: {sorted(self)}'


def _fields(E, H, block_name, **router):
  """What a user would write for the authors' small model."""
  return dict(
    D=8,
    F=12,
    expert_F=12,
    E=E,
    H=H,
    pattern='md',  # experts in layers 0 and 2 of 3
    block=block_name,
    eps=1e-5,
    init='thor',
    router=config.router('random', **router),
  )


# One layer.


class Layer:
  """The one layer of a file, and what the file gives it."""

  def __init__(self, unread, *, cross):
    block_name = ('post', 'pre')[int(unread.pop('normalize_before'))]
    self.E, H = int(unread.pop('num_experts')), int(unread.pop('heads'))
    self.kind = (cross, block_name, self.E, H)
    model, _ = _layer(*self.kind, per='batch')
    self.weights = Weights(model, unread.prefixed('w.'))
    self.x_BxLxD = _rows(unread.pop('x'))
    self.source_BxMxD = _rows(unread.pop('enc')) if cross else None
    pads = ('tgt_pad_mask', 'enc_pad_mask') if cross else ('pad_mask',)
    self.pads = unread.take(*pads)

  def run(self, cotangent_BxLxD, route_T, **router):
    """What `_layer` computes, with this router; a route replaces its draws."""
    _, run = _layer(*self.kind, **router)
    inputs = (self.weights.params, self.x_BxLxD, self.source_BxMxD)
    return jax.device_get(run(inputs, self.pads, cotangent_BxLxD, route_T))


@functools.cache
def _layer(cross, block_name, E, H, **router):
  """(a model with one layer, a function of it).

  (inputs, pads, cotangent, route) -> (y_BxLxD, what the experts got, what they
  answered, aux), gradients; these are None for the cotangent None, which also
  is the only one out of training.
  """
  fields = _fields(E, H, block_name, **router)
  model = golden.shapes(
    'translator', {**fields, 'N': 1, 'encoder_N': 1}, gmm='xla', V=1
  )
  model = model.decoder if cross else model.encoder
  _, state = models.split(model)

  def forward(inputs, pads, route_T, train):
    params, x_BxLxD, source_BxMxD = inputs
    layer = models.bind(model, params, state)
    experts = blocks.at(layer.body.pools, 0)
    seen = []

    def layout(x_TxD, plan, experts):
      y_TxD, overflow = layer.spec.layout(x_TxD, plan, experts)
      seen.append((x_TxD, y_TxD))
      return y_TxD, overflow

    B, L, _ = x_BxLxD.shape
    view = lambda pad: _view(pad, L, causal=cross and pad is pads[0])
    y_BxLxD, _, aux = blocks.at(blocks.at(layer.body.moe, 0), 0)(
      x_BxLxD,
      ((), ()),
      experts,
      dataclasses.replace(layer.spec, layout=layout),
      golden.context(
        B,
        L,
        train=train,
        replay=None if route_T is None else route_T[None, :, None],
      ),
      view(pads[0]),
      (source_BxMxD, view(pads[1])) if cross else None,
    )
    return y_BxLxD, *seen[0], aux

  @golden.jit
  def run(inputs, pads, cotangent_BxLxD, route_T):
    if cotangent_BxLxD is None:
      return forward(inputs, pads, route_T, train=False), None

    def loss(inputs):
      out = forward(inputs, pads, route_T, train=True)
      return jnp.sum(out[0] * cotangent_BxLxD), out

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
    return out, grads

  return model, run


def _view(pad_BxM, L, *, causal):
  return attention.View(
    jnp.zeros((len(pad_BxM), L), jnp.int32),
    jnp.where(pad_BxM, -1, 0).astype(jnp.int32),
    causal=causal,
  )


def _rows(x_LxBxD):
  """Their [time, row, D] as [row, time, D]."""
  return np.asarray(x_LxBxD, np.float64).swapaxes(0, 1)


def _flat(x_LxBxD):
  """The same as tokens, row by row."""
  return _rows(x_LxBxD).reshape(-1, x_LxBxD.shape[-1])


def layer_train(found, *, cross):
  """Each expert in turn serves all tokens: outputs and every gradient."""
  unread = Unread(found)
  layer = Layer(unread, cross=cross)
  cotangent_BxLxD = _rows(unread.pop('cotangent'))
  ffn_in_TxD = _flat(unread.pop('ffn_in'))
  T = len(ffn_in_TxD)
  for e in range(layer.E):
    (y_BxLxD, x_TxD, y_TxD, aux), grads = layer.run(
      cotangent_BxLxD, np.full(T, e, np.int32), per='batch'
    )
    golden.near(x_TxD, ffn_in_TxD, TOL)
    golden.near(y_TxD, _flat(unread.pop(f'ffn_out_e{e}')), TOL)
    golden.near(y_BxLxD, _rows(unread.pop(f'out_e{e}')), TOL)
    params, gx_BxLxD, gsource_BxMxD = grads
    ours = {**layer.weights.gradients(params), 'x': gx_BxLxD}
    expected = unread.prefixed(f'g_e{e}.')
    expected['x'] = _rows(unread.pop(f'gx_e{e}'))
    if cross:
      ours['enc'] = gsource_BxMxD
      expected['enc'] = _rows(unread.pop(f'genc_e{e}'))
    gradients_near(ours, expected)
    # Experts that were not drawn have no gradient at all.
    for other in set(range(layer.E)) - {e}:
      for name in FEED:
        name = name.replace('.', f'.{other}.')
        assert not ours[name].any() and not expected[name].any()
    load_E = aux['load_E'][0]
    assert load_E.tolist() == [T * (i == e) for i in range(layer.E)]
    assert aux['losses'] == {}
  unread.nothing_left()


def layer_infer(found):
  """Every way to dispatch, with their draws, and what our own draws share."""
  unread = Unread(found)
  layer = Layer(unread, cross=False)
  ffn_in_TxD = _flat(unread.pop('ffn_in'))
  ffn_all_ExTxD = np.stack([_flat(ffn) for ffn in unread.pop('ffn_all')])
  B, L, _ = layer.x_BxLxD.shape
  row_T, place_T = np.repeat(np.arange(B), L), np.tile(np.arange(L), B)

  def check(route_T, y_TxD, out, **router):
    found, _ = layer.run(None, route_T, per='batch', **router)
    golden.near(found[0], _rows(out), TOL)
    golden.near(found[1], ffn_in_TxD, TOL)
    golden.near(found[2], y_TxD, TOL)

  token_LxB, level1_L, row_B, one = unread.take(
    'mask_token', 'mask_level1', 'mask_sentence', 'expert_batch'
  )
  for name, route_T in (
    ('token', token_LxB.T.ravel()),
    ('level1', level1_L[place_T]),
    ('sentence', row_B[row_T]),
    ('batch', np.full(B * L, one)),
  ):
    y_TxD = ffn_all_ExTxD[route_T, np.arange(B * L)]
    check(route_T.astype(np.int32), y_TxD, unread[f'out_{name}'])
  check(
    None,
    ffn_all_ExTxD[one],
    unread['out_batch'],
    eval_per='fixed',
    fixed=int(one),
  )
  check(
    None,
    ffn_all_ExTxD.mean(axis=0),
    unread.pop('out_ensemble_oracle'),
    eval_per='ensemble',
  )
  unread.take('out_token', 'out_level1', 'out_sentence', 'out_batch')

  share = {
    'token': np.arange(B * L),
    'position': place_T,  # their level 1, said to be one for a sentence
    'sequence': row_T,
    'batch': np.zeros(B * L),
  }
  drawn = _draws(layer.E, B, L, tuple(share))
  for route_nxT, share_T in zip(drawn, share.values(), strict=True):
    alike_TxT = (route_nxT[:, :, None] == route_nxT[:, None, :]).all(axis=0)
    np.testing.assert_array_equal(alike_TxT, share_T[:, None] == share_T[None])
  unread.nothing_left()


@functools.cache
def _draws(E, B, L, ways):
  """[30, T] of each eval_per: the experts drawn out of training."""
  x_TxD = np.zeros((B * L, 1))  # draws do not read it

  def route(eval_per, key):
    router = routers.get('random')(
      1, E, per='fixed', eval_per=eval_per, rngs=nnx.Rngs(0)
    )
    ctx = golden.context(B, L).replace(key=key, batch_key=key)
    return router(x_TxD, ctx, ())[1]['route'][:, 0]

  @golden.jit
  def routes():
    keys = jax.random.split(jax.random.key(0), 30)
    of = lambda way: jax.vmap(functools.partial(route, way))(keys)
    return [of(way) for way in ways]

  return jax.device_get(routes())


# Losses.


def losses(found):
  unread = Unread(found)
  p_BxLxV, q_BxLxV, target_BxL, pad, pad_BxL = unread.take(
    'logits1', 'logits2', 'target', 'pad_idx', 'pad_mask'
  )
  np.testing.assert_array_equal(target_BxL == pad, pad_BxL)
  batch = {
    'target_BxL': target_BxL.astype(np.int32),
    'mask_BxL': (~pad_BxL).astype(np.float32),
  }
  logits = (np.float64(p_BxLxV), np.float64(q_BxLxV))
  count = float(np.sum(~pad_BxL))
  # The divergence is what alpha multiplies.
  divide = lambda alpha: objectives.get(
    'consistency', losses={}, alpha=alpha, smoothing=0.1
  )
  smooth = lambda smoothing: objectives.get(
    'next_token', losses={}, smoothing=smoothing
  )

  @golden.jit
  def run(logits):
    def of(goal, tokens=None):
      """(loss, metrics), gradients, with the logits as the model's answers."""

      def loss(logits):
        forward = lambda batch, pass_: (logits[pass_], [])
        loss, found = goal(forward, batch, tokens)
        return loss, {k: v for k, v in found.items() if k != 'aux'}

      return jax.value_and_grad(loss, has_aux=True)(logits)

    summed = [of(divide(alpha), jnp.ones(())) for alpha in (1.0, 0.0)]
    mean = [of(divide(alpha))[0][0] for alpha in (1.0, 0.0)]
    return summed, mean, [of(smooth(smoothing)) for smoothing in (0.0, 0.1)]

  summed, mean, smoothed = jax.device_get(run(logits))
  ((with_, sums), grads), ((without, _), other) = summed
  total = unread.pop('loss_sum')
  golden.near(sums['consistency_sum'], total, TOL)
  golden.near(with_ - without, total, TOL)
  golden.gradients_near(
    {f'glogits{i + 1}': grads[i] - other[i] for i in range(2)},
    {name: unread.pop(name) for name in ('glogits1', 'glogits2')},
    TOL,
  )
  # Both at once, and by default for each token.
  golden.near(mean[0] - mean[1], unread.pop('loss_per_token'), TOL)

  for name, found in zip(('eps00', 'eps01'), smoothed, strict=True):
    (loss, sums), (gradient, _) = found
    total = unread.pop(f'ls_loss_{name}')
    golden.near(loss * count, total, TOL)
    golden.near(sums['nll_sum'], unread.pop(f'ls_nll_{name}'), TOL)
    expected = {'logits': unread.pop(f'ls_glogits_{name}')}
    golden.gradients_near({'logits': gradient * count}, expected, TOL)
  unread.nothing_left()


# The whole model.


class Model:
  """The translator of a file, and what it reads; targets are not among it."""

  def __init__(self, unread):
    E, H = int(unread.pop('num_experts')), int(unread.pop('heads'))
    layers = tuple(int(n) for n in unread.take('dec_layers', 'enc_layers'))
    self.E = E
    pad, source_BxS, ids_BxL = unread.take('pad_idx', 'src', 'prev')
    weights = unread.prefixed('w.')
    V = len(weights['encoder.embed_tokens.weight'])
    self.kind = (E, H, *layers, V)
    self.weights = Weights(_model(*self.kind), weights)
    self.pad, (B, L) = pad, ids_BxL.shape
    self.real_BxL = ids_BxL != pad
    self.batch = {
      'source_BxS': source_BxS.astype(np.int32),  # padded at the left
      'source_mask_BxS': (source_BxS != pad).astype(np.float32),
      'ids_BxL': ids_BxL.astype(np.int32),  # and these at the right
      'segment_BxL': np.where(self.real_BxL, 0, -1).astype(np.int32),
      'pos_BxL': np.tile(np.arange(L, dtype=np.int32), (B, 1)),
      'row_B': np.arange(B, dtype=np.int32),
    }

  def replay(self, encoder_nxSxB, decoder_nxLxB):
    """As aux and ctx.replay have it: each of the layers has its own pool."""
    route = lambda r_LxB: r_LxB.T.reshape(1, 1, 1, -1, 1).astype(np.int32)
    return [route(r) for r in (*encoder_nxSxB, *decoder_nxLxB)]


@functools.cache
def _model(E, H, N, encoder_N, V):
  fields = _fields(E, H, 'post', per='batch')
  fields = {**fields, 'N': N, 'encoder_N': encoder_N}
  return golden.shapes('translator', fields, V=V, gmm='xla')


def _forward(model, params, batch, replay):
  """logits_BxLxV, aux, in training."""
  ctx = routers.context(batch, jax.random.key(0), 0, train=True, replay=replay)
  return models.bind(model, params, {})(batch, ctx)


@functools.cache
def _train(kind, alpha, smoothing):
  """(params, batch, the routes of both passes) -> what a step is made of.

  The mean loss, metrics, both passes' logits, of each their smoothed and plain
  cross-entropies, and the gradients of the params.
  """
  model = _model(*kind)
  goal = objectives.get(
    'consistency', losses={}, alpha=alpha, smoothing=smoothing
  )

  @golden.jit
  def run(params, batch, forced_2):
    def loss(params):
      # One after the other, so that a pass is compiled once.
      of = functools.partial(_forward, model, params, batch)
      passes = jax.lax.map(of, forced_2)
      pass_of = lambda i: jax.tree.map(lambda a: a[i], passes)
      mean, sums = goal(lambda batch, pass_: pass_of(pass_), batch)
      return mean, (sums, passes[0])

    (mean, (sums, logits_2xBxLxV)), grads = jax.value_and_grad(
      loss, has_aux=True
    )(params)
    target_BxL = batch['target_BxL']
    entropies = [
      (
        objectives.smoothed(logits_BxLxV, target_BxL, smoothing),
        objectives.cross_entropy(logits_BxLxV, target_BxL),
      )
      for logits_BxLxV in logits_2xBxLxV
    ]
    return mean, sums, logits_2xBxLxV, entropies, grads

  return run


@functools.cache
def _infer(kind):
  """(params, batch, replay) -> the encoder's answer, logits, aux."""
  model = _model(*kind)

  @golden.jit
  def run(params, batch, replay):
    ctx = routers.context(batch, jax.random.key(0), 0, train=False)
    bound = models.bind(model, params, {})
    # In two steps, as a search for translations has it.
    encoded, aux = bound.encode(batch, ctx.replace(replay=replay[:2]))
    logits_BxLxV, more = bound.decode(
      batch, encoded, ctx.replace(replay=replay[2:])
    )
    return encoded[0], logits_BxLxV, aux + more

  return run


def trainstep(found):
  """Two passes with the recorded draws: logits, losses, every gradient."""
  unread = Unread(found)
  model = Model(unread)
  batch = model.batch
  (B, S), (_, L) = batch['source_BxS'].shape, batch['ids_BxL'].shape
  assert unread.pop('expert_layer_idx').tolist() == [0, 2]
  target_BxL, count = unread.pop('tgt'), float(unread.pop('ntokens'))
  counted_BxL = target_BxL != model.pad
  assert unread.pop('sample_size') == count == counted_BxL.sum()
  batch['target_BxL'] = target_BxL.astype(np.int32)
  batch['mask_BxL'] = counted_BxL.astype(np.float32)
  encoder_2xn, decoder_2xn = unread.take('enc_choice', 'dec_choice')
  spread = lambda choice_n, L: np.tile(choice_n[:, None, None], (1, L, B))
  replay = [
    model.replay(spread(encoder_2xn[i], S), spread(decoder_2xn[i], L))
    for i in range(2)
  ]
  alpha, smoothing = map(float, unread.take('alpha', 'label_smoothing'))
  mean, sums, logits_2xBxLxV, entropies, grads = jax.device_get(
    _train(model.kind, alpha, smoothing)(
      model.weights.params,
      batch,
      jax.tree.map(lambda *a: np.stack(a), *replay),
    )
  )
  nll_2, real_BxL = unread.pop('nll'), model.real_BxL
  for i, logits_BxLxV in enumerate(logits_2xBxLxV):
    # Nothing is said of what follows a target's end.
    theirs = unread.take(f'logits{i + 1}', f'probs{i + 1}')
    ours = logits_BxLxV, np.exp(golden.log_softmax(logits_BxLxV))
    for a, b in zip(ours, theirs, strict=True):
      golden.near(a[real_BxL], b[real_BxL], TOL)
    smoothed_BxL, nll_BxL = entropies[i]
    golden.near(
      smoothed_BxL[counted_BxL].sum(), unread.pop(f'loss{i + 1}'), TOL
    )
    golden.near(nll_BxL[counted_BxL].sum(), nll_2[i], TOL)
  golden.near(sums['nll_sum'], nll_2[0], TOL)
  golden.near(sums['consistency_sum'], unread.pop('consistency'), TOL)
  assert float(sums['tokens']) == count
  golden.near(mean * count, unread.pop('loss'), TOL)
  gradients_near(
    {k: g * count for k, g in model.weights.gradients(grads).items()},
    unread.prefixed('g.'),
  )
  # The load is of both passes, in the encoder and then in the decoder, and of
  # tokens that are no padding.
  sources, targets = batch['source_mask_BxS'] > 0, batch['segment_BxL'] >= 0
  for aux, real, choice_2 in zip(
    sums['aux'],
    (sources, sources, targets, targets),
    (*encoder_2xn.T, *decoder_2xn.T),
    strict=True,
  ):
    load_E = real.sum() * np.bincount(choice_2, minlength=model.E)
    np.testing.assert_array_equal(aux['load_E'], load_E.reshape(1, 1, 1, -1))
  unread.nothing_left()


def model_infer(found):
  """Both inference levels, with the recorded draws."""
  unread = Unread(found)
  model = Model(unread)
  B, real_BxL = len(model.real_BxL), model.real_BxL
  run = _infer(model.kind)
  for level in ('l0', 'l1'):
    masks = unread.take(f'enc_mask_{level}', f'dec_mask_{level}')
    if level == 'l1':  # a draw for each place, the same in all rows
      masks = [np.repeat(mask[:, :, None], B, axis=2) for mask in masks]
    replay = model.replay(*masks)
    encoded_BxSxD, logits_BxLxV, aux = jax.device_get(
      run(model.weights.params, model.batch, replay)
    )
    # Padding has no expert here; nothing reads what is encoded there.
    source_BxS = np.asarray(model.batch['source_mask_BxS']) > 0
    expected = _rows(unread.pop(f'enc_out_{level}'))
    golden.near(encoded_BxSxD[source_BxS], expected[source_BxS], TOL)
    expected = unread.pop(f'logits_{level}')
    golden.near(logits_BxLxV[real_BxL], expected[real_BxL], TOL)
    real = [source_BxS] * len(masks[0]) + [real_BxL] * len(masks[1])
    for found, route, real_Bxn in zip(aux, replay, real, strict=True):
      real_T = real_Bxn.reshape(-1)
      np.testing.assert_array_equal(
        found['route'][..., real_T, :], route[..., real_T, :]
      )
  unread.nothing_left()


CHECKS = {
  'thor_enclayer_train_': functools.partial(layer_train, cross=False),
  'thor_declayer_train_': functools.partial(layer_train, cross=True),
  'thor_enclayer_infer_': layer_infer,
  'thor_losses_': losses,
  'thor_trainstep_': trainstep,
  'thor_model_infer_': model_infer,
}
