"""Imported weights against transformers' own models; extra `torch`.

The table of README.md is `python -m experiments.checks.parity`.
"""

import copy
import dataclasses
import functools
import importlib
import json

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import save_file

from moe_jax import attention, config, init, parallel
from moe_jax.data import tokenizer
from moe_jax.training import saved_run
from moe_jax.weights import convert, families

missing = "torch and transformers are not installed: pip install -e '.[torch]'"
torch = pytest.importorskip('torch', reason=missing)
transformers = pytest.importorskip('transformers', reason=missing)

cases = importlib.import_module('experiments.checks.parity.cases')


@functools.cache
def _made(name, place):
  return cases.make(name, place), place


@pytest.fixture(scope='module')
def case(request, tmp_path_factory):
  """A model of transformers, its folder and the work directory made of it."""
  place = tmp_path_factory.getbasetemp() / request.param
  return _made(request.param, place)


all_cases = pytest.mark.parametrize(
  'case', cases.CASES, indirect=True, scope='module'
)
routed = pytest.mark.parametrize(
  'case', cases.ROUTED, indirect=True, scope='module'
)


@all_cases
def test_it_is_the_model_of_transformers(case):
  model, folder = case
  found = cases.compare(model, folder)
  assert found.logits < 1e-5
  assert found.choices == found.chosen
  assert bool(found.chosen) == (folder.name in cases.ROUTED)
  assert found.same == found.tokens == 2 * cases.NEW
  assert found.bits == found.tensors
  assert found.opened == 0
  assert len(list((folder / 'again').glob('*.safetensors'))) > 1
  own, opened = (
    model.config,
    type(model.config).from_pretrained(folder / 'again'),
  )
  for key in ('eos_token_id', 'max_position_embeddings', 'hidden_act'):
    assert getattr(own, key) == getattr(opened, key)


