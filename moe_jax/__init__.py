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

A layer, whole:

  plan, aux, memory = router(x_TxD, ctx, memory)
  y_TxD = combine(experts(dispatch(x_TxD, plan), plan.group_E), plan, T)

Who may import whom (left imports right only; tests/imports_test.py checks, and
lists the few imports within a level):

  main -> train -> job -> {objective, data, tokenizer, corpus, cache, optimizer,
  metrics, figures, report, checkpoint, models, config, malloc} -> {block, moe,
  routers, experts, residual, attention, parallel} -> {plan, balance, ops} ->
  pallas_kernels -> jax

Two words that are never mixed: *memory* lives over depth inside one forward
pass; *state* lives over training steps.
"""
