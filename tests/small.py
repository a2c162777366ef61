"""The config of a run so small that a test can make it."""

from moe_jax import config


def small_config(corpus, **changes):
  """`model__E=8` sets model.E."""
  c = config.default()
  c.steps, c.batch_size, c.seq_len = 6, 8, 16
  c.log_every = 1
  c.data.update(
    source='text', path=str(corpus), tokenizer='bytes', eval_fraction=0.2
  )
  c.model.update(N=2, D=16, H=2, E=4, expert_F=16, F=32)
  c.model.attention.J = 1
  for key, value in changes.items():
    c.update_from_flattened_dict({key.replace('__', '.'): value})
  return c
