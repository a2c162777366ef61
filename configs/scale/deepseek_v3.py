"""A model of DeepSeek-V3's size (arXiv 2412.19437), 671 billion parameters.

Claim: moe-plan's numbers, which stand in README.md beside the compiler's own.
Run:   moe-plan --config=configs/scale/deepseek_v3.py --topology=v5p:8x8x8
Cost:  a pod. It never ran: what is claimed is what a compiler says.

As published: 61 layers, the first 3 dense; 256 routed experts of width 2048, 8
for each token, and a shared one; latent attention; the loss-free bias. The
layers of multi-token prediction (11.5 billion) are left out, and a token's
experts may be on any node, not on at most 4.
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'A model of the size of DeepSeek-V3'
  c.steps, c.batch_size, c.seq_len = 1000, 512, 4096
  # Stands in for the text that you train on, so that the command starts.
  c.data = config.source(
    'python_stdlib', vocab_size=32_768, padded_size=129_280
  )
  c.model.update(N=61, D=7168, H=128, F=18_432, first_dense=3)
  c.model.update(E=256, expert_F=2048, shared_F=2048)
  c.model.update(tied=False, dtype='bfloat16', remat=True)
  c.model.attention = config.attend(
    'mla', nope=128, rope=64, value=128, rank=512, query_rank=1536
  )
  c.model.router = config.router(
    'topk', k=8, score='sigmoid', scale=2.5, bias_rate=0.001
  )
  c.objective.losses.update(balance=0.0, sequence_balance=1e-4, z=0.0)
  c.optimizer.update(learning_rate=2.2e-4)
  c.mesh.update(fsdp=8, expert=64)
  c.parallel.update(strategy='ragged', buffer_factor=1.5)
  return c
