"""Residual rules and links, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import residuals

X = np.float32([1.0, -2.0])
ANSWERS = np.float32([[1.0, 1.0], [2.0, 0.0], [0.0, 4.0]])


# Wider than ANSWERS, and deep enough that old memories count.
LAYERS = np.random.default_rng(0).normal(size=(5, 3, 4))
MOMENTUM = {
  name: {} for name in residuals.names() if residuals.momentum(name)
} | {'adam': {'layers': 'all'}}


def _run(rule, x=X, answers=ANSWERS):
  """The stream after each of the layers that answer so."""
  return np.stack(_stream(rule, x, answers))


def _stream(rule, x, answers):
  memory, out = rule.init(x), []
  for depth, h in enumerate(answers):
    x, memory = rule.apply(x, memory, h, np.int32(depth))
    out.append(x)
  return out


@pytest.mark.parametrize('name', residuals.names())
def test_bfloat16_is_the_wide_rule_rounded(name):
  """Coefficients and memories are not: 0.999 would be 1."""
  rule = residuals.get(name, **MOMENTUM.get(name, {}))
  low = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (X, ANSWERS))
  memory, (x, answers) = rule.init(low[0]), low
  other = rule.init(x.astype(jnp.float32))
  for h in answers:
    looked_ahead = rule.lookahead(h, memory)
    wide = rule.lookahead(h.astype(jnp.float32), other)
    np.testing.assert_array_equal(looked_ahead, wide.astype(jnp.bfloat16))
    stream, memory = rule.apply(x, memory, h, np.int32(0))
    expected, other = rule.apply(
      x.astype(jnp.float32), other, h.astype(jnp.float32), np.int32(0)
    )
    jax.tree.map(np.testing.assert_array_equal, memory, other)
    np.testing.assert_array_equal(stream, expected.astype(jnp.bfloat16))
    x = stream


def test_plain_adds():
  np.testing.assert_array_equal(
    _run(residuals.get('plain')), X + ANSWERS.cumsum(0)
  )


def test_replace_takes_the_answer():
  np.testing.assert_array_equal(_run(residuals.get('replace')), ANSWERS)


def test_heavy_ball_averages_over_depth():
  rule = residuals.get('heavy_ball', mu=0.5, gamma=2.0, sign=-1.0)
  momentum = [[2, 2], [5, 1], [2.5, 8.5]]  # 0.5 m + 2 h
  expected = X - np.cumsum(momentum, axis=0, dtype=np.float32)
  np.testing.assert_array_equal(_run(rule), expected)


def test_heavy_ball_without_memory_is_plain_bit_for_bit():
  rule = residuals.get('heavy_ball', mu=0.0, gamma=1.0, sign=1.0)
  plain = residuals.get('plain')
  np.testing.assert_array_equal(_run(rule), _run(plain))
  slopes = lambda rule: jax.jit(
    jax.grad(
      lambda x, answers: jnp.vdot(X, _stream(rule, x, answers)[-1]), (0, 1)
    )
  )(X, ANSWERS)
  jax.tree.map(np.testing.assert_array_equal, slopes(rule), slopes(plain))


def test_negative_momentum_alternates():
  rule = residuals.get('heavy_ball', mu=-0.5, sign=-1.0)
  momentum = [[1, 1], [1.5, -0.5], [-0.75, 4.25]]
  expected = X - np.cumsum(momentum, axis=0, dtype=np.float32)
  np.testing.assert_array_equal(_run(rule), expected)


# Each of the next three is written as in the paper or its code, one number at a
# time, in Python's own floats; no array, no where, no folded constants.


def _adam_by_hand(layers, gamma, b1, b2, mu, momentum_gamma, decay, eps):
  def stack(x, answers):
    p = v = m = 0.0
    for depth, f in enumerate(answers):
      m = mu * m + momentum_gamma * f
      if layers == 'all' or depth == 0:
        p = b1 * p + (1 - b1) * f
        v = b2 * v + (1 - b2) * f**2
        x = x - (decay * x + gamma * p / (v + eps) ** 0.5)
      else:
        x = x - m
      yield x

  return stack


def _robust_by_hand(rho, kappa):
  def stack(x, answers):
    alpha = kappa * rho**3 / (kappa - 1)
    beta = kappa * (1 - rho) ** 2 * (1 + rho)
    m = 0.0
    for f in answers:
      m = -f + alpha * m
      x = x + beta * m
      yield x

  return stack


def _complex_by_hand(b1, b2, gamma):
  def stack(x, answers):
    m = 0j
    for f in answers:
      m = complex(b1, b2) * m + gamma * f
      x = x - m.real
      yield x

  return stack


ADAM = dict(gamma=0.8, b1=0.9, b2=0.99, mu=0.6, momentum_gamma=1.2, eps=1e-3)


@pytest.mark.parametrize(
  'name, options, by_hand',
  [
    ('adam', dict(ADAM, layers='first', decay=1.0), _adam_by_hand),
    ('adam', dict(ADAM, layers='all', decay=0.25), _adam_by_hand),
    ('robust', dict(rho=0.2, kappa=1.25), _robust_by_hand),
    ('robust', dict(rho=0.4, kappa=2.0), _robust_by_hand),
    ('complex', dict(b1=0.7, b2=0.3, gamma=0.9), _complex_by_hand),
  ],
)
def test_momentum_by_hand(name, options, by_hand):
  x = np.random.default_rng(1).normal(size=LAYERS.shape[1:])
  with jax.enable_x64(True):
    found = _run(residuals.get(name, **options), x, LAYERS)
  for i, j in np.ndindex(x.shape):
    expected = list(
      by_hand(**options)(float(x[i, j]), LAYERS[:, i, j].tolist())
    )
    np.testing.assert_allclose(found[:, i, j], expected, 1e-12)


def test_adam_leaves_its_moments_alone_after_the_first_layer():
  rule = residuals.get('adam')
  x, first = rule.apply(X, rule.init(X), ANSWERS[0], np.int32(0))
  _, second = rule.apply(x, first, ANSWERS[1], np.int32(1))
  for before, after in zip(first[:2], second[:2], strict=True):
    np.testing.assert_array_equal(before, after)
  np.testing.assert_allclose(second[2], 0.7 * ANSWERS[0] + ANSWERS[1], 1e-6)


def test_robust_looks_ahead_along_its_momentum():
  memory = np.float64([3.0, -1.0])
  for rho, kappa in ((0.2, 1.25), (0.4, 2.0)):
    ahead = kappa * rho**3 / (kappa - 1)  # eps beta, by their definitions
    rule = residuals.get('robust', rho=rho, kappa=kappa)
    shown = rule.lookahead(np.ones(2), memory)
    np.testing.assert_allclose(shown, 1 + ahead * memory, 1e-12)


@pytest.mark.parametrize('kappa', [1.25, 2.0, 10.0])
def test_robust_is_between_triple_momentum_and_gradient_descent(kappa):
  """At its fastest the constants are those of Van Scoy et al. 2018, table 1."""
  fast, slow = 1 - kappa**-0.5, 1 - 1 / kappa
  memory = np.ones(1)
  rule = residuals.get('robust', rho=fast, kappa=kappa)
  alpha = rule.apply(np.zeros(1), memory, np.zeros(1), np.int32(0))[1]
  np.testing.assert_allclose(alpha, fast**2 / (2 - fast), 1e-9)
  for rho in (fast - 1e-3, slow + 1e-3):
    with pytest.raises(ValueError, match=f'rho is .* kappa={kappa}'):
      residuals.get('robust', rho=rho, kappa=kappa)
  residuals.get('robust', rho=slow, kappa=kappa)


def test_robust_needs_a_condition_number_above_one():
  with pytest.raises(ValueError, match=r'kappa=1 is not a float in \(1, inf\)'):
    residuals.get('robust', rho=0.1, kappa=1)


def test_complex_without_an_imaginary_part_is_heavy_ball():
  turning = residuals.get('complex', b1=0.6, b2=0.0, gamma=1.5)
  ball = residuals.get('heavy_ball', mu=0.6, gamma=1.5, sign=-1.0)
  np.testing.assert_array_equal(_run(turning), _run(ball))


def test_adam_layers_are_first_or_all():
  with pytest.raises(ValueError, match="'last'"):
    residuals.get('adam', layers='last')


def test_only_robust_looks_ahead():
  looks = set()
  for name in residuals.names():
    rule = residuals.get(name)
    shown = rule.lookahead(X, rule.apply(X, rule.init(X), X, np.int32(0))[1])
    if not np.array_equal(shown, X):
      looks.add(name)
  assert looks == {'robust'}


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('name', MOMENTUM)
def test_memory_has_the_shape_of_the_stream_and_is_wide(name, dtype):
  rule = residuals.get(name, **MOMENTUM[name])
  x = jnp.asarray(X, dtype)

  def layer(carry, depth):
    x, memory = carry
    return rule.apply(x, memory, rule.lookahead(x, memory), depth), ()

  # A scan refuses a memory that changes; depth is traced.
  carry = jax.jit(
    lambda x: jax.lax.scan(
      layer, (x, rule.init(x)), jnp.arange(3, dtype=jnp.int32)
    )[0]
  )(x)
  x, memory = carry
  assert x.dtype == dtype and x.shape == X.shape
  for leaf in jax.tree.leaves(memory):
    assert leaf.dtype == jnp.float32 and leaf.shape == X.shape


@pytest.mark.parametrize('layers', ['first', 'all'])
def test_gradients_of_adam_are_finite_where_answers_vanish(layers):
  rule = residuals.get('adam', layers=layers)

  def total(h):
    x, memory = rule.apply(X, rule.init(X), h, jnp.int32(0))
    return jnp.sum(rule.apply(x, memory, h, jnp.int32(1))[0])

  slope = jax.grad(total)(jnp.zeros(2))
  assert np.isfinite(slope).all() and slope.any()


@pytest.mark.parametrize('name', residuals.names())
def test_gradients_are_the_slopes_of_the_stream(name):
  """For the input and every answer, where the depth is traced."""
  rule = residuals.get(name, **MOMENTUM.get(name, {}))

  @jax.jit
  def goal(x, answers):
    def layer(carry, scanned):
      x, memory = carry
      depth, h = scanned
      x, memory = rule.apply(x, memory, rule.lookahead(h, memory), depth)
      return (x, memory), x

    depths = jnp.arange(len(answers), dtype=jnp.int32)
    _, stream = jax.lax.scan(layer, (x, rule.init(x)), (depths, answers))
    return jnp.vdot(LAYERS, stream)

  at = np.float64(X[1] * LAYERS[0]), LAYERS[:, ::-1]
  with jax.enable_x64(True):
    grads = jax.jit(jax.grad(goal, (0, 1)))(*at)
    for i, grad in enumerate(grads):
      for place in ((0,) * grad.ndim, (-1,) * grad.ndim):
        moved = [list(at), list(at)]
        for side, step in zip(moved, (1e-6, -1e-6), strict=True):
          side[i] = side[i].copy()
          side[i][place] += step
        slope = (goal(*moved[0]) - goal(*moved[1])) / 2e-6
        np.testing.assert_allclose(grad[place], slope, 1e-5, 1e-8)
      if i or name not in ('replace', 'adam'):  # which decays all of x
        assert np.abs(grad).min() > 0


# Links.


@pytest.mark.parametrize(
  'link, expected', [('replace', 4), ('add', 2 + 4), ('init', 1 + 4)]
)
@pytest.mark.parametrize('last', [False, True])
def test_links(link, expected, last):
  assert residuals.INNER_RESIDUALS[link].join(1, 2, 4, None, last) == expected
  assert not residuals.INNER_RESIDUALS[link].learned


def test_upcycling_starts_from_the_input_and_answers_with_the_last():
  link = residuals.INNER_RESIDUALS['upcycle']
  assert link.learned
  h0, h, y = jnp.float32([1, 2]), jnp.float32([5, 6]), jnp.float32([4, 4])
  join = lambda scale, last: link.join(h0, h, y, jnp.float32(scale), last)
  np.testing.assert_array_equal(join(0.0, False), h0)
  np.testing.assert_array_equal(join(0.5, False), [3, 4])
  np.testing.assert_array_equal(join(0.5, True), y)
  low = link.join(*(a.astype(jnp.bfloat16) for a in (h0, h, y)), h0[0], False)
  assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize('link', ['add', 'init', 'upcycle'])
@pytest.mark.parametrize('rule', ['heavy_ball', 'adam', 'robust', 'complex'])
def test_two_carriers_of_the_residual_are_refused(link, rule):
  with pytest.raises(ValueError, match=f"'{link}' with residual '{rule}'"):
    residuals.check(link, rule)


@pytest.mark.parametrize('link', residuals.INNER_RESIDUALS)
@pytest.mark.parametrize('rule', ['plain', 'replace'])
def test_other_crossings_are_allowed(link, rule):
  residuals.check(link, rule)
  residuals.check('replace', 'heavy_ball')


def test_unknown_names_are_told():
  with pytest.raises(ValueError, match="'nesterov'; there are adam"):
    residuals.get('nesterov')
  with pytest.raises(ValueError, match="'sum'; there are replace"):
    residuals.check('sum', 'plain')


def test_an_unknown_option_is_an_error():
  with pytest.raises(TypeError, match='nu'):
    residuals.get('heavy_ball', nu=1.0)
