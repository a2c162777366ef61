"""The classifier: what it sees of an image, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax import config, models, objectives, parallel, routers
from moe_jax.models import classifier

B, V, SIZE = 3, 5, (4, 6, 2)


def _config(**changes):
  fields = config.model(
    'classifier', N=2, D=16, H=2, F=24, E=4, expert_F=8, pattern='dm'
  ).to_dict()
  fields.pop('name')
  return classifier.Config(
    **{**fields, 'gmm': 'xla', 'V': V, 'size': SIZE, **changes}
  )


def _build():
  return classifier.build(_config(), parallel.Layout(), rngs=nnx.Rngs(0))


@functools.cache
def _model():
  """Shapes without arrays."""
  return nnx.eval_shape(_build)


@functools.cache
def _params():
  """None is zero, the head neither, so that the answer depends on the image."""
  draw = np.random.default_rng(1)
  return jax.tree.map(
    lambda a: draw.normal(0, 0.5, a.shape).astype(np.float32),
    models.split(_model())[0],
  )


def _batch(seed=0):
  draw = np.random.default_rng(seed)
  return {
    'image_BxYxXxC': draw.normal(size=(B, *SIZE)).astype(np.float32),
    'target_BxL': np.array([[0], [4], [2]], np.int32),
    'mask_BxL': np.ones((B, 1), np.float32),
    'segment_BxL': np.zeros((B, 1), np.int32),
    'row_B': np.arange(B, dtype=np.int32),
  }


def _run(batch, params=None):
  """logits_Bx1xV, aux, and the gradients of the loss."""
  return jax.device_get(_compiled(params or _params(), batch))


@jax.jit
def _compiled(params, batch):
  goal = objectives.objective('classification')(
    losses={'balance': 0.1}, sigmoid=True
  )

  def loss(params):
    model = models.bind(_model(), params, {})
    ctx = routers.context(batch, jax.random.key(0), 0, train=False)
    found = model(batch, ctx)
    return goal(lambda batch, pass_: found, batch)[0], found

  grads, found = jax.grad(loss, has_aux=True)(params)
  return *found, grads


def test_patches_are_squares_row_by_row():
  image = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
  found = np.asarray(classifier.patches(jnp.asarray(image), 2))
  assert found.shape == (1, 6, 8)
  for i in range(6):
    y, x = divmod(i, 3)
    square = image[0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
    np.testing.assert_array_equal(found[0, i], square.reshape(-1))


def test_every_patch_reaches_the_class_token():
  batch = _batch()
  logits_Bx1xV, (aux,), _ = _run(batch)
  assert logits_Bx1xV.shape == (B, 1, V)
  assert aux['load_E'].sum() == B * 7 * 2  # patches, class token; k
  for y, x in ((0, 0), (3, 5)):
    moved = batch['image_BxYxXxC'].copy()
    moved[0, y, x] += 1
    other = _run({**batch, 'image_BxYxXxC': moved})[0]
    change = np.abs(other - logits_Bx1xV).max(axis=(1, 2))
    assert change[0] > 1e-4 and (change[1:] < 1e-6).all()


def test_places_are_told_apart():
  batch = _batch()
  turned = np.ascontiguousarray(batch['image_BxYxXxC'][:, ::-1])
  a, b = (
    _run({**batch, 'image_BxYxXxC': x})[0]
    for x in (batch['image_BxYxXxC'], turned)
  )
  assert np.abs(a - b).max() > 1e-4


def test_it_starts_from_equal_chances():
  @jax.jit  # of which only these are made
  def head():
    model = _build()
    return {'head_DxV': model.head_DxV[...], 'bias_V': model.bias_V[...]}

  logits_Bx1xV, *_ = _run(_batch(), {**_params(), **head()})
  np.testing.assert_array_equal(logits_Bx1xV, np.zeros((B, 1, V)))


def test_every_parameter_has_a_gradient():
  *_, grads = _run(_batch())
  for path, d in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(d).all(), path
    if path[-1].key != 'bias_key_HxS':  # which a softmax cannot feel
      assert np.abs(d).max() > 0, path


def test_cost_by_hand():
  D, F, E = 16, 8, 4
  cost = classifier.cost(_model(), 1)
  attention, norm = 4 * (D * D + D), 2 * D
  dense, expert = 2 * D * 24 + 24 + D, 2 * D * F + F + D
  layers = 2 * attention + 4 * norm + dense + D * E
  ends = 8 * D + D + D + 7 * D + norm + D * V + V
  assert cost['expert_params'] == E * expert
  assert cost['params_total'] == layers + ends + E * expert
  assert cost['params_active'] == layers + ends + 2 * expert
  met = layers + ends + 2 * expert + 2 * 2 * D * 7
  assert cost['flops_per_token'] == 6 * 7 * met


def test_patches_must_fit_the_image():
  with pytest.raises(ValueError, match=r'patch \(4\).*columns.*\(6\)'):
    _config(patch=4)
