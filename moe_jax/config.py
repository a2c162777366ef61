"""Every knob, its default and its meaning; the only importer of ml_collections.

A config file starts from `default()`, changes what its claim is about, and
returns it. On a command line `--config.model.E=16` changes one value.
"""

import difflib
from typing import Any

import ml_collections
from ml_collections import config_dict

from moe_jax import routers

# May differ when a run is continued: they do not change the mathematics.
FREE = (
  'log_every',
  'eval_every',
  'checkpoint_every',
  'keep_checkpoints',
  'description',
  'data.eval_bytes',
  'data.cache_dir',
  'model.gmm',
  'model.remat',
  'mesh.',
  'parallel.',
)


def default() -> ml_collections.ConfigDict:
  """The config that all others start from."""
  c = ml_collections.ConfigDict()
  c.description = ''  # one line for the report

  c.steps = 1000  # optimiser steps
  c.batch_size = 32  # sequences per step, over all devices
  c.seq_len = 256  # tokens per sequence
  c.seed = 0  # parameters, data order and random routing

  # 0 turns each off; the last evaluation and checkpoint are always made.
  c.log_every = 10
  c.eval_every = 0
  c.checkpoint_every = 0
  c.keep_checkpoints = 2

  c.data = dict(
    source='python_stdlib',  # or text
    path='',  # text: globs, by commas: plain, .xz, .gz or .jsonl
    field='',  # the field of a .jsonl record that holds its text
    eval_path='',  # held-out files by glob; '' holds out a fraction
    eval_fraction=0.1,
    tokenizer='bpe',  # trained on the training text; or bytes
    vocab_size=4096,  # of the BPE, with its separator
    cache_dir='',  # '' is $MOE_JAX_CACHE or ~/.cache/moe_jax
    eval_bytes=200_000,  # held-out bytes of a periodic evaluation; 0 is all
  )
  c.model = dict(
    name='decoder',
    N=4,  # layers
    D=256,  # width
    H=4,  # query heads
    J=4,  # key-value heads
    F=1024,  # hidden width of a dense layer
    E=8,  # experts that a MoE layer owns
    expert_F=512,  # hidden width of an expert
    shared_F=0,  # of the shared expert, which sees every token; 0 has none
    pattern='m',  # of the layers, repeated: d is dense, m is MoE
    first_dense=0,  # dense layers before the pattern begins
    layers_per_pool=1,  # MoE layers that share their experts (ReXMoE)
    iterations=1,  # (router, same experts) steps in a layer (CoE)
    link='replace',  # how their answers join: replace, add or init
    residual=dict(name='plain'),  # or replace, heavy_ball
    router=router('topk'),
    block='pre',  # where norms and residuals sit
    activation='swiglu',  # or geglu, gelu, relu
    bias=False,  # in the feed-forwards
    tied=True,  # the output head is the embedding
    theta=10_000.0,  # base of the rotary frequencies
    dtype='float32',  # of the computation; or bfloat16, float64
    remat=False,  # recompute layers in the backward pass, not their routing
    gmm='auto',  # grouped matmul, see ops.gmm; auto chooses for the platform
  )
  c.objective = dict(
    name='next_token',
    # Weights of what the router reports: 1 at perfect balance (z apart).
    losses=dict(balance=0.01, sequence_balance=0.0, z=0.001),
  )
  c.optimizer = dict(
    name='adamw',  # or muon: orthogonal momentum for matrices
    learning_rate=3e-3,  # at its highest
    schedule='cosine',  # or constant, inverse_sqrt, wsd
    warmup=0.02,  # part of the steps in which the rate rises
    decay=0.2,  # wsd: part of the steps in which the rate falls
    end=0.1,  # cosine, wsd: the last rate, as a part of the highest
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,  # of matrices
    clip=1.0,  # the gradient's norm is at most this; 0 does not clip
    accumulate=1,  # microbatches that a batch is cut into
  )
  c.mesh = dict(data=1, fsdp=1, expert=1)  # devices along each axis
  c.parallel = dict(strategy='auto')  # how rows meet weights
  return c


def router(name: str, **options) -> ml_collections.ConfigDict:
  """A router and all its options, so that a command line can set each."""
  known = routers.options(name)
  for key in options:
    if key not in known:
      text = unknown(key, known, f'router {name} has no option')
      raise ValueError(
        f"{text}; to switch routers, have config.router('{name}') in the"
        ' config file'
      )
  c = ml_collections.ConfigDict({'name': name})
  for key, value in {**known, **options}.items():
    placeholder = config_dict.placeholder(routers.option_type(name, key))
    c[key] = placeholder if value is None else value
  return c


def resolve(c: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as plain values, with the router's options filled in.

  Raises:
    ValueError: a key that default() lacks, or a value that cannot be; one
      line with the key, the value and the nearest known key.
  """
  values, known = c.to_dict(), default().to_dict()
  options = dict(values['model']['router'])
  filled = router(options.pop('name', ''), **options)
  values['model']['router'] = filled.to_dict()
  for key in flat(values):
    if not key.startswith(('model.router.', 'model.residual.')):
      if key not in flat(known):
        raise ValueError(unknown(key, flat(known)))
  for key in ('steps', 'batch_size'):
    if values[key] < 1:
      raise ValueError(f'{key}={values[key]} is < 1')
  if values['seq_len'] < 2:
    raise ValueError(f'seq_len={values["seq_len"]} is < 2')
  for key in ('log_every', 'eval_every', 'checkpoint_every', 'seed'):
    if values[key] < 0:
      raise ValueError(f'{key}={values[key]} is negative')
  if values['keep_checkpoints'] < 1:
    raise ValueError(f'keep_checkpoints={values["keep_checkpoints"]} is < 1')
  return values


def flat(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'model.E': 8, ...}"""
  out = {}
  for key, value in values.items():
    if isinstance(value, dict):
      out.update(flat(value, f'{prefix}{key}.'))
    else:
      out[prefix + key] = value
  return out


def unknown(key: str, known: Any, text: str = 'unknown config key') -> str:
  """One line about a key that does not exist, with the nearest that does."""
  last = {k.split('.')[-1]: k for k in known}
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
  near = near or [
    last[k] for k in difflib.get_close_matches(key.split('.')[-1], last, n=1)
  ]
  return f'{text} {key!r}' + (f'; the nearest is {near[0]!r}' if near else '')


def differences(
  old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[str], list[str]]:
  """What changed between two resolved configs: (mathematics, the rest).

  More `steps` belong to the rest.
  """
  old, new = flat(old), flat(new)
  mathematics, rest = [], []
  for key in sorted({*old, *new}):
    if old.get(key) == new.get(key):
      continue
    text = f'{key}: {old.get(key)!r} -> {new.get(key)!r}'
    more = key == 'steps' and new[key] > old[key]
    free = more or key.startswith(FREE)
    (rest if free else mathematics).append(text)
  return mathematics, rest
