"""Dense models to MoE, and MoE layers to more iterations, without a change.

What the model answers at its first step is what the old one answers, in real
numbers; `UpcycleConfig` says with which experts. Sparse upcycling (2212.05055)
copies the feed-forward of a dense layer to every expert; fine-grained upcycling
(2410.07524) cuts it into slices first.
"""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config, paths, ranges
from moe_jax.training import checkpoint, saved_run, train_step
from moe_jax.weights import convert, tensors


@dataclasses.dataclass(frozen=True)
class UpcycleConfig:
  """What layers become.

  A dense layer has F hidden units. They are cut into `slices` of F / slices
  each, whose answers add up to the layer's; expert j * slices + s is a copy of
  slice s. Its router has one random column for each j, the same for all slices
  of it, so that equal scores (of which the first expert is taken) choose whole
  sets of slices: k is a multiple of `slices`. Gates are divided by their sum
  over the k chosen and multiplied by `slices`: a set's own slices have the same
  gate, the sets chosen have gates that add up to slices / slices = 1 for each
  slice, and the answer is the dense layer's, for every E, k and random column
  that `check` lets pass. It is so at the first step alone: training moves the
  columns of a set apart.

  With slices=1 experts are copies of the whole feed-forward.

  `iterations` of one layer (Chain-of-Experts) are joined by the inner_residual
  'upcycle', whose scales are 0 at first: every iteration sees the layer's
  input, the last one answers. In a layer that had a router, all have a copy of
  that.

  Attributes:
    E: experts of a layer; 0 where the model has MoE layers already.
    k: experts per token.
    slices: of the feed-forward.
    pattern, first_dense: which layers become MoE, as in a model's config.
    iterations: of each MoE layer.
    std: of the columns of new routers, from a normal distribution.
    seed: of these draws.
  """

  E: ranges.Natural = 0
  k: ranges.Count = 2
  slices: ranges.Count = 1
  pattern: str = 'm'
  first_dense: ranges.Natural = 0
  iterations: ranges.Count = 1
  std: ranges.NonNegative = 0.02
  seed: ranges.Seed = 0

  def __post_init__(self):
    ranges.check(type(self), vars(self), 'upcycle: ')

  def check(self, F: int) -> None:
    """ValueError, with the values, for what cannot be the dense layer."""
    if F % self.slices:
      raise ValueError(f'slices={self.slices} does not divide F={F}')
    for name in ('E', 'k'):
      value = getattr(self, name)
      if value < 1 or value % self.slices:
        raise ValueError(
          f'{name}={value} is not a multiple of slices={self.slices}: a token'
          ' would not meet whole sets of slices'
        )
    if self.k > self.E:
      raise ValueError(f'k={self.k} is more than E={self.E}')


def parse(given: list[str]) -> UpcycleConfig:
  """The growth of a flag like E=8,k=2; ValueError, one line, for others."""
  kinds = {
    name: said.kind for name, said in ranges.options(UpcycleConfig).items()
  }
  values = {}
  for text in given:
    name, _, value = text.partition('=')
    if name not in kinds:
      raise ValueError(config.unknown(name, kinds, 'upcycle has no option'))
    try:
      values[name] = kinds[name](value)
    except ValueError:
      raise ValueError(
        f'upcycle: {name}={value} is no {kinds[name].__name__}'
      ) from None
  return UpcycleConfig(**values)


def grow(
  source: str,
  workdir: str,
  growth: UpcycleConfig,
  sizes: dict[str, int] | None = None,
) -> list[str]:
  """Makes a work directory of one with a smaller model; what to tell of it.

  Args:
    source: a work directory with a decoder, trained or imported; its newest
      weights are taken.
    workdir: is made; nothing is there, or an empty folder.
    sizes: of the mesh on which the models lie meanwhile; None is one device.

  Raises:
    ValueError, OSError: one line; nothing is left in `workdir`.
  """
  convert.require_single_process()
  target = paths.absolute(workdir)
  convert.check_vacant(target)
  job = saved_run.load(source, sizes)
  c = {**job.config, 'model': model_config(job.config['model'], growth)}
  c['description'] = f'{job.workdir.name}, upcycled: {_said(growth)}'
  with convert.atomic_directory(target) as part:
    text = json.dumps(c, indent=1) + '\n'
    (part / 'config.json').write_text(text, encoding='utf-8')
    for name in ('tokenizer.json', checkpoint.ASIDE):
      old = job.workdir / name
      if old.is_dir():
        shutil.copytree(old, part / name)
      elif old.exists():
        shutil.copyfile(old, part / name)
    new = saved_run.load(str(part), sizes)
    like = train_step.abstract_weights(new)
    old = saved_run.restore(job, saved_run.checkpoints(job)[-1])
    with train_step.precision(new):
      weights = _grown(growth, new.model.c, old, like)
      with checkpoint.Checkpoints(part, keep=1) as saved:
        saved.save(0, weights, {})
  count = sum(a.size for a in jax.tree.leaves(weights.params))
  return [f'{c["description"]}, {count:,} parameters: {target}']


def _said(growth):
  default = UpcycleConfig()
  told = {k: v for k, v in vars(growth).items() if v != getattr(default, k)}
  if growth.E:
    told['k'] = growth.k
  return ', '.join(f'{k}={v}' for k, v in told.items())


