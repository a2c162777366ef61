"""A model of Qwen3-30B-A3B's size (arXiv 2505.09388), 30 billion parameters.

Claim: moe-plan's numbers, which stand in README.md beside the compiler's own.
Run:   moe-plan --config=configs/scale/qwen3_30b.py --topology=v6e:16x16
Cost:  a slice of a pod. It never ran: what is claimed is what a compiler says.

As published: 48 layers of 128 experts of width 768, 8 for each token; heads of
size 128 over 4 key-value heads. There are 32 query heads of that size, which
together are twice as wide as the model; here heads are D / H wide, so that
there are 16. Their norms of queries and keys are not here either. Both
together are 403 million parameters less, of 30.5 billion.
"""

from moe_jax import config


def get_config():
  c = config.default()
  c.description = 'A model of the size of Qwen3-30B-A3B'
  c.steps, c.batch_size, c.seq_len = 1000, 256, 4096
  # Stands in for the text that you train on, so that the command starts.
  c.data = config.source(
    'python_stdlib', vocab_size=32_768, padded_size=151_936
  )
  c.model.update(N=48, D=2048, H=16, E=128, expert_F=768)
  c.model.update(tied=False, dtype='bfloat16', remat=True)
  c.model.attention = config.attend('gqa', num_kv_heads=4, theta=1_000_000.0)
  c.model.router = config.router('topk', k=8)
  c.objective.losses.update(balance=0.001, z=0.0)
  c.optimizer.update(learning_rate=3e-4)
  c.mesh.update(fsdp=8, expert=32)
  c.parallel.update(strategy='ragged', buffer_factor=1.5)
  return c
