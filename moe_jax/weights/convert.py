"""Published weights to a work directory, and back: safetensors, no pickle.

What the tensors of a family are to us is in families.py. They are read slice by
slice, each straight to the devices that hold it, and written a file at a time.
"""

import collections
import contextlib
import functools
import json
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config, models, ops, parallel, paths
from moe_jax.data import tokenizer
from moe_jax.training import checkpoint, saved_run
from moe_jax.training.train_step import Weights
from moe_jax.weights import families, safetensors, tensors

DTYPES = 'dtypes.json'  # aside: of tensors that have not that of config.json
ADAPTER = 'adapter_config.json'  # transformers would add its weights
# What stands beside the weights and is carried along.
SMALL = (
  'config.json generation_config.json tokenizer.json tokenizer_config.json'
  ' special_tokens_map.json tokenizer.model vocab.json merges.txt'
  ' chat_template.jinja'.split()
)


# --- import -------------------------------------------------------------------


def take(
  source: str, workdir: str, mesh: jax.sharding.Mesh | None = None
) -> list[str]:
  """Makes a work directory of a published model; returns what to tell.

  Args:
    source: a folder with config.json and safetensors, as the Hub has them.
    workdir: is made; nothing is there, or an empty folder.
    mesh: where the model lies meanwhile; None is one device.

  Raises:
    ValueError, OSError: one line; nothing is left in `workdir`.
  """
  require_single_process()
  folder, target = paths.absolute(source), paths.absolute(workdir)
  check_vacant(target)
  family, keys, values = read_config(folder)
  with atomic_directory(target) as part:
    _carry(folder, part / checkpoint.ASIDE)
    c, told = _run_config(folder, part, target, keys, values)
    mesh = (
      parallel.mesh(dict.fromkeys(parallel.AXES, 1)) if mesh is None else mesh
    )
    state, skipped = load(folder, family, c, mesh)
    _write(part / checkpoint.ASIDE / DTYPES, _dtypes(folder, family, c))
    if skipped:
      told.append(f'left out {len(skipped)} tensors, of them {skipped[0]}')
    text = json.dumps(c, indent=1) + '\n'
    (part / 'config.json').write_text(text, encoding='utf-8')
    with checkpoint.Checkpoints(part, keep=1) as saved:
      saved.save(0, state, {})
  count = sum(a.size for a in jax.tree.leaves(state.params))
  return [f'{family.model_type}, {count:,} parameters: {target}', *told]


def read_config(
  folder: pathlib.Path,
) -> tuple[families.Family, dict[str, Any], dict[str, Any]]:
  """The family of a published model, our keys, and its config.json.

  Files tell what a config.json may leave open, or say wrongly: see `_filed`.
  """
  path = folder / 'config.json'
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(values, dict):
      raise ValueError('it is no object')
  except FileNotFoundError:
    raise ValueError(f'{folder} has no config.json') from None
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None
  if (folder / ADAPTER).exists():
    raise ValueError(f'{folder / ADAPTER}: an adapter is not supported')
  try:
    family, keys = families.ours(values)
  except (ValueError, TypeError) as error:
    raise ValueError(f'{path}: {error}') from None
  return family, keys | _filed(safetensors.Shards(folder), keys, values), values


def _filed(files, keys, values):
  """Our keys that the tensors decide, as they do for transformers.

  A head that is there and is not the embedding is not tied. Where no dtype is
  said, it is that of the first tensor.
  """
  found, names = {}, files.names()
  ends = 'lm_head.weight', 'model.embed_tokens.weight'
  if keys['tied'] and names.issuperset(ends) and all(map(files.dtype, ends)):
    found['tied'] = files.equal(*ends)
  if values.get('dtype') is None and values.get('torch_dtype') is None:
    found['dtype'] = files.first_dtype()
  return found


def model_config(keys: dict[str, Any]) -> tuple[dict[str, Any], int]:
  """The resolved config of a run with a model of these keys, and V."""
  keys = dict(keys)
  V = keys.pop('V')
  inside = lambda name: {
    k.split('.')[1]: v for k, v in keys.items() if k.startswith(f'{name}.')
  }
  c = config.default()
  router, attention = inside('router'), inside('attention')
  c.model.router = config.router(router.pop('name'), **router)
  c.model.attention = config.attend(attention.pop('name'), **attention)
  c.model.update({k: v for k, v in keys.items() if '.' not in k})
  c.data = config.source('text', vocab_size=V, padded_size=V)
  return config.resolve(c), V


