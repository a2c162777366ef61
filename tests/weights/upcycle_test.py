"""Models that have grown answer as before, until they are trained."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config, models, routers
from moe_jax.decode import generate
from moe_jax.training import jobs, saved_run, train_step
from moe_jax.weights import convert, upcycle
from tests.helpers.small import command, small_config
from tests.training.init_from_test import first_loss
from tests.weights.convert_test import begun, described, made, publish, values

B, L, V = 2, 12, 20
IDS_BxL = np.random.default_rng(0).integers(0, V, (B, L), np.int32)
DENSE = {
  'V': V,
  'N': 4,
  'D': 8,
  'H': 2,
  'F': 12,
  'tied': True,
  'pattern': 'd',
  'attention.name': 'gqa',
  'router.name': 'topk',
}


def answers(workdir, scale=0.0):
  """logits_BxLxV of the weights in a work directory, and aux.

  `scale` is added to those of a link, on which nothing else depends.
  """
  job, weights = generate.newest(str(workdir))
  if scale:
    feed = weights.params['trunk']['body']['moe']['feed']
    feed['scale_I'] = feed['scale_I'] + scale
  run = jax.jit(functools.partial(_run, job))
  run = _programs.setdefault(json.dumps(job.config['model']), run)
  logits_BxLxV, aux = run(weights)
  return np.asarray(logits_BxLxV), jax.device_get(aux)


_programs = {}  # by the config of a model


def _run(job, weights):
  model = models.bind(job.model, weights.params, weights.router_state)
  zero = np.zeros((B, L), np.int32)
  batch = {
    'ids_BxL': jnp.asarray(IDS_BxL),
    'segment_BxL': zero,
    'pos_BxL': zero + np.arange(L, dtype=np.int32),
    'row_B': np.arange(B, dtype=np.int32),
  }
  ctx = routers.context(batch, jax.random.key(0), jnp.int32(0), train=False)
  return model(batch, ctx)


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  """A dense model, and its logits."""
  folder = made(tmp_path_factory.mktemp('dense') / 'run', DENSE)
  return folder, answers(folder)[0]


@pytest.fixture(scope='module')
def sliced(dense, tmp_path_factory):
  """What the dense model becomes with slices and iterations."""
  growth = upcycle.UpcycleConfig(E=6, k=2, slices=2, iterations=2)
  folder = tmp_path_factory.mktemp('sliced') / 'run'
  upcycle.grow(str(dense[0]), str(folder), growth)
  return folder, growth


def close(found, expected):
  assert np.abs(expected).max() > 1
  error = np.abs(found - expected).max() / np.abs(expected).max()
  assert error < 1e-5


@pytest.mark.parametrize(
  'given, biased',
  [
    ('E=3,k=1,pattern=dm', False),
    ('E=12,k=9,slices=3,std=3.0', True),
    ('E=6,k=6,slices=2,first_dense=1,iterations=3,seed=5', False),
  ],
)
def test_the_first_logits_are_the_dense_models(given, biased, dense, tmp_path):
  """Of all E, k and routers: whole sets of slices answer for each token.

  Biases and other activations add up, too.
  """
  folder, expected = dense
  if biased:
    options = {'bias': True, 'activation': 'gelu', 'norm': 'layer'}
    folder = made(tmp_path / 'dense', {**DENSE, **options})
    expected = answers(folder)[0]
  growth = upcycle.parse(given.split(','))
  (told,) = upcycle.grow(str(folder), str(tmp_path / 'run'), growth)
  assert given.split(',')[0] in told
  logits_BxLxV, aux = answers(tmp_path / 'run')
  close(logits_BxLxV, expected)
  chosen = set()
  for found in aux:
    route_NxTxK = found['route'].reshape(-1, B * L, growth.k)
    slices = np.sort(route_NxTxK % growth.slices, axis=-1)
    each = np.repeat(np.arange(growth.slices), growth.k // growth.slices)
    np.testing.assert_array_equal(
      slices, np.broadcast_to(each, route_NxTxK.shape)
    )
    chosen |= set(route_NxTxK.ravel().tolist())
  assert len(chosen) > growth.k or growth.k == growth.E
  moe = len(aux[0]['route'])
  assert moe == {'dm': 2, 'm': 4 - growth.first_dense}[growth.pattern]


def test_experts_are_slices_by_hand(dense, sliced):
  """Expert j * slices + s is slice s; routers differ by layer and iteration."""
  old, new = (
    jax.device_get(generate.newest(str(f))[1].params)['trunk']
    for f, _ in (dense, sliced)
  )
  one, pools = old['first']['feed']['one'], new['body']['pools']
  for layer in range(4):
    for e in range(6):
      own = slice(6 * (e % 2), 6 * (e % 2) + 6)
      np.testing.assert_array_equal(
        pools['gate_ExDxF'][layer, e], one['gate_ExDxF'][layer, 0, :, own]
      )
      np.testing.assert_array_equal(
        pools['down_ExFxD'][layer, e], one['down_ExFxD'][layer, 0, own]
      )
  w_GxIxDxE = new['body']['moe']['feed']['routers']['w_DxE'][:, 0]
  np.testing.assert_array_equal(w_GxIxDxE[..., 0::2], w_GxIxDxE[..., 1::2])
  columns = w_GxIxDxE[..., 0::2].transpose(0, 1, 3, 2).reshape(-1, 8)
  assert len(np.unique(columns, axis=0)) == 4 * 2 * 3
  assert 0.01 < np.std(columns) < 0.03


def test_iterations_of_routed_layers_begin_as_one(tmp_path):
  """With shared experts, a router's state, a dense layer."""
  folder = made(
    tmp_path / 'one',
    {
      **DENSE,
      'pattern': 'm',
      'E': 4,
      'expert_F': 6,
      'shared_F': 5,
      'first_dense': 1,
      'router.bias_rate': 0.1,
      'router.score': 'sigmoid',
    },
  )
  growth = upcycle.parse(['iterations=2'])
  upcycle.grow(str(folder), str(tmp_path / 'run'), growth)
  logits_BxLxV, (aux,) = answers(tmp_path / 'run')
  np.testing.assert_array_equal(logits_BxLxV, answers(folder)[0])
  assert aux['route'].shape[:3] == (3, 1, 2)
  other_BxLxV, _ = answers(tmp_path / 'run', scale=1.0)
  assert np.abs(other_BxLxV - logits_BxLxV).max() > 1e-2