@routed
def test_fused_tensors_are_read_too(case, tmp_path):
  """As transformers 5 has them in memory."""
  model, folder = case
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  assert any('gate_up_proj' in name for name in state)
  if model.config.tie_word_embeddings:
    del state['lm_head.weight']
  save_file(state, tmp_path / 'model.safetensors')
  text = (folder / 'published' / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text)
  family, keys, _ = convert.read_config(tmp_path)
  c, _ = convert.model_config(keys)
  mesh = parallel.mesh({'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 2})
  cut, _ = convert.load(tmp_path, family, c, mesh)
  job = saved_run.load(str(folder / 'run'))
  whole = saved_run.restore(job, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((cut.params, cut.router_state)),
    jax.device_get((whole.params, whole.router_state)),
  )


@all_cases
def test_a_cut_import_is_the_same_bits_on_a_mesh(case):
  """Each device reads its slices, of split experts too."""
  _, folder = case
  family, keys, _ = convert.read_config(folder / 'published')
  c, _ = convert.model_config(keys)
  job = saved_run.load(str(folder / 'run'))
  whole = jax.device_get(saved_run.restore(job, 0))
  for sizes in ((1, 2, 2, 2), (2, 4, 1, 1)):
    mesh = parallel.mesh(dict(zip(parallel.AXES, sizes, strict=True)))
    cut, _ = convert.load(folder / 'published', family, c, mesh)
    jax.tree.map(
      np.testing.assert_array_equal,
      (whole.params, whole.router_state),
      jax.device_get((cut.params, cut.router_state)),
    )
    trunk = cut.params['trunk']
    if folder.name in cases.ROUTED:
      gate = trunk['body']['pools']['gate_ExDxF']
    else:
      gate = trunk['first']['feed']['one']['gate_ExDxF']
    assert not gate.sharding.is_fully_replicated


# config.json, against the classes that read it there.

KINDS = {
  'llama': 'Llama',
  'qwen3': 'Qwen3',
  'mixtral': 'Mixtral',
  'olmoe': 'Olmoe',
  'qwen3_moe': 'Qwen3Moe',
  'deepseek_v2': 'DeepseekV2',
  'deepseek_v3': 'DeepseekV3',
}
every_family = pytest.mark.parametrize('family', families.FAMILIES)


def _settings(family):
  """The class of a family's config, and all fields of a small one."""
  kind = getattr(transformers, f'{KINDS[family]}Config')
  options = next(o for k, o in cases.CASES.values() if k == KINDS[family])
  made = kind(**{**cases.SMALL, **options})
  return kind, json.loads(made.to_json_string(use_diff=False))


def _there(kind, values):
  """The fields as transformers completes them; None if it refuses them."""
  try:
    made = kind.from_dict(copy.deepcopy(values))
  except Exception:  # of many kinds
    return None
  return json.loads(made.to_json_string(use_diff=False))


def _meant(values):
  """What a config.json means to us; None if we refuse it."""
  try:
    c, V = convert.model_config(families.ours(values)[1])
  except ValueError:
    return None
  return convert._meaning({**config.flat(c['model']), 'V': V})


@every_family
def test_every_field_of_theirs_is_on_a_list(family):
  kind, values = _settings(family)
  own = families.FAMILIES[family]
  known = {*own.kept, *own.aliases, 'model_type', 'torch_dtype'}
  known |= {name for rule in own.rules for name in rule.fields}
  known |= {'rope_parameters'}  # whose fields are `rope.`
  theirs = {field.name for field in dataclasses.fields(kind)} | {*values}
  theirs |= {*kind.attribute_map}
  assert not theirs - known
  assert all(own.kept.values())


@every_family
def test_a_field_that_is_left_out_or_null_is_refused_or_means_the_same(family):
  kind, values = _settings(family)
  assert _meant(values) == _meant(_there(kind, values)) is not None
  compared = 0
  for name in values.keys() - {'model_type'}:
    for changes in ({}, {name: None}):
      few = {k: v for k, v in values.items() if k != name} | changes
      found, there = _meant(few), _there(kind, few)
      if found and there:
        # A default that we cannot follow is that of a model of another size.
        assert found == (_meant(there) or found), (name, changes)
        compared += 1
  assert compared > 20


YARN = {
  'rope_type': 'yarn',
  'factor': 2.0,
  'beta_fast': 4,
  'beta_slow': 1,
}
LENGTH = 'original_max_position_embeddings'
LLAMA3 = {k: v for k, v in cases.LLAMA3.items() if k != LENGTH}
PLAIN = {'rope_type': 'default', 'rope_theta': 7.0}
SCALED = [
  {},
  {'rope_scaling': YARN},
  {'rope_scaling': {**YARN, 'factor': None, LENGTH: 16}},
  {'rope_scaling': {'type': 'yarn', 'factor': 0.5, 'beta_fast': None}},
  # All pairs turn less than once, or more than four times.
  {'rope_scaling': {**YARN, LENGTH: 2}, 'rope_theta': 3.0},
  {'rope_scaling': YARN, 'rope_theta': 1.3},
  {'rope_scaling': YARN, 'rope_parameters': PLAIN},
  {'rope_scaling': {}, 'rope_parameters': PLAIN, 'rope_theta': 9.0},
  {'rope_scaling': {**YARN, 'rope_theta': 11.0}, 'rope_theta': 9.0},
  {'rope_scaling': LLAMA3},
  {'rope_parameters': {**cases.LLAMA3, 'rope_theta': 50.0}},
  {'rope_scaling': {**YARN, 'mscale': 0.7, 'mscale_all_dim': 0.5}},
  {'rope_scaling': {**YARN, 'attention_factor': 1.3}},
  {'rope_scaling': {**YARN, 'truncate': False}},
  {'rope_scaling': {'type': 'linear', 'factor': 2.0}},
]


@every_family
def test_positions_turn_as_there(family):
  """Their frequencies and amplitude, or a refusal."""
  kind, values = _settings(family)
  del values['rope_parameters']
  if values.get('head_dim', 4) is None:
    values['head_dim'] = 4  # else Mixtral has no YaRN there
  compared = 0
  for changes in SCALED:
    given = {**values, **copy.deepcopy(changes)}
    try:
      _, keys = families.ours(given)
    except ValueError:
      continue
    there = _rotary(kind.from_dict(copy.deepcopy(given)))
    found = _attention(keys)
    np.testing.assert_allclose(found.frequency_P, there.inv_freq, 1e-6)
    assert found.amplitude == pytest.approx(there.attention_scaling)
    compared += 1
  assert compared >= 10


def _attention(keys):
  """Of a model of these keys, as shapes."""
  of = dict(convert.model_config(keys)[0]['model']['attention'])
  kind = attention.get(of.pop('name'))
  make = lambda: kind(
    keys['D'], keys['H'], scheme=init.get('lecun'), rngs=nnx.Rngs(0), **of
  )
  return nnx.eval_shape(make)


def _rotary(settings):
  name = settings.model_type
  module = importlib.import_module(
    f'transformers.models.{name}.modeling_{name}'
  )
  return getattr(module, f'{KINDS[name]}RotaryEmbedding')(settings)


def test_a_folder_that_contradicts_itself_is_read_as_there(tmp_path):
  """A head of its own though tied, an old index, no length, no dtype."""
  folder = tmp_path / 'published'
  options = dict(intermediate_size=24, num_key_value_heads=2)
  settings = transformers.LlamaConfig(
    **{**cases.SMALL, **options}, tie_word_embeddings=False
  )
  model = transformers.LlamaForCausalLM(settings)
  with torch.no_grad():
    for name, a in model.named_parameters():
      a.copy_(0.3 * torch.randn(a.shape) + ('norm' in name))
  model.save_pretrained(folder)
  index = {'metadata': {}, 'weight_map': {'lm_head.weight': 'gone.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  values = json.loads((folder / 'config.json').read_text())
  del values['rope_parameters'], values['dtype']
  values |= {'tie_word_embeddings': True, 'rope_scaling': LLAMA3}
  (folder / 'config.json').write_text(json.dumps(values))
  convert.take(str(folder), str(tmp_path / 'run'))
  own, _ = cases.ours(tmp_path / 'run')
  opened = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  logits, _ = cases.theirs(opened)
  assert np.abs(own - logits).max() < 1e-5 * np.abs(logits).max()


# Tokenizers.


def _sentence_piece(before):
  """A tokenizer with marks of a chat; `before` says how a first space comes."""
  words = ['the capital of France', 'hello  world', 'user\n'] * 20
  special = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True)
  )
  if before == 'normalizer':
    made.normalizer = tokenizers.normalizers.Sequence(
      [
        tokenizers.normalizers.Prepend('\u2581'),
        tokenizers.normalizers.Replace(' ', '\u2581'),
      ]
    )
  else:
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
      prepend_scheme=before, split=False
    )
  of = tokenizers.decoders
  made.decoder = of.Sequence(
    [
      of.Replace('\u2581', ' '),
      of.ByteFallback(),
      of.Fuse(),
      of.Strip(' ', 1, 0),
    ]
  )
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320, special_tokens=special, show_progress=False
  )
  made.train_from_iterator(words, trainer)
  content = json.loads(made.to_str())
  content['added_tokens'] = content['added_tokens'][:3]  # no bytes
  made = tokenizers.Tokenizer.from_str(json.dumps(content))
  made.add_special_tokens(['<|im_start|>'])
  made.add_tokens(['<tool>'])
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 1)]
  )
  return made


