"""moe-convert without transformers: tables, refusals, folders, memory."""

import functools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from moe_jax import commands, config, models, parallel
from moe_jax.analysis import record
from moe_jax.decode import generate
from moe_jax.training import checkpoint, jobs, saved_run, train_step
from moe_jax.weights import convert, families, safetensors, tensors
from tests.helpers.small import command, small_config

ROOT = pathlib.Path(__file__).parents[2]
LATENT = dict(
  num_key_value_heads=2,
  qk_nope_head_dim=3,
  qk_rope_head_dim=4,
  v_head_dim=5,
  kv_lora_rank=6,
  q_lora_rank=7,
  n_routed_experts=4,
  n_shared_experts=2,
  moe_intermediate_size=6,
  first_k_dense_replace=1,
  routed_scaling_factor=2.0,
)
OPTIONS = {
  'llama': dict(num_key_value_heads=1, num_experts_per_tok=None),
  'qwen3': dict(num_key_value_heads=1, num_experts_per_tok=None, head_dim=6),
  'mixtral': dict(num_key_value_heads=1, num_local_experts=3),
  'olmoe': dict(num_key_value_heads=2, num_experts=4, norm_topk_prob=False),
  'qwen3_moe': dict(
    num_key_value_heads=1,
    num_experts=4,
    head_dim=6,
    moe_intermediate_size=6,
    mlp_only_layers=[0],
    attention_bias=True,
    norm_topk_prob=True,
  ),
  'deepseek_v2': LATENT,
  'deepseek_v3': dict(n_group=2, topk_group=1, norm_topk_prob=True, **LATENT),
}
V = 20
YARN = {'rope_type': 'yarn'}


def values(family='mixtral', **changes):
  """A config.json as transformers 4 wrote it."""
  return {
    'model_type': family,
    'vocab_size': V,
    'hidden_size': 8,
    'num_hidden_layers': 3,
    'num_attention_heads': 2,
    'intermediate_size': 10,
    'num_experts_per_tok': 2,
    'rms_norm_eps': 1e-5,
    'torch_dtype': 'bfloat16',
    'rope_theta': 100.0,
    'use_cache': True,
    **OPTIONS[family],
    **changes,
  }


def abstract(theirs):
  """Our family, model and leaves of a config.json."""
  family, keys = families.ours(theirs)
  model, tree = convert.abstract(convert.model_config(keys)[0])
  return family, model, tree


def drawn(theirs):
  """Tensors of such a model, in bfloat16 where they are not wide."""
  return dict(_drawn(json.dumps(theirs)))


@functools.cache
def _drawn(theirs):
  family, model, tree = abstract(json.loads(theirs))
  draw = np.random.default_rng(0)
  wide = lambda piece: np.float32 if piece.wide else ml_dtypes.bfloat16
  value = lambda piece: (
    0.3 * draw.normal(size=piece.shape) + ('norm' in piece.name)
  )
  return {
    piece.name: value(piece).astype(wide(piece))
    for piece in tensors.find(family.layouts[0], model.c, tree)
  }


def publish(folder, theirs, arrays=None, files=2):
  """A folder as the Hub has it."""
  arrays = drawn(theirs) if arrays is None else arrays
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(theirs))
  listed = {}
  for i in range(files):
    some = dict(list(arrays.items())[i::files])
    save_file(some, folder / f'model-{i}.safetensors', {'format': 'pt'})
    listed |= dict.fromkeys(some, f'model-{i}.safetensors')
  index = {'metadata': {}, 'weight_map': listed}
  (folder / safetensors.INDEX).write_text(json.dumps(index))
  return folder


def leaves(state):
  """{path: array} of the weights."""
  return {
    '.'.join(k.key for k in path): np.asarray(a)
    for tree in jax.device_get((state.params, state.router_state))
    for path, a in jax.tree_util.tree_leaves_with_path(tree)
  }


def cut(folder, sizes):
  """The same of a published folder that is read to a mesh."""
  family, keys, _ = convert.read_config(folder)
  c, _ = convert.model_config(keys)
  mesh = parallel.mesh(dict(zip(parallel.AXES, sizes, strict=True)))
  return leaves(convert.load(folder, family, c, mesh)[0])


@pytest.fixture(scope='module')
def taken(tmp_path_factory):
  """By family: a work directory of its model, what was told, the weights."""
  read, load = [], convert.load

  def watched(*args):
    read.append(load(*args))
    return read[-1]

  @functools.cache
  def make(family):
    place = tmp_path_factory.mktemp(family)
    source = publish(place / 'split', values(family))
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(convert, 'load', watched)
      told = convert.take(str(source), str(place / 'run'))
    return place / 'run', told, leaves(read.pop()[0])

  return make


