"""The strategy `fused` beside `local`: what is saved, time, and a TPU's both.

  python -m experiments.benches.fused --what=saved,time,tpu --json=fused.jsonl

`saved` counts the bytes that one routed layer keeps between its forward and its
backward pass: those results of the forward pass, in the jaxpr of `jax.vjp`,
that the backward pass gets and that are no weights. Nothing runs. Layers of
published models at 8192 tokens, in bfloat16. `plain` is the layer as one writes
it down, with `jax.lax.ragged_dot` and jax's own gradients.

`time` runs forward and backward pass, to x, gates and all weights, in float32
on the platform at hand: each strategy has a turn in every round, in rotating
order, a call that does not count and one that does. Seconds are those of the
CPU, of all threads, which other work changes little. Ratios are to `local` in
the same round. Choices are even: k of E, drawn for each token. `dense` is nine
products of the same FLOPs and nothing else, all rows with one expert. `temp` is
what the compiled program takes besides arguments and results. On CPU freed
memory is kept, as in moe-train (malloc.retain_freed_memory).

`tpu` compiles the published layers for --chip, one process each, and tells what
memory the program takes and its modelled time, see tpu.py. It needs the
extra `aot`.
"""

import importlib.util
import json
import os

from absl import flags

from experiments.benches.fused import layers, saved, seconds, tpu
from pallas_kernels import tiling
from pallas_kernels.tools import command

_WHAT = flags.DEFINE_list('what', ['saved', 'time'], 'What is looked at.')
_ROUNDS = flags.DEFINE_integer('rounds', 10, 'Turns of each.', lower_bound=1)
_CHIP = flags.DEFINE_list(
  'chip', ['v5p', 'v6e'], 'Chips that tpu compiles for.'
)
_LAYER = flags.DEFINE_list('layer', None, 'Layers that tpu compiles; all.')
_JSON = flags.DEFINE_string('json', None, 'A file that gets a line a result.')


def main(argv: list[str]) -> None:
  del argv
  models = list(layers.MODELS) if _LAYER.value is None else _LAYER.value
  for name, values, known in (
    ('what', _WHAT.value, ('saved', 'time', 'tpu')),
    ('chip', _CHIP.value, tuple(tiling.CHIPS)),
    ('layer', models, tuple(layers.MODELS)),
  ):
    for value in values or ['']:
      if value not in known:
        command.stop(f'--{name}={value}; there are {", ".join(known)}')
  if 'tpu' in _WHAT.value and importlib.util.find_spec('libtpu') is None:
    command.stop("libtpu is missing: pip install -e '.[aot]'")
  try:
    file = open(_JSON.value or os.devnull, 'a')
  except OSError as error:
    command.stop(error)
  with file:
    write = lambda line: print(json.dumps(line), file=file, flush=True)
    if 'saved' in _WHAT.value:
      saved.report(write)
    if 'time' in _WHAT.value:
      seconds.report(write, _ROUNDS.value)
    if 'tpu' in _WHAT.value:
      tpu.report(write, _CHIP.value, models)


if __name__ == '__main__':
  command.run(main)
