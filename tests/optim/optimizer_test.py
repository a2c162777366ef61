"""Learning rates at any length of run, what decays, what moments are kept."""

import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import attention, config, models, parallel, routers
from moe_jax.optim import optimizer, schedules
from tests.helpers import tiny

DEFAULT = {
  'name': 'adamw',
  'learning_rate': 0.5,
  'schedule': 'cosine',
  'warmup': 0.1,
  'decay': 0.2,
  'end': 0.1,
  'b1': 0.9,
  'b2': 0.95,
  'eps': 1e-8,
  'weight_decay': 0.0,
  'clip': 0.0,
  'moments': 'params',
  'accumulate': 1,
}


def _config(**changes):
  return optimizer.Config(**{**DEFAULT, **changes})


def _rates(steps, **changes):
  """The rate of every step."""
  rate = jax.jit(jax.vmap(optimizer.schedule(_config(**changes), steps)))
  return np.asarray(rate(np.arange(steps, dtype=np.int32)))


every_schedule = pytest.mark.parametrize('name', schedules.names())


@every_schedule
@pytest.mark.parametrize('steps', [1, 2, 10, 1000])
@pytest.mark.parametrize('warmup', [0.02, 0.5, 1.0])
def test_rates_rise_then_never_rise_again(name, steps, warmup):
  rates = _rates(steps, schedule=name, warmup=warmup, decay=(1 - warmup) / 2)
  assert np.isfinite(rates).all() and (rates > 0).all()
  assert rates.max() <= 0.5 * (1 + 1e-6)
  assert rates.max() == pytest.approx(0.5)
  top = int(np.argmax(rates >= rates.max() * (1 - 1e-6)))
  assert (np.diff(rates[: top + 1]) > 0).all()
  assert (np.diff(rates[top:]) <= 1e-7).all()
  assert top <= max(1, warmup * steps)


@every_schedule
def test_warm_up_is_linear_and_its_first_step_is_not_zero(name):
  rates = _rates(1000, schedule=name)
  np.testing.assert_allclose(rates[:100], 0.5 * np.arange(1, 101) / 100, 1e-5)


@pytest.mark.parametrize('name', ['cosine', 'constant', 'wsd'])
@pytest.mark.parametrize('steps', [1, 2, 10])
def test_without_warm_up_the_first_step_is_at_the_top(name, steps):
  rates = _rates(steps, schedule=name, warmup=0.0, decay=0.3)
  assert rates[0] == pytest.approx(0.5)


@pytest.mark.parametrize('name', ['cosine', 'wsd'])
@pytest.mark.parametrize('steps', [2, 7, 10, 840])
@pytest.mark.parametrize('warmup', [0.0, 0.02, 0.5])
def test_the_last_step_has_the_last_rate(name, steps, warmup):
  rates = _rates(steps, schedule=name, warmup=warmup, decay=0.2)
  assert rates[-1] == pytest.approx(0.05, rel=1e-6)
  assert rates[-2] > 0.05 * (1 + 1e-6)


def test_cosine_is_half_way_in_the_middle():
  assert _rates(1000)[549] == pytest.approx((0.5 + 0.05) / 2, rel=2e-3)


def test_wsd_is_level_and_then_falls_in_a_line():
  rates = _rates(1000, schedule='wsd')
  np.testing.assert_allclose(rates[100:800], 0.5, 1e-6)
  np.testing.assert_allclose(np.diff(rates[799:]), -0.45 / 200, 1e-3)


def test_warm_up_and_decay_are_whole_steps():
  """7 % of 100 is a little more than 7 in floats."""
  rates = _rates(100, schedule='wsd', warmup=0.07, decay=0.29)
  assert rates[6] == 0.5 and rates[5] == pytest.approx(0.5 * 6 / 7)
  assert rates[70] == 0.5 and rates[71] < 0.5


def test_inverse_sqrt_halves_when_four_times_the_warm_up_is_done():
  rates = _rates(1000, schedule='inverse_sqrt')
  assert rates[400] == pytest.approx(0.25, rel=1e-5)


def test_constant_stays():
  np.testing.assert_allclose(_rates(10, schedule='constant'), 0.5, 1e-6)