def described(folder, c):
  """Makes a work directory that holds no weights yet."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(c))


def filled(folder, params, router_state):
  """Saves lively random weights of these shapes there."""
  draw = np.random.default_rng(1)

  def fill(path, a):
    value = 0.5 * draw.normal(size=a.shape) + ('scale_D' in str(path[-1]))
    return value.astype(a.dtype)

  trees = jax.tree_util.tree_map_with_path(fill, (params, router_state))
  weights = train_step.Weights(np.int32(0), *trees)
  mesh = parallel.mesh(dict.fromkeys(parallel.AXES, 1))
  with checkpoint.Checkpoints(folder, keep=1) as saved:
    saved.save(0, jax.device_put(weights, jax.NamedSharding(mesh, jax.P())), {})


def made(folder, keys):
  """A work directory of a decoder of these keys, without a tokenizer."""
  c = {**convert.model_config(keys)[0], 'corpus_sha256': ''}
  described(folder, c)
  filled(folder, *models.split(convert.abstract(c)[0]))
  return folder


def begun(c, folder):
  """One of a run, as if it had just begun."""
  job = jobs.prepare(c, str(folder))
  described(folder, job.config)
  job.dataset.save(folder)
  filled(folder, *models.split(job.model))


# Tables.


def test_every_tensor_lies_where_it_belongs(taken):
  """By hand, a few of each form."""
  arrays = drawn(values('deepseek_v2'))
  found = taken('deepseek_v2')[2]
  of = lambda name: np.float32(arrays[name])
  moe = 'trunk.body.moe.attention.'
  layer = 'model.layers.2.self_attn.'  # the second MoE layer
  kv_b = of(layer + 'kv_b_proj.weight')  # head by head its key, its value
  for h in range(2):
    own = kv_b[h * 8 : h * 8 + 8]
    np.testing.assert_array_equal(
      found[moe + 'key_ZxHxW'][1, 0, :, h], own[:3].T
    )
    np.testing.assert_array_equal(
      found[moe + 'value_ZxHxU'][1, 0, :, h], own[3:].T
    )
  kv_a = of(layer + 'kv_a_proj_with_mqa.weight')
  np.testing.assert_array_equal(found[moe + 'latent_DxZ'][1, 0], kv_a[:6].T)
  np.testing.assert_array_equal(found[moe + 'key_DxP'][1, 0], kv_a[6:].T)
  np.testing.assert_array_equal(
    found['trunk.body.pools.down_ExFxD'][1, 3],
    of('model.layers.2.mlp.experts.3.down_proj.weight').T,
  )
  np.testing.assert_array_equal(
    found['trunk.body.moe.feed.shared.one.gate_ExDxF'][1, 0, 0],
    of('model.layers.2.mlp.shared_experts.gate_proj.weight').T,
  )
  np.testing.assert_array_equal(
    found['trunk.first.feed.one.up_ExDxF'][0, 0],
    of('model.layers.0.mlp.up_proj.weight').T,
  )
  np.testing.assert_array_equal(found['head_DxV'], of('lm_head.weight').T)


# What is read to a mesh, slice by slice: all forms that tensors have.
CUT = {'qwen3_moe': 'fused', 'deepseek_v3': 'split'}


@pytest.mark.parametrize('family', OPTIONS)
def test_both_layouts_on_any_mesh_and_back_are_the_same_bits(
  family, taken, tmp_path
):
  theirs = values(family)
  run, told, whole = taken(family)
  assert (
    f'{sum(a.size for k, a in whole.items() if "bias_E" not in k):,}' in told[0]
  )
  convert.give(str(run), str(tmp_path / 'again'), shard=1000)
  files = sorted((tmp_path / 'again').glob('*.safetensors'))
  assert len(files) > 2
  arrays = drawn(theirs)
  again = {k: a for path in files for k, a in load_file(path).items()}
  assert again.keys() == arrays.keys()
  for name, a in arrays.items():
    assert again[name].dtype == a.dtype
    assert again[name].tobytes() == a.tobytes(), name
  # Fused by hand.
  fused, n = {}, families.ours(theirs)[1].get('E')
  rename = lambda name: name.replace('block_sparse_moe', 'mlp')
  of = {'w1': 'gate_proj', 'w2': 'down_proj', 'w3': 'up_proj'}
  experts = {}
  for name, a in arrays.items():
    found = re.fullmatch(r'(.*\.experts)\.(\d+)\.(\w+)\.weight', rename(name))
    if found:
      kind = of.get(found[3], found[3])
      experts.setdefault(found[1], {}).setdefault(kind, []).append(a)
    else:
      fused[rename(name)] = a
  for name, own in experts.items():
    assert len(own['gate_proj']) == n
    both = [np.stack(own[kind]) for kind in ('gate_proj', 'up_proj')]
    fused[f'{name}.gate_up_proj'] = np.concatenate(both, axis=1)
    fused[f'{name}.down_proj'] = np.stack(own['down_proj'])
  own, model, tree = abstract(theirs)
  known = tensors.find(own.layouts[-1], model.c, tree)
  shapes = {name: a.shape for name, a in fused.items()}
  assert {piece.name: piece.shape for piece in known} == shapes
  if family in CUT:
    publish(run.parent / 'fused', theirs, fused)
    found = cut(run.parent / CUT[family], (1, 2, 2, 2))
    for path, a in whole.items():
      np.testing.assert_array_equal(a, found[path], err_msg=path)


def test_all_patterns_of_dense_layers_are_found():
  rule = next(
    rule
    for rule in families.FAMILIES['qwen3_moe'].rules
    if 'mlp_only_layers' in rule.fields
  )
  given = lambda N, every, listed: rule.from_hf(
    {
      'num_hidden_layers': N,
      'decoder_sparse_step': every,
      'mlp_only_layers': listed,
    }
  )
  assert given(4, 1, []) == {'pattern': 'm', 'first_dense': 0}
  assert given(4, 2, []) == {'pattern': 'dm', 'first_dense': 0}
  assert given(5, 2, [0]) == {'pattern': 'md', 'first_dense': 1}
  assert given(6, 3, None) == {'pattern': 'ddm', 'first_dense': 0}
  assert given(5, 1, [0, 1]) == {'pattern': 'm', 'first_dense': 2}
  with pytest.raises(ValueError, match=r'mlp_only_layers=\[2\].*mmdm'):
    given(4, 1, [2])
  for found in (given(5, 2, [0]), given(5, 1, [0, 1])):
    back = rule.to_hf({**found, 'N': 5})
    assert given(5, *back.values()) == found


# As their config.json are on the Hub, but for what says nothing of the model.
PUBLISHED = {
  'Llama-2-7B': (
    6_738_415_616,
    {
      'model_type': 'llama',
      'hidden_act': 'silu',
      'hidden_size': 4096,
      'intermediate_size': 11008,
      'max_position_embeddings': 4096,
      'num_attention_heads': 32,
      'num_hidden_layers': 32,
      'num_key_value_heads': 32,
      'pretraining_tp': 1,
      'rms_norm_eps': 1e-05,
      'rope_scaling': None,
      'tie_word_embeddings': False,
      'vocab_size': 32000,
    },
  ),
  'Qwen3-0.6B': (
    596_049_920,
    {
      'model_type': 'qwen3',
      'attention_bias': False,
      'head_dim': 128,
      'hidden_act': 'silu',
      'hidden_size': 1024,
      'intermediate_size': 3072,
      'max_position_embeddings': 40960,
      'max_window_layers': 28,
      'num_attention_heads': 16,
      'num_hidden_layers': 28,
      'num_key_value_heads': 8,
      'rms_norm_eps': 1e-06,
      'rope_scaling': None,
      'rope_theta': 1000000,
      'sliding_window': None,
      'tie_word_embeddings': True,
      'torch_dtype': 'bfloat16',
      'use_sliding_window': False,
      'vocab_size': 151936,
    },
  ),
  'Mixtral-8x7B': (
    46_702_792_704,
    {
      'model_type': 'mixtral',
      'hidden_act': 'silu',
      'hidden_size': 4096,
      'intermediate_size': 14336,
      'max_position_embeddings': 32768,
      'num_attention_heads': 32,
      'num_experts_per_tok': 2,
      'num_hidden_layers': 32,
      'num_key_value_heads': 8,
      'num_local_experts': 8,
      'rms_norm_eps': 1e-05,
      'rope_theta': 1000000.0,
      'sliding_window': None,
      'tie_word_embeddings': False,
      'torch_dtype': 'bfloat16',
      'vocab_size': 32000,
    },
  ),
  'OLMoE-1B-7B': (
    6_919_161_856,
    {
      'model_type': 'olmoe',
      'attention_bias': False,
      'clip_qkv': None,
      'hidden_act': 'silu',
      'hidden_size': 2048,
      'intermediate_size': 1024,
      'max_position_embeddings': 4096,
      'norm_topk_prob': False,
      'num_attention_heads': 16,
      'num_experts': 64,
      'num_experts_per_tok': 8,
      'num_hidden_layers': 16,
      'num_key_value_heads': 16,
      'rms_norm_eps': 1e-05,
      'rope_scaling': None,
      'rope_theta': 10000.0,
      'tie_word_embeddings': False,
      'torch_dtype': 'bfloat16',
      'vocab_size': 50304,
    },
  ),
  'Qwen3-30B-A3B': (
    30_532_122_624,
    {
      'model_type': 'qwen3_moe',
      'attention_bias': False,
      'decoder_sparse_step': 1,
      'head_dim': 128,
      'hidden_act': 'silu',
      'hidden_size': 2048,
      'intermediate_size': 6144,
      'max_position_embeddings': 40960,
      'max_window_layers': 48,
      'mlp_only_layers': [],
      'moe_intermediate_size': 768,
      'norm_topk_prob': True,
      'num_attention_heads': 32,
      'num_experts': 128,
      'num_experts_per_tok': 8,
      'num_hidden_layers': 48,
      'num_key_value_heads': 4,
      'rms_norm_eps': 1e-06,
      'rope_scaling': None,
      'rope_theta': 1000000.0,
      'sliding_window': None,
      'tie_word_embeddings': False,
      'torch_dtype': 'bfloat16',
      'use_sliding_window': False,
      'vocab_size': 151936,
    },
  ),
  'DeepSeek-V2-Lite': (
    15_706_484_224,
    {
      'model_type': 'deepseek_v2',
      'attention_bias': False,
      'first_k_dense_replace': 1,
      'hidden_act': 'silu',
      'hidden_size': 2048,
      'intermediate_size': 10944,
      'kv_lora_rank': 512,
      'max_position_embeddings': 163840,
      'moe_intermediate_size': 1408,
      'moe_layer_freq': 1,
      'n_group': 1,
      'n_routed_experts': 64,
      'n_shared_experts': 2,
      'norm_topk_prob': False,
      'num_attention_heads': 16,
      'num_experts_per_tok': 6,
      'num_hidden_layers': 27,
      'num_key_value_heads': 16,
      'q_lora_rank': None,
      'qk_nope_head_dim': 128,
      'qk_rope_head_dim': 64,
      'rms_norm_eps': 1e-06,
      'rope_scaling': {
        'beta_fast': 32,
        'beta_slow': 1,
        'factor': 40,
        'mscale': 0.707,
        'mscale_all_dim': 0.707,
        'original_max_position_embeddings': 4096,
        'type': 'yarn',
      },
      'rope_theta': 10000,
      'routed_scaling_factor': 1.0,
      'scoring_func': 'softmax',
      'tie_word_embeddings': False,
      'topk_group': 1,
      'topk_method': 'greedy',
      'torch_dtype': 'bfloat16',
      'v_head_dim': 128,
      'vocab_size': 102400,
    },
  ),
  # Without its layer of multi-token prediction.
  'DeepSeek-V3': (
    671_026_419_200,
    {
      'model_type': 'deepseek_v3',
      'attention_bias': False,
      'first_k_dense_replace': 3,
      'hidden_act': 'silu',
      'hidden_size': 7168,
      'intermediate_size': 18432,
      'kv_lora_rank': 512,
      'max_position_embeddings': 163840,
      'moe_intermediate_size': 2048,
      'moe_layer_freq': 1,
      'n_group': 8,
      'n_routed_experts': 256,
      'n_shared_experts': 1,
      'norm_topk_prob': True,
      'num_attention_heads': 128,
      'num_experts_per_tok': 8,
      'num_hidden_layers': 61,
      'num_key_value_heads': 128,
      'num_nextn_predict_layers': 1,
      'q_lora_rank': 1536,
      'qk_nope_head_dim': 128,
      'qk_rope_head_dim': 64,
      'rms_norm_eps': 1e-06,
      'rope_scaling': {
        'beta_fast': 32,
        'beta_slow': 1,
        'factor': 40,
        'mscale': 1.0,
        'mscale_all_dim': 1.0,
        'original_max_position_embeddings': 4096,
        'type': 'yarn',
      },
      'rope_theta': 10000,
      'routed_scaling_factor': 2.5,
      'scoring_func': 'sigmoid',
      'tie_word_embeddings': False,
      'topk_group': 4,
      'topk_method': 'noaux_tc',
      'torch_dtype': 'bfloat16',
      'v_head_dim': 128,
      'vocab_size': 129280,
    },
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_models_have_their_published_size(name):
  """As shapes: tensors and leaves; the config goes there and back."""
  count, theirs = PUBLISHED[name]
  family, model, tree = abstract(theirs)
  own = tensors.find(family.layouts[0], model.c, tree)
  assert sum(math.prod(piece.shape) for piece in own) == count
  assert sum(math.prod(a.shape) for a in tree.values()) == count
  c, size = convert.model_config(families.ours(theirs)[1])
  found, again = convert.expressed(c, size)
  assert found is family
  for key, value in theirs.items():
    if key in again and key != 'rope_scaling' and value is not None:
      left_out = key in ('num_nextn_predict_layers', 'topk_method', 'n_group')
      assert again[key] == value or left_out, key
  old, new = theirs.get('rope_scaling'), again['rope_scaling']
  if old:
    new['type'] = new.pop('rope_type')
  assert old == new


# What is refused.


@pytest.mark.parametrize(
  'family, changes, message',
  [
    ('mixtral', {'model_type': 'gpt2'}, "model_type='gpt2'.*mixtral, olmoe"),
    ('llama', {'mlp_bias': True}, 'mlp_bias=True'),
    ('llama', {'num_local_experts': 8}, 'num_local_experts=8 is not supp'),
    (
      'llama',
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
      "high_freq_factor is missing, rope_type is 'llama3'",
    ),
    ('llama', {'rope_scaling': {'rope_type': 'linear'}}, "'yarn' or 'llama3'"),
    ('llama', {'rope_scaling': {'rope_type': None}}, 'rope_type=None'),
    ('llama', {'rope_theta': None}, 'rope.rope_theta=None is not supported'),
    ('llama', {'rope_scaling': YARN}, 'rope.factor is missing'),
    (
      'llama',
      {'rope_scaling': {**YARN, 'factor': 2.0}},
      'max_position_embeddings is missing',
    ),
    (
      'llama',
      {
        'rope_scaling': {**YARN, 'factor': 0},
        'max_position_embeddings': 64,
      },
      'rope.factor=0 is not > 0',
    ),
    (
      'llama',
      {
        'rope_scaling': {**YARN, 'factor': 2.0, 'truncate': False},
        'max_position_embeddings': 64,
      },
      'rope.truncate=False is not supported',
    ),
    (
      'llama',
      {
        'rope_scaling': {**YARN, 'factor': 2.0, 'beta_fast': 1},
        'max_position_embeddings': 64,
      },
      'rope.beta_fast=1 is not more than rope.beta_slow=1.0',
    ),
    ('llama', {'dtype': 'float32'}, "torch_dtype='bfloat16' and dtype='float3"),
    (
      'olmoe',
      {'num_local_experts': 5},
      'num_local_experts=5 and num_experts=4',
    ),
    ('olmoe', {'norm_topk_prob': None}, 'norm_topk_prob=None is not supported'),
    ('qwen3', {'head_dim': None}, 'head_dim=None is not supported'),
    ('qwen3', {'use_sliding_window': None}, 'use_sliding_window=None'),
    (
      'qwen3',
      {'layer_types': ['full_attention'] * 2 + ['sliding_attention']},
      "'sliding_attention'.* is not supported, only the same for all",
    ),
    (
      'qwen3',
      {
        'use_sliding_window': True,
        'sliding_window': 4,
        'max_window_layers': 2,
      },
      'use_sliding_window=True is not supported, only the same for all',
    ),
    ('mixtral', {'hidden_act': 'gelu'}, "hidden_act='gelu'.*only 'silu'"),
    ('mixtral', {'new_thing': 3}, 'new_thing=3 is not supported'),
    (
      'mixtral',
      {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
      "rope_type='linear'",
    ),
    ('mixtral', {'torch_dtype': 'float8'}, "dtype='float8'"),
    ('mixtral', {'quantization_config': {'bits': 4}}, 'quantization_config='),
    ('olmoe', {'clip_qkv': 8.0}, 'clip_qkv=8.0'),
    ('qwen3_moe', {'hidden_size': 'wide'}, 'hidden_size|wide'),
    ('deepseek_v2', {'norm_topk_prob': True}, 'norm_topk_prob=True'),
    ('deepseek_v2', {'topk_method': 'best'}, "topk_method='best'"),
    ('deepseek_v3', {'num_key_value_heads': 1}, 'num_key_value_heads=1'),
    ('deepseek_v3', {'attention_bias': True}, 'attention_bias=True'),
    ('deepseek_v3', {'n_group': 3}, 'expert_groups=3 does not divide 4'),
  ],
)
def test_what_a_config_may_not_say(family, changes, message, tmp_path):
  source = publish(tmp_path / 'source', values(family))
  changed = json.dumps(values(family, **changes))
  (source / 'config.json').write_text(changed)
  with pytest.raises((ValueError, TypeError), match=message) as caught:
    convert.take(str(source), str(tmp_path / 'out' / 'run'))
  assert '\n' not in str(caught.value)
  assert not list((tmp_path / 'out').rglob('*'))


def test_a_field_that_is_missing_is_named(tmp_path):
  theirs = values()
  del theirs['hidden_size']
  publish(tmp_path, values())
  (tmp_path / 'config.json').write_text(json.dumps(theirs))
  with pytest.raises(ValueError, match='hidden_size is missing'):
    convert.read_config(tmp_path)


def _read(theirs):
  """Our keys of a config.json."""
  return families.ours(theirs)[1]


def test_what_a_config_leaves_out_is_what_transformers_5_takes():
  """By hand, from its code; transformers_test.py asks itself."""
  llama3 = dict(
    rope_type='llama3', factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0
  )
  changes = dict(rope_scaling=llama3, max_position_embeddings=64)
  found = _read(values('llama', **changes))
  assert found['attention.yarn_length'] == 64
  assert found['attention.yarn_factor'] == 8
  yarn = {**YARN, 'factor': None, 'original_max_position_embeddings': 16}
  changes['rope_scaling'] = yarn
  assert _read(values('llama', **changes))['attention.yarn_factor'] == 4
  del yarn['factor']
  for family in ('qwen3', 'deepseek_v3'):
    assert _read(values(family, **changes))['attention.yarn_factor'] == 4
  # rope_scaling stands before rope_parameters, and has no base here.
  given = {'rope_type': 'default', 'rope_theta': 7.0}
  changes['rope_parameters'] = given
  found = _read(values('llama', **changes))
  assert found['attention.yarn_factor'] == 4
  assert found['attention.theta'] == 100
  changes['rope_scaling'] = None
  found = _read(values('llama', **changes))
  assert 'attention.yarn_factor' not in found
  assert found['attention.theta'] == 7
  few = lambda family, name: {
    k: v for k, v in values(family).items() if k != name
  }
  assert _read(few('qwen3', 'head_dim'))['attention.size'] == 128
  assert _read(few('qwen3_moe', 'head_dim'))['attention.size'] is None
  assert (
    _read(few('llama', 'num_key_value_heads'))['attention.num_kv_heads'] is None
  )
  used = dict(use_sliding_window=True, max_window_layers=0)
  for family in ('qwen3', 'qwen3_moe'):
    assert _read(values(family, **used))['attention.window'] == 4096
  assert _read(values(dtype=None))['dtype'] == 'bfloat16'


def _drop_shard(folder):
  (folder / 'model-1.safetensors').unlink()


def _truncate(folder):
  path = folder / 'model-1.safetensors'
  path.write_bytes(path.read_bytes()[:-7])


def _other_shape(folder):
  arrays = drawn(values())
  arrays['model.norm.weight'] = arrays['model.norm.weight'][:5]
  publish(folder, values(), arrays)


def _missing_tensor(folder):
  arrays = drawn(values())
  del arrays['model.layers.1.block_sparse_moe.experts.2.w3.weight']
  publish(folder, values(), arrays)


def _more(folder):
  arrays = drawn(values())
  arrays['model.layers.1.extra.weight'] = arrays['model.norm.weight']
  publish(folder, values(), arrays)


def _integers(folder):
  arrays = drawn(values())
  arrays['model.norm.weight'] = np.zeros(8, np.int8)
  publish(folder, values(), arrays)


def _eight_bits(folder):
  arrays = drawn(values())
  arrays['model.norm.weight'] = np.zeros(8, ml_dtypes.float8_e4m3fn)
  publish(folder, values(), arrays)


def _outside(folder):
  index = json.loads((folder / safetensors.INDEX).read_text())
  index['weight_map']['model.norm.weight'] = '../model-1.safetensors'
  (folder / safetensors.INDEX).write_text(json.dumps(index))


def _wrong_index(folder):
  index = json.loads((folder / safetensors.INDEX).read_text())
  index['weight_map']['other'] = 'model-1.safetensors'
  (folder / safetensors.INDEX).write_text(json.dumps(index))


def _adapter(folder):
  (folder / 'adapter_config.json').write_text('{}')


def _no_index(folder):
  (folder / safetensors.INDEX).unlink()


def _large_tokenizer(folder):
  words = {f'w{i}': i for i in range(V)} | {'</s>': V}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, 'w0'))
  made.add_special_tokens(['</s>'])
  made.save(str(folder / 'tokenizer.json'))


@pytest.mark.parametrize(
  'damage, message',
  [
    (_drop_shard, 'model-1.safetensors is missing'),
    (_truncate, 'model-1.safetensors is damaged'),
    (_other_shape, r'model.norm.weight has the shape \(5,\).* \(8,\)'),
    (_missing_tensor, '1 tensors are missing.*experts.2.w3'),
    (_more, r'layers\.1\.extra\.weight is of no use'),
    (_integers, 'model.norm.weight is of I8'),
    (_eight_bits, 'model.norm.weight is of F8_E4M3, .* only BF16, F16, F32'),
    (_outside, 'is no name of a file'),
    (_wrong_index, 'model-1.safetensors has no tensor other'),
    (_no_index, 'neither model.safetensors.index.json nor model.safetensors'),
    (_adapter, 'adapter_config.json: an adapter is not supported'),
    (_large_tokenizer, f'has {V + 1} ids, config.json vocab_size={V}'),
  ],
  ids=lambda a: getattr(a, '__name__', None),
)
def test_damage_is_one_line_and_leaves_nothing(damage, message, tmp_path):
  source = publish(tmp_path / 'source', values())
  damage(source)
  with pytest.raises(ValueError, match=message) as caught:
    convert.take(str(source), str(tmp_path / 'out' / 'run'))
  assert '\n' not in str(caught.value)
  assert not list((tmp_path / 'out').rglob('*'))


def test_what_is_known_to_be_of_no_use_is_left_out(tmp_path):
  """Layers of multi-token prediction, a tied head that was saved twice."""
  theirs = values('deepseek_v3', tie_word_embeddings=True)
  arrays = drawn(theirs)
  arrays['lm_head.weight'] = arrays['model.embed_tokens.weight']
  arrays['model.layers.3.enorm.weight'] = arrays['model.norm.weight']
  arrays['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.zeros(4, 'f')
  source = publish(tmp_path / 'source', theirs, arrays)
  told = convert.take(str(source), str(tmp_path / 'run'))
  assert any('left out 3 tensors' in line for line in told)
  arrays['model.layers.2.enorm.weight'] = arrays['model.norm.weight']
  publish(source, theirs, arrays)
  with pytest.raises(
    ValueError, match=r'layers\.2\.enorm\.weight is of no use'
  ):
    convert.take(str(source), str(tmp_path / 'other'))


def test_a_head_of_its_own_is_not_tied(tmp_path):
  """Whatever config.json says; and back it is not either."""
  theirs = values('llama', tie_word_embeddings=True, num_hidden_layers=1)
  arrays = drawn(theirs)
  assert 'lm_head.weight' not in arrays
  arrays['lm_head.weight'] = arrays['model.embed_tokens.weight'].copy()
  source = publish(tmp_path / 'source', theirs, arrays)
  assert convert.read_config(source)[1]['tied']
  arrays['lm_head.weight'][-1, -1] = 7
  publish(source, theirs, arrays)
  told = convert.take(str(source), str(tmp_path / 'run'))
  assert not any('left out' in line for line in told)
  convert.give(str(tmp_path / 'run'), str(tmp_path / 'again'))
  again = load_file(tmp_path / 'again' / 'model.safetensors')
  head = again['lm_head.weight']
  assert head.tobytes() == arrays['lm_head.weight'].tobytes()
  written = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert not written['tie_word_embeddings']


def test_a_single_file_stands_before_an_index(tmp_path):
  theirs = values('llama')
  source = publish(tmp_path / 'source', theirs)
  (source / 'model-1.safetensors').unlink()  # an old index
  save_file(drawn(theirs), source / safetensors.WHOLE)
  assert safetensors.Shards(source).names() == set(drawn(theirs))


def _mixed(theirs):
  """Wide routers, norms and one expert, a narrow bias."""
  draw, found = np.random.default_rng(2), drawn(theirs)
  for name, a in found.items():
    if 'norm' in name or name.endswith(('.gate.weight', 'experts.0.w1.weight')):
      found[name] = draw.normal(size=a.shape).astype(np.float32)
    if name.endswith('e_score_correction_bias'):
      found[name] = a.astype(ml_dtypes.bfloat16)
  return found


def test_every_tensor_keeps_its_dtype(tmp_path):
  theirs = values(num_hidden_layers=1)
  arrays = _mixed(theirs)
  source = publish(tmp_path / 'source', theirs, arrays)
  convert.take(str(source), str(tmp_path / 'run'))
  convert.give(str(tmp_path / 'run'), str(tmp_path / 'again'))
  again = load_file(tmp_path / 'again' / 'model.safetensors')
  assert again.keys() == arrays.keys()
  assert sum(a.dtype == np.float32 for a in arrays.values()) == 5
  for name, a in arrays.items():
    assert again[name].dtype == a.dtype, name
    assert again[name].tobytes() == a.tobytes(), name


def test_tensors_that_an_export_splits_keep_their_dtype(tmp_path):
  theirs = values('deepseek_v3', num_hidden_layers=2)
  arrays, experts = _mixed(theirs), 'model.layers.1.mlp.experts.'
  of = lambda kind: np.stack(
    [arrays.pop(f'{experts}{e}.{kind}_proj.weight') for e in range(4)]
  )
  both = np.concatenate([of('gate'), of('up')], axis=1)
  arrays[f'{experts}gate_up_proj'] = both.astype(np.float32)
  arrays[f'{experts}down_proj'] = of('down')
  source = publish(tmp_path / 'source', theirs, arrays)
  family, keys, _ = convert.read_config(source)
  found = convert._dtypes(source, family, convert.model_config(keys)[0])
  wide = {n for n, a in arrays.items() if a.dtype == np.float32}
  wide.remove(f'{experts}gate_up_proj')
  wide |= {
    f'{experts}{e}.{k}_proj.weight' for e in range(4) for k in ('gate', 'up')
  }
  bias = 'model.layers.1.mlp.gate.e_score_correction_bias'
  assert found == {**dict.fromkeys(wide, 'float32'), bias: 'bfloat16'}


def test_without_a_dtype_the_files_tell(tmp_path):
  for name in ('torch_dtype', 'dtype'):
    theirs = {**values('llama', torch_dtype=None), name: None}
    source = publish(tmp_path / 'source', theirs)
    assert convert.read_config(source)[1]['dtype'] == 'bfloat16'
  del theirs['torch_dtype'], theirs['dtype']
  arrays = drawn(theirs)
  arrays['model.norm.weight'] = np.ones(8, np.float32)
  publish(source, theirs, arrays)
  assert convert.read_config(source)[1]['dtype'] == 'bfloat16'
  first = min(arrays)
  publish(source, theirs, arrays | {first: np.float32(arrays[first])})
  assert convert.read_config(source)[1]['dtype'] == 'float32'
  publish(source, {**theirs, 'torch_dtype': 'bfloat16'}, arrays)
  assert convert.read_config(source)[1]['dtype'] == 'bfloat16'


def test_float16_is_read_into_float32(tmp_path):
  """Every number of it, the smallest and the largest too."""
  theirs = values(torch_dtype='float16')
  arrays = {k: a.astype(np.float16) for k, a in drawn(theirs).items()}
  ends = np.float16([65504, -65504, 6e-8, 0, 1, -1, 0.1, 3])
  arrays['model.norm.weight'] = ends
  source = publish(tmp_path / 'source', theirs, arrays)
  convert.take(str(source), str(tmp_path / 'run'))
  convert.give(str(tmp_path / 'run'), str(tmp_path / 'again'))
  again = load_file(tmp_path / 'again' / 'model.safetensors')
  written = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert written['torch_dtype'] == 'float32'
  assert again.keys() == arrays.keys()
  for name, a in arrays.items():
    assert again[name].dtype == np.float32
    np.testing.assert_array_equal(again[name], np.float32(a), err_msg=name)


def test_several_processes_are_refused(tmp_path, monkeypatch):
  source = publish(tmp_path / 'source', values())
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for act in (convert.take, convert.give):
    with pytest.raises(ValueError, match='by one process, here are 2'):
      act(str(source), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_what_is_there_is_not_overwritten(tmp_path):
  source = publish(tmp_path / 'source', values())
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'mine').write_text('')
  with pytest.raises(ValueError, match='is there already'):
    convert.take(str(source), str(tmp_path / 'run'))
  assert [p.name for p in (tmp_path / 'run').iterdir()] == ['mine']
  assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


@pytest.mark.parametrize('linked', [False, True])
def test_an_empty_folder_is_filled_and_not_replaced(tmp_path, linked):
  """It may be a link, or where a disk is mounted."""
  real = tmp_path / 'real'
  real.mkdir()
  before, target = real.stat().st_ino, tmp_path / 'link' if linked else real
  if linked:
    target.symlink_to(real)
  with convert.atomic_directory(target) as part:
    (part / 'config.json').write_text('{}')
    (part / 'checkpoints').mkdir()
    assert not (target / 'config.json').exists()
  assert real.stat().st_ino == before
  assert {p.name for p in target.iterdir()} == {'config.json', 'checkpoints'}
  assert target.is_symlink() == linked


@pytest.mark.parametrize('there', [False, True])
def test_a_folder_that_cannot_be_moved_leaves_nothing(
  tmp_path, monkeypatch, there
):
  target = tmp_path / 'new' / 'run'
  if there:
    target.mkdir(parents=True)
  move = pathlib.Path.replace

  def fail(path, to):
    if path.name == 'config.json' or not there:
      raise OSError('the disk is full')
    return move(path, to)

  monkeypatch.setattr(pathlib.Path, 'replace', fail)
  with (
    pytest.raises(OSError, match='disk'),
    convert.atomic_directory(target) as part,
  ):
    (part / 'config.json').write_text('{}')
    (part / 'checkpoints').mkdir()
  left = [p.name for p in tmp_path.rglob('*')]
  assert sorted(left) == (['new', 'run'] if there else [])


def test_a_link_to_nothing_is_refused_first(tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(tmp_path / 'gone')
  for make in (convert.take, convert.give):
    with pytest.raises(ValueError, match=f'link is a link to {tmp_path}/gone'):
      make(str(publish(tmp_path / make.__name__, values())), str(link))
  assert link.is_symlink() and not link.exists()


@pytest.fixture
def interruptible():
  """A shell's background has SIGINT ignored, nohup has SIGHUP."""
  interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
  hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGINT, interrupt)
  signal.signal(signal.SIGHUP, hang_up)


