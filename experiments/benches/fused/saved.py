"""What a routed layer keeps between its forward and its backward pass.

Those results of the forward pass, in the jaxpr of `jax.vjp`, that the backward
pass gets and that are no weights. Nothing runs.
"""

import functools

import jax
import jax.extend

from experiments.benches.fused import layers


def saved(f, weights, x_TxD, gate_TxK, expert_TxK) -> dict[str, int]:
  """{dtype[shape]: bytes} of what f's backward pass needs beside weights."""
  leaves = lambda *args: jax.tree.leaves(
    jax.vjp(functools.partial(f, expert_TxK=args[3]), *args[:3])[1]
  )
  args = weights, x_TxD, gate_TxK, expert_TxK
  jaxpr = jax.make_jaxpr(leaves)(*args).jaxpr
  is_var = lambda v: not isinstance(v, jax.extend.core.Literal)
  kept = set(filter(is_var, jaxpr.outvars))
  kept -= set(jaxpr.invars[: len(weights)])
  found = {}
  for aval in sorted((v.aval for v in kept), key=str):
    found.setdefault(str(aval), 0)
    found[str(aval)] += aval.size * aval.dtype.itemsize
  return found


def report(write):
  print('MiB saved for the backward pass of a layer, 8192 tokens, bfloat16')
  print(f'{"":10}{"plain":>10}{"local":>10}{"fused":>10}{"of plain":>10}')
  for name, size in layers.MODELS.items():
    kept = {
      strategy: saved(
        layers.layer(size, strategy), *layers.arguments(size, 'bfloat16')
      )
      for strategy in ('plain', *layers.STRATEGIES)
    }
    total = {strategy: sum(parts.values()) for strategy, parts in kept.items()}
    mib = ''.join(f'{n / 2**20:10.1f}' for n in total.values())
    print(f'{name:10}{mib}{total["fused"] / total["plain"]:10.3f}', flush=True)
    for strategy, parts in kept.items():
      about = {'layer': name, **size._asdict(), 'row': strategy}
      write({'what': 'saved', **about, 'bytes': total[strategy], **parts})