def test_it_lies_on_a_mesh_meanwhile(dense, sliced, tmp_path):
  """And the same bits are saved."""
  sizes = {'fsdp': 2, 'expert': 2, 'tensor': 2}
  whole, growth = sliced
  upcycle.grow(str(dense[0]), str(tmp_path / 'cut'), growth, sizes)
  a, b = (
    jax.device_get(generate.newest(str(folder))[1])
    for folder in (tmp_path / 'cut', whole)
  )
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_grown_run_trains_on(corpus, tmp_path):
  """The first loss is the dense model's evaluation; experts move apart."""
  begun(
    small_config(corpus, model__N=1, model__pattern='d'), tmp_path / 'dense'
  )
  growth = upcycle.UpcycleConfig(E=4, k=2, slices=2, iterations=2)
  upcycle.grow(str(tmp_path / 'dense'), str(tmp_path / 'grown'), growth)
  new = config.begin(str(tmp_path / 'grown'))
  new.steps, new.batch_size = 1, 8
  job = jobs.prepare(new, str(tmp_path / 'run'))
  batch = next(job.train_batches())
  expected = first_loss(tmp_path / 'dense', batch)
  step = train_step.make_step(job)
  state, found = step(train_step.initial_state(job), job.put(batch))
  loss = float(found['nll_sum']) / float(found['tokens'])
  np.testing.assert_allclose(loss, expected, rtol=2e-6)
  body = jax.device_get(state.params)['trunk']['body']
  up_GxExDxF = body['pools']['up_ExDxF']
  assert np.abs(up_GxExDxF[:, 0] - up_GxExDxF[:, 2]).max() > 1e-4
  assert np.any(body['moe']['feed']['scale_I'][..., 0])