def _run_config(folder, part, target, keys, values):
  """The config.json of the work directory, and what to tell of it.

  The tokenizer is written to `part`, which becomes `target`.
  """
  c, V = model_config(keys)
  c['description'] = f'{values["model_type"]} from {folder.resolve().name}'
  c['seq_len'] = min(values.get('max_position_embeddings') or 2048, 2048)
  c['corpus_sha256'] = ''
  path = folder / 'tokenizer.json'
  if not path.exists():
    return c, ['there is no tokenizer.json: only ids can be read']
  text, separator = tokenizer.published(
    path, _settings(folder), values['model_type'], saved_run.ends(folder)
  )
  (part / path.name).write_text(text, encoding='utf-8')
  size = tokenizer.load(part / path.name, separator).vocab_size
  if size > V:
    raise ValueError(f'{path} has {size} ids, config.json vocab_size={V}')
  c['data'] |= {
    'vocab_size': size,
    'tokenizer': str(target / 'tokenizer.json'),
    'separator': separator,
  }
  return c, []


def _settings(folder):
  """What tokenizer_config.json says, nothing if there is none."""
  path = folder / 'tokenizer_config.json'
  try:
    found = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(found, dict):
      raise ValueError('it is no object')
    return found
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None


def load(
  folder: pathlib.Path,
  family: families.Family,
  c: dict[str, Any],
  mesh: jax.sharding.Mesh,
) -> tuple[Weights, list[str]]:
  """The weights of a published model on a mesh, and the tensors left out.

  Of stacked layers one at a time is read, and of it what a device holds.
  """
  model, tree = abstract(c)
  files = safetensors.Shards(folder)
  chosen, skipped = _chosen(family, model.c, tree, files.names())
  for piece in chosen:
    files.check(piece.name, piece.shape)
  units = collections.defaultdict(lambda: collections.defaultdict(list))
  for piece in chosen:
    for part, leaf in enumerate(piece.leaves):
      stack = leaf.index[: tensors.stacked(leaf.path, tree)]
      units[leaf.path][stack].append((piece, part))
  for path in tree:
    if path not in units:
      raise ValueError(f'no tensor of {family.model_type} is {".".join(path)}')
  filled = {
    path: _fill(files, path, tree[path], units[path], mesh) for path in tree
  }
  params, router_state = models.split(model)
  pick = lambda like: jax.tree_util.tree_map_with_path(
    lambda path, _: filled[tuple(k.key for k in path)], like
  )
  everywhere = jax.NamedSharding(mesh, jax.P())
  step = jax.device_put(jnp.int32(0), everywhere)
  return Weights(step, pick(params), pick(router_state)), skipped


def abstract(c: dict[str, Any]) -> tuple[Any, dict[tuple[str, ...], Any]]:
  """A run's model, of shapes alone, and its leaves by their paths."""
  sizes = dict(gmm=ops.choose_gmm(None), V=c['data']['padded_size'])
  init = models.initializer({**c['model'], **sizes}, parallel.Layout())
  model = models.abstract(init)
  leaves = [
    leaf
    for tree in models.split(model)
    for leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]
  return model, {tuple(k.key for k in path): a for path, a in leaves}


def _chosen(family, c, tree, names):
  """The pieces of the layout that these tensors are in, and those left out."""
  found = [tensors.find(layout, c, tree) for layout in family.layouts]
  missing = [[p.name for p in own if p.name not in names] for own in found]
  best = min(range(len(found)), key=lambda i: len(missing[i]))
  if missing[best]:
    raise ValueError(
      f'{len(missing[best])} tensors are missing, of them {missing[best][0]}'
    )
  more = sorted(names - {p.name for p in found[best]})
  for name in more:
    layer = _layer_of(name)
    beyond = family.beyond and layer is not None and layer >= c.N
    tied = c.tied and name == 'lm_head.weight'  # saved twice
    if not (beyond or tied or name.endswith('.rotary_emb.inv_freq')):
      raise ValueError(
        f'the tensor {name} is of no use to a {family.model_type} of this'
        ' config.json'
      )
  return found[best], more


def _dtypes(folder, family, c):
  """{name: dtype} of the tensors of an export that have not the model's."""
  model, tree = abstract(c)
  files = safetensors.Shards(folder)
  chosen, _ = _chosen(family, model.c, tree, files.names())
  of = {
    (leaf.path, leaf.index): files.dtype(piece.name)
    for piece in chosen
    for leaf in piece.leaves
  }
  found = {}
  for piece in tensors.find(family.layouts[0], model.c, tree):
    leaf = piece.leaves[0]
    at = leaf.path, leaf.index
    # Experts that are one tensor have no index of their own.
    dtype = of[at] if at in of else of[leaf.path, leaf.index[:-1]]
    if dtype != _usual(piece, c['model']['dtype']):
      found[piece.name] = dtype
  return found


def _usual(piece, dtype):
  return 'float32' if piece.wide else dtype


def _layer_of(name):
  """The number of the layer that a tensor belongs to, or None."""
  found = re.search(r'\.layers\.(\d+)\.', name)
  return int(found[1]) if found else None


