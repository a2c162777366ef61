"""moe-convert: published weights to a work directory, and back.

  moe-convert --from=OLMoE-1B-7B-0924 --to=runs/olmoe
  moe-convert --from=runs/olmoe --to=olmoe-again

A folder as the Hugging Face Hub has it, config.json with safetensors, becomes a
work directory for moe-analyze; a work directory becomes such a folder, which
transformers and vLLM open. Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2 and -V3.
"""

import json
import pathlib

from absl import flags, logging

from moe_jax import commands

_FROM = flags.DEFINE_string(
  'from', None, 'A folder as the Hub has it, or a work directory.'
)
_TO = flags.DEFINE_string('to', None, 'The other; it is made.')
_MESH = flags.DEFINE_list(
  'mesh', [], 'Where an imported model lies meanwhile: fsdp=4,expert=2.'
)
_SHARD = flags.DEFINE_integer(
  'shard', 5 * 10**9, 'Bytes of an exported file, at the most.', lower_bound=1
)


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax import convert, parallel  # pylint: disable=g-import-not-at-top

  del argv
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  try:
    if _is_run(_FROM.value):
      told = convert.give(_FROM.value, _TO.value, _SHARD.value)
    else:
      mesh = parallel.mesh(commands.mesh_sizes(_MESH.value))
      told = convert.take(_FROM.value, _TO.value, mesh)
    print('\n'.join(told))
  except (ValueError, TypeError, OSError) as error:
    commands.stop('moe-convert', error)


def _is_run(folder):
  """Whether a folder is a work directory, whose config has a model."""
  try:
    text = (pathlib.Path(folder) / 'config.json').read_text(encoding='utf-8')
    return 'model' in json.loads(text)
  except (OSError, ValueError, TypeError):
    return False  # the import says what is wrong


def console() -> None:
  """The entry point `moe-convert`."""
  commands.run('moe-convert', main, __doc__, (_FROM, _TO), (_MESH, _SHARD))


if __name__ == '__main__':
  console()
