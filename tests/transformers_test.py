"""Imported weights against transformers' own models; extra `torch`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import convert, generate, models, parallel, routers, routing

missing = 'transformers and torch are not installed: pip install moe_jax[torch]'
torch = pytest.importorskip('torch', reason=missing)
transformers = pytest.importorskip('transformers', reason=missing)
safetensors = pytest.importorskip('safetensors.numpy')

V, B, L = 48, 2, 24
SMALL = dict(
  vocab_size=V,
  hidden_size=16,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=64,
  pad_token_id=None,
  bos_token_id=0,
  eos_token_id=1,
)
YARN = {
  'type': 'yarn',
  'factor': 4.0,
  'beta_fast': 4,
  'beta_slow': 1,
  'original_max_position_embeddings': 16,
}
QWEN3 = dict(intermediate_size=24, moe_intermediate_size=8, head_dim=8)
LATENT = dict(
  intermediate_size=24,
  moe_intermediate_size=8,
  kv_lora_rank=6,
  q_lora_rank=10,
  qk_nope_head_dim=4,
  qk_rope_head_dim=8,
  v_head_dim=6,
  num_experts_per_tok=2,
  first_k_dense_replace=1,
  num_key_value_heads=4,
)
CASES = {
  'mixtral-plain': (
    'Mixtral',
    dict(intermediate_size=24, num_key_value_heads=2),
  ),
  'mixtral-window': (
    'Mixtral',
    dict(
      intermediate_size=20,
      num_key_value_heads=1,
      num_local_experts=5,
      num_experts_per_tok=3,
      sliding_window=7,
      head_dim=6,
      rope_theta=500.0,
    ),
  ),
  'mixtral-tied': (
    'Mixtral',
    dict(
      intermediate_size=12,
      num_key_value_heads=4,
      num_local_experts=3,
      num_experts_per_tok=1,
      tie_word_embeddings=True,
      head_dim=4,
      rope_scaling=YARN,
    ),
  ),
  'olmoe-plain': (
    'Olmoe',
    dict(intermediate_size=12, num_experts=6, num_experts_per_tok=3),
  ),
  'olmoe-normed': (
    'Olmoe',
    dict(
      intermediate_size=12,
      num_experts=4,
      num_experts_per_tok=2,
      num_key_value_heads=2,
      norm_topk_prob=True,
      rms_norm_eps=0.01,
    ),
  ),
  'olmoe-bias': (
    'Olmoe',
    dict(
      intermediate_size=8,
      num_experts=8,
      num_experts_per_tok=8,
      attention_bias=True,
      num_hidden_layers=3,
    ),
  ),
  'qwen3-plain': (
    'Qwen3Moe',
    dict(num_experts=8, num_experts_per_tok=3, num_key_value_heads=2, **QWEN3),
  ),
  'qwen3-dense': (
    'Qwen3Moe',
    dict(
      num_experts=4,
      num_experts_per_tok=2,
      num_key_value_heads=1,
      norm_topk_prob=True,
      num_hidden_layers=5,
      mlp_only_layers=[0],
      decoder_sparse_step=2,
      rope_scaling={**YARN, 'attention_factor': 1.3},
      **QWEN3,
    ),
  ),
  'qwen3-window': (
    'Qwen3Moe',
    dict(
      num_experts=6,
      num_experts_per_tok=2,
      num_key_value_heads=4,
      use_sliding_window=True,
      sliding_window=5,
      attention_bias=True,
      **QWEN3,
    ),
  ),
  'deepseek2-greedy': (
    'DeepseekV2',
    dict(
      n_routed_experts=6, n_shared_experts=2, **{**LATENT, 'q_lora_rank': None}
    ),
  ),
  'deepseek2-groups': (
    'DeepseekV2',
    dict(
      n_routed_experts=8,
      n_shared_experts=1,
      topk_method='group_limited_greedy',
      n_group=4,
      topk_group=2,
      routed_scaling_factor=3.0,
      **{**LATENT, 'num_experts_per_tok': 3},
    ),
  ),
  'deepseek2-yarn': (
    'DeepseekV2',
    dict(
      n_routed_experts=4,
      n_shared_experts=1,
      rope_scaling={**YARN, 'mscale': 0.7, 'mscale_all_dim': 0.5},
      **{**LATENT, 'first_k_dense_replace': 0},
    ),
  ),
  'deepseek3-groups': (
    'DeepseekV3',
    dict(
      n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, **LATENT
    ),
  ),
  'deepseek3-yarn': (
    'DeepseekV3',
    dict(
      n_routed_experts=6,
      n_shared_experts=2,
      n_group=2,
      topk_group=1,
      num_hidden_layers=3,
      norm_topk_prob=False,
      rope_scaling={**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
      **LATENT,
    ),
  ),
  'deepseek3-halves': (
    'DeepseekV3',
    dict(
      n_routed_experts=4,
      n_shared_experts=1,
      n_group=1,
      topk_group=1,
      rope_interleave=False,
      routed_scaling_factor=1.0,
      tie_word_embeddings=True,
      **{**LATENT, 'q_lora_rank': None},
    ),
  ),
}


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """A model of transformers, its folder and the work directory made of it."""
  kind, options = CASES[request.param]
  settings = getattr(transformers, f'{kind}Config')(**{**SMALL, **options})
  torch.manual_seed(len(request.param))
  model = getattr(transformers, f'{kind}ForCausalLM')(settings).eval()
  with torch.no_grad():
    for name, a in (*model.named_parameters(), *model.named_buffers()):
      if 'inv_freq' not in name:
        a.copy_(0.3 * torch.randn(a.shape) + ('norm' in name))
  folder = tmp_path_factory.mktemp(request.param)
  model.save_pretrained(folder / 'published')
  convert.take(str(folder / 'published'), str(folder / 'run'))
  return model, folder


def ids():
  return np.random.default_rng(0).integers(0, V, (B, L))


def ours(workdir):
  """logits_BxLxV and the experts of each MoE layer, [T, K], in float32."""
  job = routing.load(str(workdir))
  state = routing.restore(job, 0)
  model = models.bind(job.model, state.params, state.router_state)
  zero = np.zeros((B, L), np.int32)
  batch = {
    'ids_BxL': ids().astype(np.int32),
    'segment_BxL': zero,
    'pos_BxL': zero + np.arange(L, dtype=np.int32),
    'row_B': np.arange(B, dtype=np.int32),
  }
  ctx = routers.context(batch, jax.random.key(0), jnp.int32(0), train=False)
  logits_BxLxV, aux = jax.jit(lambda: model(batch, ctx))()
  routes = [
    np.asarray(route).reshape(-1, *route.shape[-2:])
    for route in (found['route'] for found in aux)
  ]
  return np.asarray(logits_BxLxV), np.concatenate(routes)


def theirs(model):
  """The same of transformers."""
  found, hooks = [], []
  for name, module in model.named_modules():
    if name.endswith('.gate'):
      keep = lambda module, args, out: found.append(out[2].numpy())
      hooks.append(module.register_forward_hook(keep))
  with torch.no_grad():
    logits = model(torch.tensor(ids())).logits.numpy()
  for hook in hooks:
    hook.remove()
  return logits, np.stack(found)


def tensors(folder):
  found = {}
  for path in folder.glob('*.safetensors'):
    found |= safetensors.load_file(path)
  return found


def test_logits_and_experts_are_those_of_transformers(case):
  model, folder = case
  logits, routes = theirs(model)
  own_logits, own_routes = ours(folder / 'run')
  np.testing.assert_array_equal(np.sort(own_routes), np.sort(routes))
  far = np.abs(own_logits - logits).max() / np.abs(logits).max()
  assert far < 1e-5
  assert np.abs(logits).max() > 0.1


def test_an_export_of_an_import_is_the_same_bits(case, tmp_path):
  model, folder = case
  convert.give(str(folder / 'run'), str(tmp_path / 'again'), shard=4000)
  assert len(list((tmp_path / 'again').glob('*.safetensors'))) > 1
  old, new = tensors(folder / 'published'), tensors(tmp_path / 'again')
  assert old.keys() == new.keys()
  for name, a in old.items():
    assert a.dtype == new[name].dtype, name
    np.testing.assert_array_equal(a, new[name], err_msg=name)
  opened = type(model).from_pretrained(tmp_path / 'again').eval()
  np.testing.assert_array_equal(theirs(opened)[0], theirs(model)[0])


def test_greedy_generation_is_that_of_transformers(case):
  """Of prompts of other lengths, which transformers gets one by one."""
  model, folder = case
  job, weights = generate.newest(str(folder / 'run'))
  prompts = [row[: 9 - 4 * i].tolist() for i, row in enumerate(ids())]
  found = generate.writer(job, 32)(weights, prompts)
  for prompt, own in zip(prompts, found.ids, strict=True):
    made = model.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
      do_sample=False,
      max_new_tokens=32,
      min_new_tokens=32,
      eos_token_id=None,
      pad_token_id=0,
    )
    assert made[0, len(prompt) :].tolist() == own


def test_fused_tensors_are_read_too(case, tmp_path):
  """As transformers 5 has them in memory."""
  model, folder = case
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  assert any('gate_up_proj' in name for name in state)
  if model.config.tie_word_embeddings:
    del state['lm_head.weight']
  safetensors.save_file(state, tmp_path / 'model.safetensors')
  text = (folder / 'published' / 'config.json').read_text()
  (tmp_path / 'config.json').write_text(text)
  family, keys, _ = convert.read_config(tmp_path)
  c, _ = convert.model_config(keys)
  mesh = parallel.mesh({'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 2})
  cut, _ = convert.load(tmp_path, family, c, mesh)
  job = routing.load(str(folder / 'run'))
  whole = routing.restore(job, 0)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get((cut.params, cut.router_state)),
    jax.device_get((whole.params, whole.router_state)),
  )


def test_a_cut_import_is_the_same_bits_on_a_mesh(case):
  """Each device reads its slices, of split experts too."""
  _, folder = case
  family, keys, _ = convert.read_config(folder / 'published')
  c, _ = convert.model_config(keys)
  job = routing.load(str(folder / 'run'))
  whole = jax.device_get(routing.restore(job, 0))
  for sizes in ((1, 2, 2, 2), (2, 4, 1, 1)):
    mesh = parallel.mesh(dict(zip(parallel.AXES, sizes, strict=True)))
    cut, _ = convert.load(folder / 'published', family, c, mesh)
    jax.tree.map(
      np.testing.assert_array_equal,
      (whole.params, whole.router_state),
      jax.device_get((cut.params, cut.router_state)),
    )
    pools = cut.params['trunk']['body']['pools']['gate_ExDxF']
    assert not pools.sharding.is_fully_replicated


def test_config_json_keeps_what_it_said(case, tmp_path):
  model, folder = case
  convert.give(str(folder / 'run'), str(tmp_path / 'again'))
  values = json.loads((tmp_path / 'again' / 'config.json').read_text())
  opened = type(model.config).from_pretrained(tmp_path / 'again')
  for key in ('eos_token_id', 'max_position_embeddings', 'hidden_act'):
    assert getattr(opened, key) == getattr(model.config, key)
  assert values['vocab_size'] == V
