"""Families of published models: what others call our parameters and options.

A family is one table of tensors and one of rules for config.json. Axes of a
tensor of theirs are written in our letters, 'HS D' is a matrix with H * S rows
and D columns. What neither names, nobody reads: an unknown field or tensor is
refused, with its name.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = object()  # a field without a default


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One of their tensors, or one for each {layer} and {expert}.

  Attributes:
    name: with '{layer}' and '{expert}' where there are several.
    axes: of the tensor; '+' is the letter that each leaf has and no other axis:
      along it the leaves follow one another.
    leaves: our parameters, by names within the model, a layer, or 'pools'.
    wide: float32 whatever the model computes in.
  """

  name: str
  axes: str
  leaves: tuple[str, ...]
  wide: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
  """How some fields of config.json and some of our keys stand for each other.

  Attributes:
    fields: name -> what a config.json without it means; REQUIRED where the
      Hub's always have it, for defaults differ between families and versions.
    from_hf: fields' values -> our keys' values, 'E' and 'router.k', of a model.
    to_hf: all our keys -> fields' values.
    null: fields that may be null though that is not their default.

  Raises:
    ValueError: by `from_hf`, one line, for values that we cannot follow.
  """

  fields: Mapping[str, Any]
  from_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
  to_hf: Callable[[Mapping[str, Any]], dict[str, Any]]
  null: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Family:
  """
  Attributes:
    model_type, architecture: as config.json has them.
    layouts: tensors as the Hub has them, which are written; then other ways.
    rules: of config.json.
    values: our keys that are the same in the whole family.
    kept: fields of config.json that say nothing of the outputs -> why not.
    aliases: other names of fields, of other versions of transformers.
    beyond: there may be layers behind the model's, which are left out.
  """

  model_type: str
  architecture: str
  layouts: tuple[tuple[Tensor, ...], ...]
  rules: tuple[Rule, ...]
  values: Mapping[str, Any]
  kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
  beyond: bool = False
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


# --- rules --------------------------------------------------------------------


def same(
  field: str, key: str, default: Any = REQUIRED, null: bool = False
) -> Rule:
  """A field and a key that have the same values."""
  return Rule(
    {field: default},
    lambda theirs: {key: theirs[field]},
    lambda ours: {field: ours[key]},
    frozenset([field] if null else []),
  )


def must(field: str, *values: Any, default: Any = REQUIRED) -> Rule:
  """A field that can have these values alone; the first one is written."""
  default = values[0] if default is REQUIRED else default

  def check(theirs):
    if theirs[field] not in values:
      can = ' or '.join(repr(value) for value in values)
      raise ValueError(
        f'{field}={theirs[field]!r} is not supported, only {can}'
      )
    return {}

  return Rule({field: default}, check, lambda ours: {field: values[0]})


def _dtype(theirs):
  # Nothing here computes in float16; float32 has all its numbers. Where none is
  # said the files tell, see convert.py.
  dtype = theirs['dtype']
  return {'dtype': 'float32' if dtype in (None, 'float16') else dtype}


_SHAPE = (
  same('vocab_size', 'V'),
  same('hidden_size', 'D'),
  same('num_hidden_layers', 'N'),
  same('num_attention_heads', 'H'),
  same('rms_norm_eps', 'eps'),
  same('tie_word_embeddings', 'tied', False),
  Rule({'dtype': None}, _dtype, lambda ours: {'dtype': ours['dtype']}),
  must('hidden_act', 'silu'),
)
_CHOICE = same('num_experts_per_tok', 'router.k')