def _fill(files, path, like, units, mesh):
  """The whole of a leaf, one stacked layer after the other."""
  spec = parallel.spec(
    tuple(jax.tree_util.DictKey(k) for k in path), like.shape, mesh
  )
  whole = jax.NamedSharding(mesh, spec)
  ahead = tensors.stacked(path, {path: like})
  one = jax.NamedSharding(mesh, jax.P(*spec[ahead:]))
  shape = like.shape[ahead:]

  def read(index, where):
    return _read_unit(files, units[index], where)

  filled = jax.jit(
    lambda: jnp.zeros(like.shape, like.dtype), out_shardings=whole
  )()
  put = jax.jit(
    lambda whole, part, at: whole.at[tuple(at)].set(part.astype(whole.dtype)),
    donate_argnums=0,
    out_shardings=whole,
  )
  for index in sorted(units):
    part = jax.make_array_from_callback(
      shape, one, functools.partial(read, index)
    )
    # Waited for, so that no second part is read meanwhile.
    filled = jax.block_until_ready(put(filled, part, np.int32(index)))
  return filled


def _read_unit(files, unit, where):
  """A slice of a leaf of one layer, from one tensor or one for each expert."""
  piece, part = unit[0]
  leaf = piece.leaves[part]
  ahead = len(where) - len(leaf.shape)
  if not ahead:
    return safetensors.read_piece(files, piece, part, where)
  chosen = unit[where[0]]
  return np.stack(
    [safetensors.read_piece(files, *one, where[1:]) for one in chosen]
  )


# --- export -------------------------------------------------------------------


def give(
  workdir: str, target: str, shard: int = safetensors.SHARD
) -> list[str]:
  """Writes the newest weights of a work directory as the Hub has them.

  Args:
    target: a folder that is made; nothing is there, or an empty folder.
    shard: bytes of a file, at the most, but for a larger tensor.

  Returns:
    What to tell.

  Raises:
    ValueError, OSError: one line; nothing is left in `target`. A variant that
      no family can express is refused with the keys that none has.
  """
  require_single_process()
  folder = paths.absolute(target)
  check_vacant(folder)
  job = saved_run.load(workdir)
  try:
    family, values = expressed(job.config, job.model.c.V)
  except KeyError as error:
    raise ValueError(
      f'{job.workdir}/config.json is not of this version: {error!r}'
    ) from error
  state = saved_run.restore(job, saved_run.checkpoints(job)[-1])
  leaves = {
    tuple(k.key for k in path): a
    for tree in (state.params, state.router_state)
    for path, a in jax.tree_util.tree_leaves_with_path(tree)
  }
  own = _by_layer(tensors.find(family.layouts[0], job.model.c, leaves))
  covered = {leaf.path for piece in own for leaf in piece.leaves}
  for path in leaves:
    if path not in covered:
      raise ValueError(
        f'{family.model_type} has no tensor for {".".join(path)}'
      )
  own_dtypes, path = {}, job.workdir / checkpoint.ASIDE / DTYPES
  if path.exists():
    own_dtypes = json.loads(path.read_text(encoding='utf-8'))
  usual = lambda piece: _usual(piece, values['torch_dtype'])
  dtypes = [np.dtype(own_dtypes.get(p.name, usual(p))) for p in own]
  with atomic_directory(folder) as part:
    kept = _beside(job, part)
    kept = {k: v for k, v in kept.items() if k in family.kept}
    _write(part / 'config.json', {**kept, **values})
    count = safetensors.write(own, leaves, dtypes, part, shard)
  return [f'{family.model_type}, {len(own)} tensors in {count} files: {folder}']


def _beside(job, part):
  """Writes what stands beside weights; returns other fields of config.json."""
  old = job.workdir / checkpoint.ASIDE
  if old.exists():
    _carry(old, part)
    return json.loads((old / 'config.json').read_text(encoding='utf-8'))
  tok = job.dataset.tokenizer
  if not isinstance(tok, tokenizer.Bytes):  # which is no file of the library's
    tok.save(part / 'tokenizer.json')
    named = {'tokenizer_class': 'PreTrainedTokenizerFast'}
    _write(part / 'tokenizer_config.json', named)
  return {
    'max_position_embeddings': job.config['seq_len'],
    'bos_token_id': None,
    'eos_token_id': tok.separator,
  }


