"""moe-analyze: what the routers of a trained run do with texts.

  moe-analyze --workdir=runs/tiny --data=novels='books/*.txt' \\
    --data=sums='gsm8k/test.jsonl#question'

runs the texts through the checkpoints that the run has, without changing
anything of it, and writes routing.html to look at, routing.json with its
numbers, and routing.npz: every token's experts and gates in the newest.
"""

from absl import flags, logging

from moe_jax import commands, ranges

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of a run of moe-train whose model is a decoder.'
)
_DATA = flags.DEFINE_multi_string(
  'data',
  [],
  'A text: GLOB or NAME=GLOB, of .jsonl files with #FIELD behind; may be'
  ' repeated. By default what the run held out.',
)
_TOKENS = flags.DEFINE_integer(
  'tokens', 50_000, 'At the most, of each text; whole batches, spread over it.'
)
_OUT = flags.DEFINE_string(
  'out', None, 'The folder of the results; by default WORKDIR/analysis.'
)
commands.within(_TOKENS, ranges.Count)


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax.analysis import record  # pylint: disable=g-import-not-at-top

  del argv
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  out = _OUT.value or f'{_WORKDIR.value}/analysis'
  commands.check_devices('moe-analyze')
  try:
    page = record.write(_WORKDIR.value, _DATA.value, _TOKENS.value, out)
    print(f'report: {page}')
  except (ValueError, TypeError, OSError) as error:
    commands.stop('moe-analyze', error)


def console() -> None:
  """The entry point `moe-analyze`."""
  optional = (_DATA, _TOKENS, _OUT)
  commands.run('moe-analyze', main, __doc__, (_WORKDIR,), optional)


if __name__ == '__main__':
  console()
