"""Models that transformers makes, and how far ours are from them."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from moe_jax import models, routers
from moe_jax.decode import generate
from moe_jax.training import saved_run
from moe_jax.weights import convert

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
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'high_freq_factor': 4.0,
  'low_freq_factor': 1.0,
  'original_max_position_embeddings': 32,
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
  'llama-plain': (
    'Llama',
    dict(intermediate_size=24, num_key_value_heads=2),
  ),
  'llama-bias': (
    'Llama',
    dict(
      intermediate_size=20,
      num_key_value_heads=4,
      attention_bias=True,
      head_dim=6,
      rope_theta=500.0,
      rms_norm_eps=0.01,
    ),
  ),
  'llama-tied': (
    'Llama',
    dict(
      intermediate_size=12,
      num_key_value_heads=1,
      num_hidden_layers=3,
      tie_word_embeddings=True,
      head_dim=12,
      rope_scaling=LLAMA3,
    ),
  ),
  'qwen3-plain': (
    'Qwen3',
    dict(intermediate_size=24, num_key_value_heads=2, head_dim=8),
  ),
  'qwen3-window': (
    'Qwen3',
    dict(
      intermediate_size=20,
      num_key_value_heads=4,
      head_dim=4,
      use_sliding_window=True,
      sliding_window=5,
      max_window_layers=0,
      attention_bias=True,
    ),
  ),
  'qwen3-tied': (
    'Qwen3',
    dict(
      intermediate_size=12,
      num_key_value_heads=1,
      head_dim=6,
      num_hidden_layers=3,
      tie_word_embeddings=True,
      rms_norm_eps=0.01,
      rope_scaling={**YARN, 'attention_factor': 1.3},
    ),
  ),
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
  'qwen3moe-plain': (
    'Qwen3Moe',
    dict(num_experts=8, num_experts_per_tok=3, num_key_value_heads=2, **QWEN3),
  ),
  'qwen3moe-dense': (
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
  'qwen3moe-window': (
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
ROUTED = [n for n, (kind, _) in CASES.items() if kind not in ('Llama', 'Qwen3')]
NEW = 32  # tokens


class Found(NamedTuple):
  """What was compared of a case.

  Attributes:
    logits: the largest difference to theirs, over their largest.
    choices, chosen: of tokens in layers, those with the same experts, and all.
    same, tokens: of greedily written tokens, those that are equal, and all.
    bits, tensors: of tensors, those whose export has the same bits, and all.
    opened: the largest difference of their logits from the export to the
      original.
  """

  logits: float
  choices: int
  chosen: int
  same: int
  tokens: int
  bits: int
  tensors: int
  opened: float


def make(name: str, folder: pathlib.Path) -> Any:
  """A model of transformers; `folder` gets it, and our work directory of it."""
  kind, options = CASES[name]
  settings = getattr(transformers, f'{kind}Config')(**{**SMALL, **options})
  torch.manual_seed(len(name))
  model = getattr(transformers, f'{kind}ForCausalLM')(settings).eval()
  with torch.no_grad():
    for at, a in (*model.named_parameters(), *model.named_buffers()):
      if 'inv_freq' not in at:
        a.copy_(0.3 * torch.randn(a.shape) + ('norm' in at))
  model.save_pretrained(folder / 'published')
  convert.take(str(folder / 'published'), str(folder / 'run'))
  return model


def compare(model: Any, folder: pathlib.Path) -> Found:
  """The work directory and an export of it beside the model."""
  logits, routes = theirs(model)
  own_logits, own_routes = ours(folder / 'run')
  equal = np.all(np.sort(own_routes) == np.sort(routes), axis=-1)
  written = [
    own == other
    for pair in zip(*continued(model, folder / 'run'), strict=True)
    for own, other in zip(*pair, strict=True)
  ]
  convert.give(str(folder / 'run'), str(folder / 'again'), shard=4000)
  old, new = (tensors(folder / name) for name in ('published', 'again'))
  bits = [
    name in new
    and (a.dtype, a.tobytes()) == (new[name].dtype, new[name].tobytes())
    for name, a in old.items()
  ]
  opened = type(model).from_pretrained(folder / 'again').eval()
  return Found(
    logits=float(np.abs(own_logits - logits).max() / np.abs(logits).max()),
    choices=int(equal.sum()),
    chosen=equal.size,
    same=sum(written),
    tokens=len(written),
    bits=sum(bits),
    tensors=len({*old, *new}),
    opened=float(np.abs(theirs(opened)[0] - logits).max()),
  )


def continued(model: Any, workdir: pathlib.Path) -> tuple[list, list]:
  """Ours and theirs of two prompts, which transformers gets one by one."""
  job, weights = generate.newest(str(workdir))
  prompts = [row[: 9 - 4 * i].tolist() for i, row in enumerate(ids())]
  found = []
  for prompt in prompts:
    made = model.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
      do_sample=False,
      max_new_tokens=NEW,
      min_new_tokens=NEW,
      eos_token_id=None,
      pad_token_id=0,
    )
    found.append(made[0, len(prompt) :].tolist())
  return generate.writer(job, NEW)(weights, prompts).ids, found


def ids():
  return np.random.default_rng(0).integers(0, V, (B, L))


def ours(workdir):
  """logits_BxLxV and the experts of each MoE layer, [T, K], in float32.

  Those of a dense model are an empty array.
  """
  job = saved_run.load(str(workdir))
  state = saved_run.restore(job, 0)
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
  routes = (
    [np.zeros((0, B * L, 1), np.int32)]
    if not aux
    else [
      np.asarray(route).reshape(-1, *route.shape[-2:]) for route in aux.routes()
    ]
  )
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
  none = np.zeros((0, B * L, 1), np.int32)
  return logits, np.stack(found) if found else none


def tensors(folder):
  found = {}
  for path in folder.glob('*.safetensors'):
    found |= load_file(path)
  return found