@pytest.mark.usefixtures('interruptible')
@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP'])
def test_a_signal_leaves_nothing(tmp_path, capsys, name):
  """Nor does one more, which comes while it is cleaned."""
  number, heard = signal.Signals[name], []
  with pytest.raises(SystemExit) as left, commands.leaving('moe-convert'):
    try:
      with convert.atomic_directory(tmp_path / 'new' / 'run') as part:
        (part / 'config.json').write_text('{}')
        os.kill(os.getpid(), number)
    finally:
      for other in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        os.kill(os.getpid(), other)
      heard.append(name)
  assert left.value.code == 128 + number and heard == [name]
  told = capsys.readouterr().err
  assert told == f'moe-convert: interrupted by {name}\n'
  assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_stays_so():
  old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with commands.leaving('moe-train'):
      os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, old)


def keys_of(**changes):
  """The resolved config of a run whose model the formats have."""
  c = config.default()
  c.model.update(N=2, D=16, H=2, E=4, expert_F=8)
  for key, value in changes.items():
    c.update_from_flattened_dict({f'model.{key.replace("__", ".")}': value})
  return config.resolve(c)


@pytest.mark.parametrize(
  'changes, family',
  [
    ({}, 'mixtral'),
    ({'pattern': 'd', 'E': 1, 'iterations': 3, 'router__scale': 2.0}, 'llama'),
    ({'first_dense': 2, 'attention__qk_norm': 'head'}, 'qwen3'),
    ({'attention__size': 4, 'attention__window': 3}, 'mixtral'),
    ({'attention__qk_norm': 'all'}, 'olmoe'),
    ({'attention__qk_norm': 'head', 'first_dense': 1}, 'qwen3_moe'),
    ({'router__renormalise': False, 'attention__qk_norm': 'all'}, 'olmoe'),
  ],
)
def test_a_model_trained_here_finds_its_family(changes, family):
  changes = {'attention__eps': 1e-6, **changes}
  found, theirs = convert.expressed(keys_of(**changes), V)
  assert found.model_type == family
  assert theirs['vocab_size'] == V


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'iterations': 2}, 'mixtral, the nearest, has not model.iterations=2'),
    (
      {'pattern': 'd', 'attention__window': 3, 'eps': 0.5},
      'llama, the nearest, has not model.attention.window=3$',
    ),
    ({'router__capacity': 1.0}, r'has not model.router.capacity=1.0'),
    ({'residual': {'name': 'heavy_ball'}}, "model.residual.name='heavy_ball'"),
    ({'router': {'name': 'switch'}}, "model.router.name='switch'"),
    ({'attention': {'name': 'full'}}, "model.attention.name='full'"),
    ({'router__renormalise': False}, 'model.router.renormalise=False'),
    ({'activation': 'relu', 'norm': 'layer'}, "'relu', model.norm='layer'"),
  ],
)
def test_a_variant_that_no_format_has_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    convert.expressed(keys_of(**changes), V)