def _step(grads, params, **changes):
  rule = optimizer.make(_config(schedule='constant', **changes), 10)

  @jax.jit
  def step(grads, params):
    updates, _ = rule.update(grads, rule.init(params), params, step=0)
    return optax.apply_updates(params, updates)

  with jax.numpy_dtype_promotion('standard'):
    return step(grads, params)


# What each parameter is that a file of the project makes, by its first word.
WORDS = {
  'matrix': 'query key value out latent up gate down patch',
  'table': 'embed head position w',  # w: a router's, of all experts
  'vector': 'scale bias class',
}
MODELS = {'classifier': {'size': (4, 4, 1)}}
OPTIONS = {'gqa': {'bias': True, 'qk_norm': 'head'}, 'mla': {'rank': 4}}


def _made():
  """The parameters of every model, attention and router, each named once."""
  changes = [
    *({'router': {'name': name}} for name in routers.names()),
    *(
      {'attention': {'name': name, **OPTIONS.get(name, {})}}
      for name in attention.names()
    ),
    {
      'norm': 'layer',
      'bias': True,
      'iterations': 2,
      'inner_residual': 'upcycle',
    },
    {'tied': False, 'shared_F': 8},
  ]
  built = [tiny.fresh(N=1, **changed) for changed in changes]
  for module in pkgutil.iter_modules(models.__path__):
    fields = config.model(module.name, N=2, D=8, H=2, F=8, expert_F=8)
    fields = {**fields.to_dict(), 'gmm': 'xla', **MODELS.get(module.name, {})}
    build = models.initializer({**fields, 'V': 8}, parallel.Layout())
    built.append(models.abstract(build))
  found = {}
  for model in built:
    params, _ = models.split(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      found[path[-1].key] = leaf
  return found


def test_every_parameter_has_the_role_of_its_name():
  """Vectors do not decay, matrices alone are orthogonalised."""
  made = _made()
  words = {name.partition('_')[0] for name in made}
  assert words <= set(' '.join(WORDS.values()).split()), 'say what these are'
  roles = {w: role for role, text in WORDS.items() for w in text.split()}
  rates = {'weight_decay': 0.2, 'learning_rate': 1.0, 'warmup': 0.0}
  one = {k: jnp.ones(a.shape, a.dtype) for k, a in made.items()}
  left = _step(jax.tree.map(jnp.zeros_like, one), one, **rates)
  muon = optimizer.make(_config(name='muon'), 10)
  moments = jax.eval_shape(muon.init, made)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(moments)]
  turned = {
    getattr(path[-1], 'key', '')
    for path in paths
    if "['muon']" in jax.tree_util.keystr(path)
  }
  for name, value in left.items():
    role = roles[name.partition('_')[0]]
    decays = 1 if role == 'vector' else 1 - 0.2
    np.testing.assert_allclose(value, decays, 1e-6, err_msg=name)
    assert (name in turned) == (role == 'matrix'), name


def test_a_parameter_without_axes_in_its_name_decays_and_is_not_turned():
  for name in ('kernel', 'w1', 'log_temperature', 'gate_w'):
    assert optimizer.role(name) == 'table'
  assert optimizer.role('any_DxF') == 'matrix'
  assert optimizer.role('any_D') == optimizer.role('bias') == 'vector'


def _first_moment(clip, grads):
  rule = optimizer.make(_config(clip=clip), 10)

  @jax.jit
  def moment(grads):
    params = jax.tree.map(jnp.zeros_like, grads)
    _, state = rule.update(grads, rule.init(params), params, step=0)
    return optax.tree.get(state, 'mu')

  with jax.numpy_dtype_promotion('standard'):
    return moment(grads)


def test_clip_bounds_the_norm_of_all_gradients_together():
  grads = {'a': jnp.array([3.0, 0.0]), 'b': jnp.array([0.0, 4.0])}
  clipped = _first_moment(1.0, grads)
  np.testing.assert_allclose(clipped['a'], [0.1 * 0.6, 0], 1e-5)
  np.testing.assert_allclose(clipped['b'], [0, 0.1 * 0.8], 1e-5)
  np.testing.assert_allclose(_first_moment(9.0, grads)['a'], [0.3, 0], 1e-5)
  np.testing.assert_allclose(_first_moment(0.0, grads)['b'], [0, 0.4], 1e-5)