@pytest.mark.parametrize('before', ['normalizer', 'first', 'always', 'never'])
def test_prompts_are_read_and_told_as_there(before, tmp_path):
  """First spaces, marks of a chat, whatever class the folder names."""
  made = _sentence_piece(before)
  names = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
  for family in ('llama', 'mixtral', 'olmoe'):
    for settings in (
      {'tokenizer_class': 'PreTrainedTokenizerFast'},
      {'tokenizer_class': 'LlamaTokenizer'},
      {'tokenizer_class': 'LlamaTokenizerFast', 'legacy': True},
      {'tokenizer_class': 'LlamaTokenizer', 'add_prefix_space': False},
    ):
      made.save(str(tmp_path / 'tokenizer.json'))
      for name, values in (
        ('config.json', {'model_type': family}),
        ('tokenizer_config.json', {**names, **settings}),
      ):
        (tmp_path / name).write_text(json.dumps(values))
      text, separator = tokenizer.published(
        tmp_path / 'tokenizer.json', settings, family, [2]
      )
      (tmp_path / 'own.json').write_text(text)
      own = tokenizer.load(tmp_path / 'own.json', separator)
      theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
      for prompt in (
        'the capital', ' hello', '<|im_start|>user\n', 'a <tool> b', '',
        'hello <|im_start|> world',
      ):  # fmt: skip
        ids = own.prompt(prompt)
        assert ids == theirs(prompt).input_ids, (family, settings, prompt)
        assert own.decode(ids) == theirs.decode(ids)