def test_a_run_goes_out_and_comes_back(corpus, tmp_path):
  """With its tokenizer; what its routers do with a text is the same."""
  c = small_config(corpus)
  c.data.update(tokenizer='bpe', vocab_size=300)
  begun(c, tmp_path / 'run')
  convert.give(str(tmp_path / 'run'), str(tmp_path / 'out'))
  arrays = load_file(tmp_path / 'out' / 'model.safetensors')
  _, weights = generate.newest(str(tmp_path / 'run'))
  np.testing.assert_array_equal(
    arrays['model.layers.1.block_sparse_moe.experts.3.w1.weight'],
    jax.device_get(weights.params)['trunk']['body']['pools']['gate_ExDxF'][
      1, 3
    ].T,
  )
  convert.take(str(tmp_path / 'out'), str(tmp_path / 'again'))
  found = []
  for name in ('run', 'again'):
    job, weights = generate.newest(str(tmp_path / name))
    _, batches = record.read(job, record.streams(job, [f'text={corpus}']), 128)
    found.append(record.record(record.recorder(job), weights, batches))
  assert found[0].names == found[1].names and found[0].expert_SxTxK.size
  for field in ('expert_SxTxK', 'gate_SxTxK', 'entropy_S', 'nll_T'):
    a, b = (getattr(of, field) for of in found)
    np.testing.assert_array_equal(a, b, err_msg=field)
  prompt = generate.prompt_ids(job, '7 squared is')
  assert job.dataset.tokenizer.decode(prompt) == '7 squared is'

  path = tmp_path / 'run' / 'config.json'
  old = json.loads(path.read_text())
  del old['model']['attention']['size']  # as a version before it has it
  path.write_text(json.dumps(old))
  with pytest.raises(ValueError, match='is not of this version'):
    convert.give(str(tmp_path / 'run'), str(tmp_path / 'further'))
  assert not (tmp_path / 'further').exists()