def test_it_is_exported_as_a_published_family(tmp_path):
  """What was beside the dense weights goes along."""
  source = publish(tmp_path / 'source', values('llama', eos_token_id=7))
  convert.take(str(source), str(tmp_path / 'dense'))
  growth = upcycle.UpcycleConfig(E=4, k=2)
  upcycle.grow(str(tmp_path / 'dense'), str(tmp_path / 'run'), growth)
  (told,) = convert.give(str(tmp_path / 'run'), str(tmp_path / 'out'))
  assert told.startswith('mixtral, ')
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['eos_token_id'] == 7 and written['num_local_experts'] == 4
  convert.take(str(tmp_path / 'out'), str(tmp_path / 'again'))
  a, b = (answers(tmp_path / name)[0] for name in ('again', 'dense'))
  assert np.abs(a - b).max() < 0.05 * np.abs(b).max()  # in bfloat16


@pytest.mark.parametrize(
  'given, message',
  [
    ('E=8,k=2,slices=5', 'slices=5 does not divide F=12'),
    ('E=8,k=2,slices=4', 'k=2 is not a multiple of slices=4'),
    ('E=6,k=4,slices=4', 'E=6 is not a multiple of slices=4'),
    ('E=2,k=4', 'k=4 is more than E=2'),
    ('E=4,k=0', 'k=0 is not an int'),
    ('E=-4', 'E=-4 is not an int'),
    ('iterations=2', 'the model is dense: upcycle needs E'),
    ('E=4,iterations=0', 'iterations=0 is not an int'),
    ('E=4,std=nan', 'std=nan is not a float'),
    ('E=4,pattern=mm', "pattern='mm' is not d's with at most one m"),
    ('E=4,pattern=ddm', r'length of pattern \(3\) does not divide'),
    ('experts=4', "no option 'experts'"),
    ('E=many', 'E=many is no int'),
  ],
)
def test_what_cannot_grow_is_one_line(given, message, dense, tmp_path):
  with pytest.raises(ValueError, match=message) as caught:
    growth = upcycle.parse(given.split(','))
    upcycle.grow(str(dense[0]), str(tmp_path / 'out' / 'run'), growth)
  assert '\n' not in str(caught.value)
  assert not list((tmp_path / 'out').rglob('*'))


@pytest.mark.parametrize(
  'changes, given, message',
  [
    ({}, {'E': 4}, r"has MoE layers already \(pattern='m'\)"),
    ({}, {}, 'nothing would grow'),
    ({'iterations': 2}, {'iterations': 2}, 'model.iterations=2 cannot grow'),
    (
      {'inner_residual': 'add'},
      {'iterations': 2},
      "model.inner_residual='add' cannot grow",
    ),
    (
      {'residual': {'name': 'heavy_ball'}},
      {'iterations': 2},
      "inner_residual 'upcycle' with residual 'heavy_ball'",
    ),
    (
      {'pattern': 'd', 'block': 'momentum_lm'},
      {'E': 4},
      'the dense model has nothing for trunk.body.moe.norm_inner.scale_D',
    ),
  ],
)
def test_models_that_cannot_grow(changes, given, message, tmp_path):
  moe = {'pattern': 'm', 'E': 4, 'expert_F': 6, 'N': 2}
  keys = {**DENSE, **moe, **changes}
  if 'block' in changes:  # the only one that is found out by its weights
    made(tmp_path / 'old', keys)
  else:
    c = {**convert.model_config(keys)[0], 'corpus_sha256': ''}
    described(tmp_path / 'old', c)
  with pytest.raises(ValueError, match=message):
    growth = upcycle.UpcycleConfig(**given)
    upcycle.grow(str(tmp_path / 'old'), str(tmp_path / 'out' / 'run'), growth)
  assert not list((tmp_path / 'out').rglob('*'))


def test_the_command(dense, tmp_path):
  """Its mistakes are in convert_test."""
  there = f'--from={dense[0]}', f'--to={tmp_path / "run"}'
  found = command('convert', *there, '--upcycle=E=4,k=2')
  assert found.returncode == 0 and 'E=4' in found.stdout, found.stderr
  assert saved_run.load(str(tmp_path / 'run')).model.c.E == 4