def _grouped(default_theta, heads=REQUIRED):
  """Rotary attention and its positions; `heads` of keys where none are said."""

  def extended(theirs):
    kind = _extended(theirs, 'yarn', 'llama3')
    if not kind:
      return {}
    _, _, amplitude = _TURNS[kind]
    return {
      **_stretch(theirs, kind),
      'attention.yarn_amplitude': theirs.get(amplitude, 1.0),
      'attention.yarn_by_turns': kind == 'llama3',
    }

  def back(ours):
    if not ours['attention.yarn_factor']:
      return {'rope.rope_type': 'default'}
    kind = 'llama3' if ours['attention.yarn_by_turns'] else 'yarn'
    fast, slow, amplitude = _TURNS[kind]
    found = {
      'rope.rope_type': kind,
      'rope.factor': ours['attention.yarn_factor'],
      fast: ours['attention.yarn_beta_fast'],
      slow: ours['attention.yarn_beta_slow'],
      'rope.original_max_position_embeddings': ours['attention.yarn_length'],
    }
    if amplitude:
      found[amplitude] = ours['attention.yarn_amplitude']
    return found

  return (
    same('num_key_value_heads', 'attention.num_kv_heads', heads, null=True),
    same('rope.rope_theta', 'attention.theta', default_theta),
    Rule({**_YARN, **_LLAMA3, 'rope.attention_factor': None}, extended, back),
  )


def _extended(theirs, *kinds):
  """Which of these kinds extends positions; '' if none does."""
  kind = theirs['rope.rope_type']
  if kind not in ('default', *kinds):
    can = ' or '.join(repr(known) for known in ('default', *kinds))
    raise ValueError(f'rope_type={kind!r} is not supported, only {can}')
  return '' if kind == 'default' else kind


def _stretch(theirs, kind):
  """By how much which pairs are slowed, as transformers 5 reads it."""
  full = theirs['max_position_embeddings']
  length = theirs['rope.original_max_position_embeddings'] or full
  factor, (fast, slow, _) = theirs['rope.factor'], _TURNS[kind]
  turns = {name: theirs[name] for name in (fast, slow)}
  if kind == 'yarn':
    if factor is None and full:
      factor = full / length
    turns = {name: turns[name] or _YARN_TURNS[name] for name in turns}
    if theirs['rope.truncate'] is not True:
      raise ValueError(
        f'rope.truncate={theirs["rope.truncate"]!r} is not supported, only True'
      )
  for name, value in {'rope.factor': factor, **turns}.items():
    if value is None:
      raise ValueError(f'{name} is missing, rope_type is {kind!r}')
    if not value > 0:
      raise ValueError(f'{name}={value!r} is not > 0')
  if turns[fast] <= turns[slow]:
    raise ValueError(
      f'{fast}={turns[fast]!r} is not more than {slow}={turns[slow]!r}'
    )
  if length is None:
    raise ValueError(
      'max_position_embeddings is missing, and so is'
      ' rope.original_max_position_embeddings'
    )
  return {
    'attention.yarn_factor': float(factor),
    'attention.yarn_beta_fast': float(turns[fast]),
    'attention.yarn_beta_slow': float(turns[slow]),
    'attention.yarn_length': length,
  }


# Of a kind: turns of pairs that are kept, of those slowed, and the amplitude.
_TURNS = {
  'yarn': ('rope.beta_fast', 'rope.beta_slow', 'rope.attention_factor'),
  'llama3': ('rope.high_freq_factor', 'rope.low_freq_factor', None),
}
_YARN_TURNS = {'rope.beta_fast': 32.0, 'rope.beta_slow': 1.0}
_LLAMA3 = {'rope.high_freq_factor': None, 'rope.low_freq_factor': None}


# `rope.` are the fields of rope_scaling or rope_parameters, see `_plain`.
_YARN = {
  'rope.rope_type': 'default',
  'rope.factor': None,
  'rope.beta_fast': None,
  'rope.beta_slow': None,
  'rope.original_max_position_embeddings': None,
  'rope.truncate': True,
  'max_position_embeddings': None,
}