@pytest.mark.parametrize('moments', optimizer.MOMENTS)
def test_the_rate_is_that_of_the_runs_step(moments):
  """Whatever the optimiser has seen; Adam's first step moves by its rate."""
  params = {'scale_D': jnp.zeros(3)}
  grads = {'scale_D': jnp.array([1.0, -2.0, 5.0])}
  c = _config(moments=moments, warmup=0.5)
  rule = optimizer.make(c, 10)
  for step, rate in ((0, 0.1), (4, 0.5), (9, 0.05)):
    with jax.numpy_dtype_promotion('standard'):
      moved, _ = rule.update(grads, rule.init(params), params, step=step)
    expected = [-rate, rate, -rate]
    np.testing.assert_allclose(moved['scale_D'], expected, 1e-5)


@pytest.mark.parametrize(
  'changes, told',
  [
    ({'schedule': 'step'}, "'step'; there are constant"),
    ({'moments': 'float16'}, "'float16'; there are params, bfloat16"),
    ({'warmup': 1.5}, 'warmup=1.5'),
    ({'decay': -0.1}, 'decay=-0.1'),
    ({'end': 2}, 'end=2'),
    ({'learning_rate': -1.0}, 'learning_rate=-1.0'),
    ({'clip': -1.0}, 'clip=-1.0'),
    ({'accumulate': 0}, 'accumulate=0'),
    ({'schedule': 'inverse_sqrt', 'warmup': 0.0}, 'warmup=0 has none'),
    ({'schedule': 'wsd', 'warmup': 0.9}, 'warmup=0.9 and decay=0.2'),
  ],
)
def test_what_cannot_be_is_told(changes, told):
  with pytest.raises(ValueError, match=told):
    _config(**changes)


def test_muon_steps_are_orthogonal_for_matrices_and_adams_for_the_rest():
  draw = lambda i, *shape: np.float32(
    np.random.default_rng(i).normal(size=shape)
  )
  params = {
    'up_ExDxF': draw(0, 2, 3, 16, 6),  # stacked over 2 layers
    'query_DxHxS': draw(1, 2, 16, 2, 4),
    'out_HxSxD': draw(2, 2, 2, 4, 16),
    'w_DxE': draw(3, 2, 16, 3),
    'embed_VxD': draw(4, 7, 16),
    'scale_D': draw(5, 2, 16),
  }
  grads = jax.tree.map(lambda a: a + np.sign(a), params)
  c = _config(name='muon', schedule='constant', learning_rate=1.0)
  rule = optimizer.make(c, 10)
  step = lambda grads, params: rule.update(
    grads, rule.init(params), params, step=0
  )
  with jax.numpy_dtype_promotion('standard'):
    steps, _ = jax.jit(step)(grads, params)
  matrices = {
    'up_ExDxF': steps['up_ExDxF'].reshape(6, 16, 6),
    'query_DxHxS': steps['query_DxHxS'].reshape(2, 16, 8),
    'out_HxSxD': steps['out_HxSxD'].reshape(2, 8, 16),
  }
  for name, step in matrices.items():
    values = np.linalg.svd(np.asarray(step), compute_uv=False)
    assert values.min() > 0.5 * values.max(), name
    rms = np.sqrt(np.mean(np.asarray(step) ** 2))
    assert 0.1 < rms < 0.3, name
  for name in ('w_DxE', 'embed_VxD', 'scale_D'):
    size = -np.asarray(steps[name]) * np.sign(grads[name])
    assert size.min() > 0.9 * size.max() > 0, name  # Adam's first: a sign


# --- moments in fewer bits --------------------------------------------------

every_optimizer = pytest.mark.parametrize('name', optimizer.OPTIMIZERS)


def _weights(dtype=np.float32):
  """Of a dense layer: Muon's rule is for the first two, Adam's for the rest."""
  draw = lambda i, *shape: np.random.default_rng(i).normal(size=shape)
  weights = {
    'up_DxF': draw(0, 8, 16),
    'down_FxD': draw(1, 16, 8),
    'scale_D': draw(2, 8),
  }
  return jax.tree.map(lambda a: jnp.asarray(a, dtype), weights)


