"""moe_jax: a mixture-of-experts idea is one value in one file.

Names of arrays carry their axes, `x_TxD`, and configs use the same letters:

  B  batch (sequences)         E  experts in the pool
  L  length of a sequence      K  experts per token
  T  tokens here, B * L        C  capacity, rows per expert
  D  width of the model        M  rows, T * K or E * C
  H  heads (J key-value heads) G  pools
  S  size of a head            R  MoE layers that share a pool
  F  hidden width of an expert I  iterations (router, experts) in a layer
  V  vocabulary                N  layers

A model is an embedding, a trunk and a head. A trunk is plain loops:

  for pool in pools:                       # layers_per_pool > 1: ReXMoE
    for layer in layers of the pool:       # a block owns norms and attention
      x = x + attention(norm(x))
      h = h0 = residual.lookahead(norm(x), memory)
      for router in routers of the layer:  # iterations > 1: Chain-of-Experts
        y, memory = moe(h, router, pool, memory)
        h = inner_residual(h0, h, y)
      x, memory = residual.apply(x, memory, h)  # plain, or with momentum

A routed step, whole:

  plan, aux, memory = router(x_TxD, ctx, memory)       of the whole batch
  rows = sort(plan)                                    of what is on a device
  y_TxD = combine(experts(dispatch(x_TxD, rows), rows.group_sizes_E), rows, T)

A strategy in parallel.py stands in the place of the last two lines: where
experts are on other devices, of which nothing else knows, and where rows are
not to be copied, by fused.py.

Who may import whom: each line what stands below it, never a part beside it
(tests/project/imports_test.py checks).

  __main__; main; commands
  analysis, decode, weights, sizing
  training
  config
  models, optim, objectives, evaluators, report
  trunk, data
  blocks
  routers, attention, experts, residuals, parallel
  fused, balance, norm, init
  ops, which alone knows pallas_kernels
  plans, byname, exact, paths, ranges

Two words that are never mixed: *memory* lives over depth inside one forward
pass; *state* lives over training steps.
"""

from importlib import metadata

__version__ = metadata.version('moe_jax')