def model_config(old: dict[str, Any], growth: UpcycleConfig) -> dict[str, Any]:
  """The config of the model that grows from one of this config.

  Raises:
    ValueError: one line; it cannot grow so.
  """
  dense = (
    'm'
    not in (old['first_dense'] * 'd' + old['pattern'] * old['N'])[: old['N']]
  )
  new = dict(old)
  if growth.E:
    if not dense:
      raise ValueError(
        f'E={growth.E}: the model has MoE layers already (pattern='
        f'{old["pattern"]!r}); only their iterations can grow'
      )
    growth.check(old['F'])
    router = config.router('topk', k=growth.k, scale=float(growth.slices))
    new |= {
      'E': growth.E,
      'expert_F': old['F'] // growth.slices,
      'shared_F': 0,
      'pattern': growth.pattern,
      'first_dense': growth.first_dense,
      'layers_per_pool': 1,
      'ragged_pool': False,
      'iterations': 1,
      'inner_residual': 'replace',
      'residual': {'name': 'plain'},
      'router': router.to_dict(),
    }
  elif dense:
    raise ValueError('the model is dense: upcycle needs E, as in E=8,k=2')
  elif growth.iterations < 2:
    raise ValueError('neither E nor iterations are given: nothing would grow')
  if growth.iterations > 1:
    for key, only in (('iterations', 1), ('inner_residual', 'replace')):
      if new[key] != only:
        raise ValueError(
          f'model.{key}={new[key]!r} cannot grow to {growth.iterations}'
          f' iterations, only {only!r}'
        )
    new |= {
      'iterations': growth.iterations,
      'inner_residual': 'upcycle',
      'routing': 'each',
    }
  return new


def _grown(growth, c, old, like):
  """The weights of the new model, of config c, on the mesh of `like`."""
  trees = [like.params, like.router_state]
  where = jax.tree.map(lambda a: a.sharding, trees)
  layers = _layers(c)

  def make(old):
    leaves = {
      tuple(k.key for k in path): a
      for path, a in jax.tree.leaves_with_path(old[0])
      + jax.tree.leaves_with_path(old[1])
    }

    def leaf(path, a):
      path = tuple(k.key for k in path)
      if growth.E:
        made = _of_dense(growth, leaves, layers, path, a.shape)
      else:
        made = _of_routed(leaves, path, a.shape)
      return made.astype(a.dtype)

    return [jax.tree_util.tree_map_with_path(leaf, tree) for tree in trees]

  params, router_state = jax.jit(make, out_shardings=where)(old[1:])
  step = jax.device_put(jnp.int32(0), like.step.sharding)
  return train_step.Weights(step, params, router_state)


def _layers(c):
  """{where layers are stacked in our tree: their numbers, as stacked}"""
  found = {}
  for layer in range(c.N):
    place = tensors.place(c, layer)
    for path, index in ((place.path, place.index), (place.pools, place.pool)):
      if path:
        found.setdefault(path, {})[index] = layer
  return {
    path: np.reshape(
      [own[index] for index in sorted(own)], np.max(list(own), axis=0) + 1
    )
    for path, own in found.items()
  }


def _of_dense(growth, leaves, layers, path, shape):
  """A leaf of a model with MoE layers from those of a dense one."""
  stack = next((s for s in layers if path[: len(s)] == s), ())
  if not stack:
    return leaves[path]
  at, own = layers[stack], path[len(stack) :]
  if own[:2] == ('feed', 'routers'):
    return _routers(growth, at, shape)
  if own == ('feed', 'scale_I'):
    return jnp.zeros(shape)
  pools = stack[-1] == 'pools'
  own = ('feed', 'one', *own) if pools else own
  if ('trunk', 'first', *own) not in leaves:
    raise ValueError(f'the dense model has nothing for {".".join(path)}')
  dense = leaves['trunk', 'first', *own][at]
  return _experts(growth, dense, own[-1]) if pools else dense


def _routers(growth, at, shape):
  """Columns [..., I, D, E] of which those of a set of slices are equal."""
  *_, I, D, E = shape
  key = jax.random.key(growth.seed)
  draw = lambda layer: jax.random.normal(
    jax.random.fold_in(key, layer), (I, D, E // growth.slices)
  )
  w_NxIxDxE = growth.std * jax.vmap(draw)(jnp.asarray(at.ravel()))
  return jnp.repeat(w_NxIxDxE, growth.slices, axis=-1).reshape(shape)


def _experts(growth, one, name):
  """[G, E, ...] of dense layers' [G, 1, ...]."""
  n, letters = growth.slices, name.rsplit('_', 1)[1].split('x')
  if 'F' in letters:
    sets = jnp.concatenate(jnp.split(one, n, axis=1 + letters.index('F')), 1)
  else:  # of answers, which are added up
    sets = jnp.concatenate([one / n] * n, axis=1)
  copies = [1] * sets.ndim
  copies[1] = growth.E // n
  return jnp.tile(sets, copies)


def _of_routed(leaves, path, shape):
  """A leaf of a model with more iterations from those of one with one."""
  if path[-1] == 'scale_I':
    return jnp.zeros(shape)
  return jnp.broadcast_to(leaves[path], shape)  # of routers, over iterations