def _latent():
  """Latent attention and its positions."""

  def yarn(theirs):
    if not _extended(theirs, 'yarn'):
      return {}
    mscale, all_dim = theirs['rope.mscale'], theirs['rope.mscale_all_dim']
    if bool(mscale) != bool(all_dim):
      raise ValueError(
        f'rope.mscale={mscale} and rope.mscale_all_dim={all_dim} are not'
        ' supported, only both or neither'
      )
    return {
      **_stretch(theirs, 'yarn'),
      'attention.yarn_mscale': float(mscale or 1),
      'attention.yarn_mscale_all_dim': float(all_dim or 0),
    }

  def back(ours):
    if not ours['attention.yarn_factor']:
      return {'rope.rope_type': 'default'}
    both = {
      'rope.mscale': ours['attention.yarn_mscale'],
      'rope.mscale_all_dim': ours['attention.yarn_mscale_all_dim'],
    }
    return {
      'rope.rope_type': 'yarn',
      'rope.factor': ours['attention.yarn_factor'],
      'rope.beta_fast': ours['attention.yarn_beta_fast'],
      'rope.beta_slow': ours['attention.yarn_beta_slow'],
      **(both if both['rope.mscale_all_dim'] else {}),
      'rope.original_max_position_embeddings': ours['attention.yarn_length'],
    }

  def one_head_each(theirs):
    H, J = theirs['num_attention_heads'], theirs['num_key_value_heads']
    if J not in (None, H):
      raise ValueError(
        f'num_key_value_heads={J} is not supported, only that of'
        f' num_attention_heads={H}'
      )
    return {}

  return (
    same('qk_nope_head_dim', 'attention.nope'),
    same('qk_rope_head_dim', 'attention.rope'),
    same('v_head_dim', 'attention.value'),
    same('kv_lora_rank', 'attention.rank'),
    same('q_lora_rank', 'attention.query_rank', null=True),
    same('rope.rope_theta', 'attention.theta', 10_000.0),
    must('attention_bias', False),
    Rule(
      {'num_key_value_heads': None, 'num_attention_heads': REQUIRED},
      one_head_each,
      lambda ours: {'num_key_value_heads': ours['H']},
    ),
    Rule(
      {**_YARN, 'rope.mscale': None, 'rope.mscale_all_dim': None}, yarn, back
    ),
  )