def expressed(
  c: dict[str, Any], V: int
) -> tuple[families.Family, dict[str, Any]]:
  """The family that has this model, and its config.json.

  Raises:
    ValueError: none has; with the keys that keep it from the nearest.
  """
  keys = {**config.flat(c['model']), 'V': V}
  keys.pop('name')
  if keys['attention.name'] == 'gqa':
    H, D = keys['H'], keys['D']
    keys['attention.num_kv_heads'] = keys['attention.num_kv_heads'] or H
    keys['attention.size'] = keys['attention.size'] or D // H
  wanted, others = _meaning(keys), []
  for family in families.FAMILIES.values():
    try:
      values = families.theirs(family, keys)
      back, V = model_config(families.ours(values)[1])
      found = _meaning({**config.flat(back['model']), 'V': V})
    except (KeyError, ValueError):  # options of another attention or router
      found = {**wanted, **family.values}
    if found == wanted:
      return family, values
    differ = [
      f'model.{k}={v!r}' for k, v in sorted(wanted.items()) if found.get(k) != v
    ]
    of_its_kind = keys['attention.name'] == family.values['attention.name']
    of_its_kind &= ('m' in wanted['layers']) == ('pattern' not in family.values)
    others.append((not of_its_kind, len(differ), family.model_type, differ))
  *_, family, differ = min(others)
  raise ValueError(
    f'no family can express this model; {family}, the nearest, has not'
    f' {", ".join(differ)}'
  )


# Of a model's keys those that say nothing of its outputs.
_TRAINING = {
  *('name', 'init', 'embed_std', 'dropout', 'remat', 'gmm', 'ragged_pool'),
  *('router.init', 'router.group'),
}

# Those that say nothing of a dense model's.
_ROUTED = {
  *('E', 'expert_F', 'shared_F', 'layers_per_pool', 'iterations', 'routing'),
  *('inner_residual', 'residual', 'router'),
}


def _meaning(keys):
  """Keys that make the outputs, with values that mean the same made equal."""
  keys = {k: v for k, v in keys.items() if k not in _TRAINING}
  if keys['attention.name'] == 'gqa':
    keys['attention.num_kv_heads'] = keys['attention.num_kv_heads'] or keys['H']
    size = keys['attention.size'] or keys['D'] // keys['H']
    keys['attention.size'] = size
    if keys['attention.qk_norm'] == 'none':
      keys.pop('attention.eps')
  if not keys.get('attention.yarn_factor'):
    keys = {k: v for k, v in keys.items() if 'attention.yarn' not in k}
  if keys.get('router.name') == 'topk':
    keys['router.bias_rate'] = bool(keys['router.bias_rate'])
    if keys['router.groups_kept'] == keys['router.expert_groups']:
      for name in ('expert_groups', 'groups_kept', 'group_best'):
        keys.pop(f'router.{name}')
  if keys['iterations'] == 1:
    keys.pop('routing')
  first, pattern, N = (keys.pop(k) for k in ('first_dense', 'pattern', 'N'))
  keys['layers'] = ('d' * first + pattern * N)[:N]
  if 'd' not in keys['layers']:
    keys.pop('F')
  if 'm' not in keys['layers']:
    keys = {k: v for k, v in keys.items() if k.split('.')[0] not in _ROUTED}
  return keys


def _by_layer(own):
  """Pieces in the order of layers, the model's own first."""
  layer = lambda piece: -1 if (n := _layer_of(piece.name)) is None else n
  return sorted(own, key=layer)


# --- folders ------------------------------------------------------------------


def require_single_process() -> None:
  """ValueError if there are several processes: each would make the folder."""
  if jax.process_count() > 1:
    raise ValueError(
      f'weights are converted by one process, here are {jax.process_count()}'
    )


def check_vacant(target: pathlib.Path) -> None:
  """ValueError if there is something already; an empty folder is nothing."""
  if target.is_symlink() and not target.exists():
    raise ValueError(f'{target} is a link to {target.readlink()}: nothing')
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(f'{target} is there already, and would be overwritten')


@contextlib.contextmanager
def atomic_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder that becomes `target` at the end; nothing is left if it fails.

  An empty folder that is there is filled, not replaced: a disk may be mounted
  on it, or it may be a link.

  Raises:
    ValueError: there is something already.
  """
  check_vacant(target)
  there = target.exists()
  made = [folder for folder in target.parents if not folder.exists()]
  name = f'.{target.name}.{secrets.token_hex(4)}'
  part = (target if there else target.parent) / name
  try:
    part.mkdir(parents=True)
    yield part
    if there:
      _move(part, target)
    else:
      part.replace(target)
  finally:
    shutil.rmtree(part, ignore_errors=True)
    for folder in made:
      with contextlib.suppress(OSError):  # it has the target in it
        folder.rmdir()


def _move(part, target):
  """All that is in one folder to an empty one; nothing if that fails."""
  names = sorted(path.name for path in part.iterdir())
  # The one that says what a folder is comes last.
  names.sort(key=lambda name: name == 'config.json')
  try:
    for name in names:
      (part / name).replace(target / name)
  except BaseException:
    for name in names:
      if (target / name).exists():
        (target / name).replace(part / name)
    raise


def _carry(source, target):
  """Their small files, as they are."""
  target.mkdir(exist_ok=True)
  for name in SMALL:
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _write(path, values):
  path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')