def test_an_imported_model_holds_no_text_and_is_not_trained_further(
  taken, tmp_path
):
  with pytest.raises(ValueError, match=r'has no tokenizer\.json to read'):
    record.write(str(taken('mixtral')[0]), [], 100, str(tmp_path / 'out'))
  source = publish(tmp_path / 'source', values())
  words = {f'w{i}': i for i in range(V - 1)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, 'w0'))
  made.add_special_tokens(['</s>'])
  made.save(str(source / 'tokenizer.json'))
  (source / 'config.json').write_text(
    json.dumps(values(eos_token_id=[99, V - 1]))
  )
  convert.take(str(source), str(tmp_path / 'named'))
  job = saved_run.load(str(tmp_path / 'named'))
  assert job.dataset.tokenizer.separator == V - 1
  with pytest.raises(ValueError, match='holds published weights'):
    record.write(str(tmp_path / 'named'), [], 100, str(tmp_path / 'out'))


def test_how_a_published_model_begins_and_ends_a_text(tmp_path):
  """With the marks of its prompts, and at any of its ends."""
  words = {f'\u2581w{i}': i for i in range(V - 2)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '\u2581w0'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.decoder = tokenizers.decoders.Metaspace()
  made.add_special_tokens(['<s>'])
  made.add_tokens(['</s>'])  # is not marked special
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', V - 2)]
  )
  ends = values('llama', num_hidden_layers=1, eos_token_id=[V - 1, 3])
  source, run = publish(tmp_path / 'source', ends), tmp_path / 'run'
  made.save(str(source / 'tokenizer.json'))
  convert.take(str(source), str(run))
  job = saved_run.load(str(run))
  assert job.dataset.tokenizer.separator == V - 1
  assert generate.ends(job) == {V - 1, 3}
  named = run / checkpoint.ASIDE / 'generation_config.json'
  named.write_text('{"eos_token_id": 2}')
  assert generate.ends(job) == {2}
  named.write_text('{"eos_token_id": "</s>"}')
  with pytest.raises(ValueError, match="eos_token_id='</s>' is no id"):
    generate.ends(job)

  prompt = generate.prompt_ids(job, 'w1 w2')
  assert prompt == [V - 2, 1, 2]
  assert generate.continued(job, prompt, [5, 6]) == ' w5 w6'
  assert generate.continued(job, prompt, [5, 2], {2}) == ' w5'
  (tmp_path / 'a.txt').write_text('w1 w2\nw3\n')
  (tmp_path / 'b.txt').write_text('w3')
  found = record.streams(job, [f'text={tmp_path}/*.txt'])['text']
  assert found[0] == found[-1] == V - 2
  assert np.count_nonzero(found == V - 2) == 3 and V - 1 not in found
  (run / 'tokenizer.json').unlink()
  named.unlink()
  assert generate.ends(saved_run.load(str(run))) == {V - 1, 3}