def _deepseek():
  """Leading dense layers, shared experts, sizes."""
  return (
    same('intermediate_size', 'F'),
    same('moe_intermediate_size', 'expert_F'),
    same('n_routed_experts', 'E'),
    same('first_k_dense_replace', 'first_dense'),
    same('routed_scaling_factor', 'router.scale'),
    must('moe_layer_freq', 1),
    Rule(
      {'n_shared_experts': REQUIRED, 'moe_intermediate_size': REQUIRED},
      lambda theirs: {
        'shared_F': (theirs['n_shared_experts'] or 0)
        * theirs['moe_intermediate_size']
      },
      # As many as are of an expert's size; else the round trip tells.
      lambda ours: {'n_shared_experts': ours['shared_F'] // ours['expert_F']},
      frozenset({'n_shared_experts'}),
    ),
  )


def _groups_v2(theirs):
  if theirs['topk_method'] == 'greedy':
    return {}
  if theirs['topk_method'] != 'group_limited_greedy':
    raise ValueError(
      f'topk_method={theirs["topk_method"]!r} is not supported, only'
      " 'greedy' or 'group_limited_greedy'"
    )
  return {
    'router.expert_groups': theirs['n_group'],
    'router.groups_kept': theirs['topk_group'],
  }


def _groups_v2_back(ours):
  kept, of = ours['router.groups_kept'], ours['router.expert_groups']
  return {
    'topk_method': 'greedy' if kept == of else 'group_limited_greedy',
    'n_group': of,
    'topk_group': kept,
  }


def _which_are_dense(theirs):
  """Qwen3-MoE: every so many layers, but for those that are listed."""
  N, every = theirs['num_hidden_layers'], theirs['decoder_sparse_step']
  listed = theirs['mlp_only_layers'] or []
  kinds = ''.join(
    'd' if i in listed or (i + 1) % every else 'm' for i in range(N)
  )
  for period in range(1, N + 1):
    for first in range(N - period + 1):
      pattern = kinds[first : first + period]
      cut = pattern[: (N - first) % period]  # is not of dense layers alone
      one = pattern.count('m') == 1 and (not cut or 'm' in cut)
      same_again = pattern * ((N - first) // period) + cut == kinds[first:]
      if one and same_again and 'm' not in kinds[:first]:
        return {'pattern': pattern, 'first_dense': first}
  raise ValueError(
    f'mlp_only_layers={listed} with decoder_sparse_step={every} is no pattern'
    f' that repeats with one MoE layer in it: {kinds}'
  )


def _which_are_dense_back(ours):
  first, pattern, N = ours['first_dense'], ours['pattern'], ours['N']
  kinds = ('d' * first + pattern * N)[:N]
  listed = [i for i, kind in enumerate(kinds) if kind == 'd']
  return {'decoder_sparse_step': 1, 'mlp_only_layers': listed}


def _layer_windows(theirs):
  """Qwen3: the same for all layers."""
  N, listed = theirs['num_hidden_layers'], theirs['layer_types']
  if not theirs['use_sliding_window']:
    listed = listed or ['full_attention'] * N
  elif listed is None:
    full = min(theirs['max_window_layers'], N)
    listed = ['full_attention'] * full + ['sliding_attention'] * (N - full)
  kinds = set(listed)
  if kinds == {'full_attention'}:
    return {'attention.window': None}
  if kinds == {'sliding_attention'} and theirs['use_sliding_window']:
    return {'attention.window': theirs['sliding_window']}
  raise ValueError(
    f'layer_types={listed} with use_sliding_window='
    f'{theirs["use_sliding_window"]} is not supported, only the same for all'
  )


def _layer_windows_back(ours):
  window, N = ours['attention.window'], ours['N']
  kind = 'full_attention' if window is None else 'sliding_attention'
  return {
    **_window_back(ours),
    'max_window_layers': N if window is None else 0,
    'layer_types': [kind] * N,
  }


def _window(theirs):
  used = theirs['use_sliding_window']
  return {'attention.window': theirs['sliding_window'] if used else None}


def _window_back(ours):
  window = ours['attention.window']
  return {'use_sliding_window': window is not None, 'sliding_window': window}


def ours(theirs: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
  """The family of a config.json, and our keys that it sets.

  Raises:
    ValueError: one line; an unknown family, or a field that is missing,
      unknown or has a value that we cannot follow.
  """
  family = FAMILIES.get(theirs.get('model_type'))
  if family is None:
    raise ValueError(
      f'model_type={theirs.get("model_type")!r} is not supported; there are'
      f' {", ".join(FAMILIES)}'
    )
  fields = _plain(theirs, family)
  known = {*family.kept, *(n for rule in family.rules for n in rule.fields)}
  for name, value in fields.items():
    if name not in known and value is not None:
      raise ValueError(f'{name}={value!r} is not supported')
  keys = dict(family.values)
  for rule in family.rules:
    given = {
      name: fields.get(name) if name in fields else default
      for name, default in rule.fields.items()
    }
    for name, value in given.items():
      if value is REQUIRED:
        raise ValueError(f'{name} is missing')
      if value is None and not (rule.fields[name] is None or name in rule.null):
        raise ValueError(f'{name}=None is not supported')
    keys |= rule.from_hf(given)
  return family, keys


def theirs(family: Family, keys: Mapping[str, Any]) -> dict[str, Any]:
  """A config.json of the family, as transformers 4 and 5 read it."""
  found = {
    'architectures': [family.architecture],
    'model_type': family.model_type,
  }
  for rule in family.rules:
    found |= rule.to_hf(keys)
  rope = {
    name: found.pop(f'rope.{name}')
    for name in [n.removeprefix('rope.') for n in found if n[:5] == 'rope.']
  }
  found['rope_theta'] = rope.pop('rope_theta')
  scaled = rope['rope_type'] != 'default'
  found['rope_scaling'] = rope if scaled else None
  found['torch_dtype'] = found.pop('dtype')
  return found


def _plain(theirs, family):
  """Fields by the names that rules know, of transformers 4 or 5.

  Of rope_scaling and rope_parameters transformers 5 reads the first that says
  anything, and rope_theta beside them where that has none.
  """
  fields = dict(theirs)
  scaling, given = (
    fields.pop(name, None) for name in ('rope_scaling', 'rope_parameters')
  )
  rope = dict(scaling or given or {})
  if 'rope_theta' in fields:
    rope.setdefault('rope_theta', fields['rope_theta'])
    del fields['rope_theta']
  rope.setdefault('rope_type', rope.get('type', 'default'))
  rope.pop('type', None)
  fields |= {f'rope.{k}': v for k, v in rope.items()}
  for other, name in {**family.aliases, 'torch_dtype': 'dtype'}.items():
    value = fields.pop(other, None)
    if value is None:
      continue
    if fields.get(name) not in (None, value):
      raise ValueError(
        f'{other}={value!r} and {name}={fields[name]!r} are not the same'
      )
    fields[name] = value
  return fields


# --- tensors ------------------------------------------------------------------


def _layer(name, axes, *leaves, wide=False):
  return Tensor(f'model.layers.{{layer}}.{name}', axes, leaves, wide)


_ENDS = (
  Tensor('model.embed_tokens.weight', 'V D', ('embed_VxD',)),
  _layer('input_layernorm.weight', 'D', 'norm_attention.scale_D'),
  _layer('post_attention_layernorm.weight', 'D', 'norm_feed.scale_D'),
  Tensor('model.norm.weight', 'D', ('norm.scale_D',)),
  Tensor('lm_head.weight', 'V D', ('head_DxV',)),
)
_ROTARY = (
  _layer('self_attn.q_proj.weight', 'HS D', 'attention.query_DxHxS'),
  _layer('self_attn.k_proj.weight', 'JS D', 'attention.key_DxJxS'),
  _layer('self_attn.v_proj.weight', 'JS D', 'attention.value_DxJxS'),
  _layer('self_attn.o_proj.weight', 'D HS', 'attention.out_HxSxD'),
  _layer('self_attn.q_proj.bias', 'HS', 'attention.bias_query_HxS'),
  _layer('self_attn.k_proj.bias', 'JS', 'attention.bias_key_JxS'),
  _layer('self_attn.v_proj.bias', 'JS', 'attention.bias_value_JxS'),
  _layer('self_attn.o_proj.bias', 'D', 'attention.bias_out_D'),
  _layer('self_attn.q_norm.weight', 'D', 'attention.norm_query.scale_D'),
  _layer('self_attn.k_norm.weight', 'D', 'attention.norm_key.scale_D'),
)
_LATENT = (
  _layer('self_attn.q_proj.weight', 'HS D', 'attention.query_DxHxS'),
  _layer('self_attn.q_a_proj.weight', 'Y D', 'attention.query_DxY'),
  _layer('self_attn.q_a_layernorm.weight', 'D', 'attention.norm_query.scale_D'),
  _layer('self_attn.q_b_proj.weight', 'HS Y', 'attention.query_YxHxS'),
  _layer(
    'self_attn.kv_a_proj_with_mqa.weight', '+ D',
    'attention.latent_DxZ', 'attention.key_DxP',
  ),
  _layer(
    'self_attn.kv_a_layernorm.weight', 'D', 'attention.norm_latent.scale_D'
  ),
  _layer(
    'self_attn.kv_b_proj.weight', 'H+ Z',
    'attention.key_ZxHxW', 'attention.value_ZxHxU',
  ),
  _layer('self_attn.o_proj.weight', 'D HU', 'attention.out_HxUxD'),
)  # fmt: skip


def _feed(theirs, ours):
  """A dense feed-forward."""
  return (
    _layer(f'{theirs}.gate_proj.weight', 'F D', f'{ours}.one.gate_ExDxF'),
    _layer(f'{theirs}.up_proj.weight', 'F D', f'{ours}.one.up_ExDxF'),
    _layer(f'{theirs}.down_proj.weight', 'D F', f'{ours}.one.down_ExFxD'),
  )


def _experts(moe, gate, up, down):
  """The router and its experts, a tensor each."""
  each = f'{moe}.experts.{{expert}}'
  return (
    _layer(f'{moe}.gate.weight', 'E D', 'feed.routers.w_DxE'),
    _layer(f'{each}.{gate}.weight', 'F D', 'pools.gate_ExDxF'),
    _layer(f'{each}.{up}.weight', 'F D', 'pools.up_ExDxF'),
    _layer(f'{each}.{down}.weight', 'D F', 'pools.down_ExFxD'),
  )


# As transformers 5 has them in memory.
_FUSED = (
  _layer('mlp.gate.weight', 'E D', 'feed.routers.w_DxE'),
  _layer(
    'mlp.experts.gate_up_proj', 'E + D', 'pools.gate_ExDxF', 'pools.up_ExDxF'
  ),
  _layer('mlp.experts.down_proj', 'E D F', 'pools.down_ExFxD'),
)
_SPLIT = _experts('mlp', 'gate_proj', 'up_proj', 'down_proj')
_BIAS = _layer(
  'mlp.gate.e_score_correction_bias', 'E', 'feed.routers.bias_E', wide=True
)
_DEEPSEEK = (
  *_ENDS,
  *_LATENT,
  *_feed('mlp', 'feed'),
  *_feed('mlp.shared_experts', 'feed.shared'),
  _BIAS,
)


def _layouts(common, split=_SPLIT):
  return (*common, *split), (*common, *_FUSED)


# --- families -----------------------------------------------------------------

_KEPT = {
  name: why
  for why, names in {
    'tells who made the file': 'architectures model_type transformers_version'
    ' _name_or_path auto_map',
    'is of training alone': 'initializer_range attention_dropout'
    ' router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux',
    'is what is answered beside the logits': 'use_cache output_router_logits'
    ' output_attentions output_hidden_states return_dict',
    'cuts the same sums in other parts': 'ep_size pretraining_tp'
    ' chunk_size_feed_forward',
    'is of writing and of padding': 'bos_token_id eos_token_id pad_token_id',
    'is of other heads than that of a language model': 'id2label label2id'
    ' problem_type is_encoder_decoder',
    'is no limit; stretched positions read it': 'max_position_embeddings',
    'is read by the rule of windows': 'max_window_layers',
  }.items()
  for name in names.split()
}
_WIDTHS = dict.fromkeys(
  ('head_dim', 'qk_head_dim'), 'is made of qk_nope_head_dim, qk_rope_head_dim'
)
_TOPK = {'router.name': 'topk', 'router.score': 'softmax'}
# Of a model without experts; its router is the default one, which nobody asks.
_DENSE = {'pattern': 'd', 'router.name': 'topk', 'attention.name': 'gqa'}
_QWEN3 = (
  same('attention_bias', 'attention.bias', False),
  same('intermediate_size', 'F'),
  same('rms_norm_eps', 'attention.eps'),
)

FAMILIES = {
  family.model_type: family
  for family in (
    Family(
      'llama',
      'LlamaForCausalLM',
      ((*_ENDS, *_ROTARY, *_feed('mlp', 'feed')),),
      (
        *_SHAPE,
        *_grouped(10_000.0, heads=None),
        same('head_dim', 'attention.size', None),
        same('attention_bias', 'attention.bias', False),
        same('intermediate_size', 'F'),
        must('mlp_bias', False),
      ),
      _DENSE,
      _KEPT,
    ),
    Family(
      'qwen3',
      'Qwen3ForCausalLM',
      ((*_ENDS, *_ROTARY, *_feed('mlp', 'feed')),),
      (
        *_SHAPE,
        *_grouped(10_000.0),
        *_QWEN3,
        same('head_dim', 'attention.size', 128),
        Rule(
          {
            'num_hidden_layers': REQUIRED,
            'use_sliding_window': False,
            'sliding_window': 4096,
            'max_window_layers': 28,
            'layer_types': None,
          },
          _layer_windows,
          _layer_windows_back,
          frozenset({'sliding_window'}),
        ),
      ),
      {**_DENSE, 'attention.qk_norm': 'head'},
      _KEPT,
    ),
    Family(
      'mixtral',
      'MixtralForCausalLM',
      _layouts(
        (*_ENDS, *_ROTARY), _experts('block_sparse_moe', 'w1', 'w3', 'w2')
      ),
      (
        *_SHAPE,
        _CHOICE,
        *_grouped(1e6),
        same('head_dim', 'attention.size', None),
        same('sliding_window', 'attention.window', None),
        same('intermediate_size', 'expert_F'),
        same('num_local_experts', 'E'),
      ),
      {**_TOPK, 'attention.name': 'gqa'},
      _KEPT,
      aliases={'num_experts': 'num_local_experts'},
    ),
    Family(
      'olmoe',
      'OlmoeForCausalLM',
      _layouts((*_ENDS, *_ROTARY)),
      (
        *_SHAPE,
        _CHOICE,
        *_grouped(10_000.0, heads=None),
        same('attention_bias', 'attention.bias', False),
        same('intermediate_size', 'expert_F'),
        same('num_experts', 'E'),
        same('norm_topk_prob', 'router.renormalise'),
        same('rms_norm_eps', 'attention.eps'),
        must('clip_qkv', None),
      ),
      {**_TOPK, 'attention.name': 'gqa', 'attention.qk_norm': 'all'},
      _KEPT,
      aliases={'num_local_experts': 'num_experts'},
    ),
    Family(
      'qwen3_moe',
      'Qwen3MoeForCausalLM',
      _layouts((*_ENDS, *_ROTARY, *_feed('mlp', 'feed'))),
      (
        *_SHAPE,
        _CHOICE,
        *_grouped(10_000.0),
        *_QWEN3,
        same('head_dim', 'attention.size', None),
        same('moe_intermediate_size', 'expert_F'),
        same('num_experts', 'E'),
        same('norm_topk_prob', 'router.renormalise'),
        Rule(
          {'use_sliding_window': False, 'sliding_window': 4096},
          _window,
          _window_back,
          frozenset({'sliding_window'}),
        ),
        Rule(
          {
            'num_hidden_layers': REQUIRED,
            'decoder_sparse_step': 1,
            'mlp_only_layers': None,
          },
          _which_are_dense,
          _which_are_dense_back,
        ),
      ),
      {**_TOPK, 'attention.name': 'gqa', 'attention.qk_norm': 'head'},
      _KEPT,
      aliases={'num_local_experts': 'num_experts'},
    ),
    Family(
      'deepseek_v2',
      'DeepseekV2ForCausalLM',
      _layouts(_DEEPSEEK),
      (
        *_SHAPE,
        _CHOICE,
        *_latent(),
        *_deepseek(),
        Rule(
          {'topk_method': 'greedy', 'n_group': None, 'topk_group': None},
          _groups_v2,
          _groups_v2_back,
        ),
        must('norm_topk_prob', False),
        must('scoring_func', 'softmax'),
        must('mlp_bias', False),
      ),
      {**_TOPK, 'attention.name': 'mla', 'router.renormalise': False},
      _KEPT | _WIDTHS,
      aliases={
        'num_local_experts': 'n_routed_experts',
        'num_experts': 'n_routed_experts',
      },
    ),
    Family(
      'deepseek_v3',
      'DeepseekV3ForCausalLM',
      _layouts(_DEEPSEEK),
      (
        *_SHAPE,
        _CHOICE,
        *_latent(),
        *_deepseek(),
        same('n_group', 'router.expert_groups'),
        same('topk_group', 'router.groups_kept'),
        same('norm_topk_prob', 'router.renormalise'),
        same('rope_interleave', 'attention.interleaved', True),
        must('topk_method', 'noaux_tc'),
        Rule(  # layers of multi-token prediction are left out
          {'num_nextn_predict_layers': 0},
          lambda theirs: {},
          lambda ours: {'num_nextn_predict_layers': 0},
        ),
        must('scoring_func', 'sigmoid'),
      ),
      {
        'attention.name': 'mla',
        'router.name': 'topk',
        'router.score': 'sigmoid',
        'router.group_best': 2,
        'router.bias_rate': 0.001,  # as DeepSeek-V3 was trained
      },
      _KEPT | _WIDTHS,
      beyond=True,  # of multi-token prediction
      aliases={
        'num_local_experts': 'n_routed_experts',
        'num_mtp_layers': 'num_nextn_predict_layers',
      },
    ),
  )
}