def _steps(params, grads, **changes):
  """(updates, state) of each step with these gradients.

  Not compiled: XLA may compute in float32 what is written in bfloat16.
  """
  rule = optimizer.make(
    _config(schedule='constant', warmup=0.0, learning_rate=0.01, **changes), 10
  )
  state, found = rule.init(params), []
  for grad in grads:
    with jax.numpy_dtype_promotion('standard'):
      updates, state = rule.update(grad, state, params, step=0)
    found.append((updates, state))
  return found


def _shapes(params, **changes):
  """updates and state of a step."""
  step = lambda params: _steps(params, [params], **changes)[0]
  return jax.eval_shape(step, params)


def _types(state):
  """{path: dtype} of the moments, and of what else the state has."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  names = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in leaves}
  inside = lambda path: '.mu' in path or '.nu' in path
  return (
    {path: dtype for path, dtype in names.items() if inside(path)},
    {path: dtype for path, dtype in names.items() if not inside(path)},
  )


@every_optimizer
def test_moments_alone_are_kept_in_bfloat16(name):
  params = _weights()
  wide, narrow = (
    optimizer.make(_config(name=name, moments=moments), 10)
    for moments in ('params', 'bfloat16')
  )
  first = jax.eval_shape(narrow.init, params)
  _, second = _shapes(params, name=name, moments='bfloat16')
  for state in (first, second):
    moments, rest = _types(state)
    assert len(moments) == (6 if name == 'adamw' else 4)
    assert set(moments.values()) == {jnp.dtype(jnp.bfloat16)}
    assert rest == _types(jax.eval_shape(wide.init, params))[1]


@every_optimizer
def test_steps_with_bfloat16_moments_are_those_of_float32_rounded(name):
  # Growing, of one sign: a rounded mu is below 0.34 of the next, nu below 0.22,
  # which has a root drawn; rounding is by 2**-8 at most.
  grads = [
    jax.tree.map(lambda a, k=k: jnp.abs(a) + k, _weights()) for k in (1, 4)
  ]
  wide, narrow = (
    [updates for updates, _ in _steps(_weights(), grads, name=name, moments=m)]
    for m in ('params', 'bfloat16')
  )
  # The first step's moments are still zero: all its arithmetic is float32.
  jax.tree.map(np.testing.assert_array_equal, wide[0], narrow[0])
  for key, expected in wide[1].items():
    actual = np.asarray(narrow[1][key])
    error = np.abs(actual - expected)
    assert error.max() > 0
    if name == 'adamw' or key == 'scale_D':
      assert (error <= (0.34 + 0.22 / 2) * 2**-8 * np.abs(expected)).all()
    else:  # of an orthogonal matrix no entry is determined by its own moment
      assert np.linalg.norm(error) <= 2**-5 * np.linalg.norm(expected)


@every_optimizer
def test_a_run_with_bfloat16_moments_falls_as_with_float32(name):
  size = optax.tree.norm  # the loss: a cone with its tip at zero
  start = float(size(_weights()))

  def end(moments):
    changes = {'name': name, 'moments': moments, 'learning_rate': 0.3}
    rule, params = optimizer.make(_config(**changes), 40), _weights()
    state = rule.init(params)

    @jax.jit
    def step(params, state, step):
      grads = jax.grad(size)(params)
      updates, state = rule.update(grads, state, params, step=step)
      return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion('standard'):
      for i in range(40):
        params, state = step(params, state, i)
    return float(size(params))

  wide, narrow = end('params'), end('bfloat16')
  assert narrow < 0.2 * start
  assert narrow == pytest.approx(wide, abs=0.01 * start)


@every_optimizer
@pytest.mark.parametrize('moments', optimizer.MOMENTS)
def test_float64_stays_float64(name, moments):
  kept = {'params': jnp.float64, 'bfloat16': jnp.bfloat16}[moments]
  with jax.enable_x64(True):
    params = _weights(jnp.float64)
    updates, state = _shapes(params, name=name, moments=moments)
    assert {a.dtype for a in updates.values()} == {jnp.dtype(jnp.float64)}
    assert set(_types(state)[0].values()) == {jnp.dtype(kept)}