# The command, and memory.


def test_the_command_goes_both_ways_and_mistakes_are_one_line(taken, tmp_path):
  run = taken('olmoe')[0]
  back = command('convert', f'--from={run}', f'--to={tmp_path / "out"}')
  assert back.returncode == 0, back.stderr
  assert back.stdout.startswith('olmoe, ') and '1 files' in back.stdout
  again = command('convert', f'--from={tmp_path / "out"}', f'--to={run}')
  assert again.returncode == 2 and 'is there already' in again.stderr
  assert again.stderr.startswith('moe-convert: ')
  assert len(again.stderr.splitlines()) == 1


MEASURE = """
import json, pathlib, resource, sys
from moe_jax import parallel
from moe_jax.weights import convert
folder = pathlib.Path(sys.argv[1])
family, keys, _ = convert.read_config(folder)
c, _ = convert.model_config(keys)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
mesh = parallel.mesh(dict.fromkeys(parallel.AXES, 1))
import jax
convert.load(pathlib.Path(sys.argv[2]), family, convert.model_config(
  convert.read_config(pathlib.Path(sys.argv[2]))[1])[0], mesh)
before = peak()
state, _ = convert.load(folder, family, c, mesh)
size = sum(a.nbytes for a in jax.tree.leaves(state))
print(json.dumps([before, peak(), size]))
"""


def test_memory_beyond_the_model_is_less_than_a_file_and_a_half(tmp_path):
  """The same import of a small model comes first, which compiles and loads."""
  large = values(hidden_size=512, intermediate_size=1024, num_local_experts=8)
  publish(tmp_path / 'small', values())
  publish(tmp_path / 'large', large, files=4)
  found = subprocess.run(
    [sys.executable, '-c', MEASURE, tmp_path / 'large', tmp_path / 'small'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  before, peak, model = json.loads(found.stdout)
  files = (tmp_path / 'large').glob('*.safetensors')
  largest = max(path.stat().st_size for path in files)
  assert peak - before - model < 1.5 * largest
