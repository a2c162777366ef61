"""moe-convert: published weights to a work directory, and back.

  moe-convert --from=OLMoE-1B-7B-0924 --to=runs/olmoe
  moe-convert --from=runs/olmoe --to=olmoe-again
  moe-convert --from=runs/llama --to=runs/moe --upcycle=E=8,k=2

A folder as the Hugging Face Hub has it, config.json with safetensors, becomes a
work directory for moe-analyze; a work directory becomes such a folder, which
transformers opens: Llama, Qwen3, Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2, -V3.

With --upcycle the model in a work directory grows: a dense one gets E experts
for each feed-forward (slices=4 cuts it first), any gets iterations=2; it
answers as before until it is trained. All options: moe_jax/weights/upcycle.py
"""

import json
from typing import Annotated

from absl import flags, logging

from moe_jax import commands, paths, ranges

_FROM = flags.DEFINE_string(
  'from', None, 'A folder as the Hub has it, or a work directory.'
)
_TO = flags.DEFINE_string('to', None, 'The other; it is made.')
_MESH = flags.DEFINE_list(
  'mesh',
  [],
  'Where an imported or upcycled model lies meanwhile: fsdp=4,expert=2.',
)
_UPCYCLE = flags.DEFINE_list(
  'upcycle', [], 'What layers become: E=8,k=2,slices=1,iterations=1.'
)
_SHARD = flags.DEFINE_integer(
  'shard', 5 * 10**9, 'Bytes of an exported file, at the most.'
)
commands.within(_SHARD, Annotated[int, ranges.Within('[1, inf)')])


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax import parallel
  from moe_jax.weights import convert, upcycle  # pylint: disable=g-import-not-at-top

  del argv
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  commands.check_devices('moe-convert')
  try:
    sizes = commands.mesh_sizes(_MESH.value)
    if _UPCYCLE.value:
      growth = upcycle.parse(_UPCYCLE.value)
      told = upcycle.grow(_FROM.value, _TO.value, growth, sizes)
    elif _is_run(_FROM.value):
      told = convert.give(_FROM.value, _TO.value, _SHARD.value)
    else:
      told = convert.take(_FROM.value, _TO.value, parallel.mesh(sizes))
    print('\n'.join(told))
  except (ValueError, TypeError, OSError) as error:
    commands.stop('moe-convert', error)


def _is_run(folder):
  """Whether a folder is a work directory, whose config has a model."""
  try:
    path = paths.absolute(folder) / 'config.json'
    text = path.read_text(encoding='utf-8')
    return 'model' in json.loads(text)
  except (OSError, ValueError, TypeError):
    return False  # the import says what is wrong


def console() -> None:
  """The entry point `moe-convert`."""
  commands.run(
    'moe-convert', main, __doc__, (_FROM, _TO), (_MESH, _SHARD, _UPCYCLE)
  )


if __name__ == '__main__':
  console()
