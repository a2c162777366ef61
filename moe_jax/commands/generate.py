"""moe-generate: a decoder continues prompts.

  moe-generate --workdir=runs/tiny --prompt='def main(' --max_new_tokens=50
  moe-generate --workdir=runs/olmoe --prompt_ids=1,2,3 --json

Greedy, or with --temperature and --top_p. --record keeps which experts each
token had, and --replay has them again.
"""

import json
from typing import Annotated

from absl import flags, logging

from moe_jax import commands, ranges

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of a run of moe-train, or of moe-convert.'
)
_PROMPT = flags.DEFINE_multi_string('prompt', [], 'A text; may be repeated.')
_PROMPT_IDS = flags.DEFINE_multi_string(
  'prompt_ids', [], 'The same as ids, 1,2,3.'
)
_NEW = flags.DEFINE_integer('max_new_tokens', 32, 'For each prompt.')
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.0, 'Of the draws; 0 takes the best token.'
)
_TOP_P = flags.DEFINE_float(
  'top_p', 1.0, 'Drawn from are the best that together have this probability.'
)
_SEED = flags.DEFINE_integer(
  'seed', 0, 'Of the draws.', lower_bound=0, upper_bound=2**32 - 1
)
_MESH = flags.DEFINE_list('mesh', [], 'Where the model lies: fsdp=4,expert=2.')
_JSON = flags.DEFINE_bool('json', False, 'Print a JSON object a prompt.')
_RECORD = flags.DEFINE_string('record', None, 'A file for the routing, .npz.')
_REPLAY = flags.DEFINE_string('replay', None, 'A file that --record wrote.')
commands.within(_NEW, ranges.Count)
commands.within(_TOP_P, Annotated[float, ranges.Within('(0, 1]')])


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax.decode import generate  # pylint: disable=g-import-not-at-top

  del argv
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  commands.check_devices('moe-generate')
  try:
    _run(generate)
  except (ValueError, TypeError, OSError) as error:
    commands.stop('moe-generate', error)


def _run(generate):
  if bool(_PROMPT.value) == bool(_PROMPT_IDS.value):
    raise ValueError('give either --prompt or --prompt_ids')
  routes = generate.load_routes(_REPLAY.value) if _REPLAY.value else None
  if _RECORD.value:
    generate.routes_file(_RECORD.value)
  job, weights = generate.newest(
    _WORKDIR.value, commands.mesh_sizes(_MESH.value)
  )
  prompts = [generate.prompt_ids(job, text) for text in _PROMPT.value]
  prompts += [_ids(text) for text in _PROMPT_IDS.value]
  stop = generate.ends(job)
  write = generate.writer(
    job,
    _NEW.value,
    temperature=_TEMPERATURE.value,
    top_p=_TOP_P.value,
    stop=stop,
  )
  found = write(weights, prompts, _SEED.value, routes)
  for prompt, ids in zip(prompts, found.ids, strict=True):
    text = generate.continued(job, prompt, ids, stop)
    if _JSON.value:
      print(json.dumps({'prompt_ids': prompt, 'ids': ids, 'text': text}))
    else:
      print(','.join(map(str, ids)) if text is None else text)
  if _RECORD.value:
    generate.save_routes(_RECORD.value, found.routes)


def _ids(text):
  try:
    return [int(i) for i in text.split(',')]
  except ValueError:
    raise ValueError(f'--prompt_ids={text} is not like 1,2,3') from None


def console() -> None:
  """The entry point `moe-generate`."""
  optional = (
    *(_PROMPT, _PROMPT_IDS, _NEW, _TEMPERATURE, _TOP_P, _SEED, _JSON),
    *(_MESH, _RECORD, _REPLAY),
  )
  commands.run('moe-generate', main, __doc__, (_WORKDIR,), optional)


if __name__ == '__main__':
  console()
