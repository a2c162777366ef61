"""moe-train: trains what a config says, in a work directory.

  moe-train --config=configs/tiny.py --workdir=runs/tiny --config.steps=50

moe-options lists every --config.KEY and what it may be. The same command
continues a run that was stopped. Several processes train one model when each
is started with the same config and a work directory that all of them see, and
with

  --coordinator=auto                                    on Cloud TPU or SLURM
  --coordinator=HOST:PORT --processes=2 --process=0     elsewhere; 1, ...
"""

import re
import signal

from absl import flags, logging
from ml_collections import config_flags

from moe_jax import commands, ranges

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file with get_config(), see configs/.', lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where checkpoints, metrics and the report go.'
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Check all that can be; compile and write nothing.'
)
_PRINT_CONFIG = flags.DEFINE_bool(
  'print_config', False, 'Print every key, its value and where that is from.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'Where several processes meet: host:port of process 0; or auto, where jax'
  ' finds out all three: Cloud TPU, SLURM, Open MPI, Kubernetes.',
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which one this is, from 0.')
commands.within(_PROCESSES, ranges.Count)
commands.within(_PROCESS, ranges.Natural)


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax.training import distributed, preemption  # pylint: disable=g-import-not-at-top

  del argv
  if _PRINT_CONFIG.value:
    _print_config()
    return
  signal.signal(signal.SIGTERM, preemption.leave)
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
  try:
    if _COORDINATOR.value:
      distributed.initialize(
        _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
      )
  except (ValueError, OSError) as error:
    commands.stop('moe-train', error)
  commands.check_devices('moe-train')
  with distributed.run_together():
    _train()


def _print_config():
  from moe_jax import config  # pylint: disable=g-import-not-at-top

  try:
    c = config.resolve(_CONFIG.value)
  except (ValueError, TypeError) as error:
    commands.stop('moe-train', error)
  given, own = flags.FLAGS['config'].override_values, config.set_in(c)
  values = config.flat(c)
  width = max(map(len, values))
  for key, value in values.items():
    origin = 'config file' if key in own else 'default'
    origin = 'command line' if key in given else origin
    print(f'{key:{width}}  {value!r:24}  {origin}')


def _train():
  import jax  # pylint: disable=g-import-not-at-top

  from moe_jax.training import (
    checkpoint,
    distributed,
    jobs,
    loop,
    malloc,
    train_step,
  )

  prepared, mistake = None, ''
  try:
    if jax.default_backend() == 'cpu':
      malloc.retain_freed_memory()
    prepared = jobs.prepare(_CONFIG.value, _WORKDIR.value)
    if prepared is not None:
      judge = train_step.trace if _DRY_RUN.value else train_step.check
      judge(prepared)
  except (ValueError, TypeError, OSError, NotImplementedError) as error:
    mistake = str(error) or repr(error)
  mistake = distributed.agree(mistake, prepared.identity if prepared else '')
  if mistake:
    commands.stop('moe-train', mistake)
  if prepared is None:
    if jax.process_index() == 0:
      print(f'finished already: {_WORKDIR.value}')
  elif _DRY_RUN.value:
    if jax.process_index() == 0:
      start = max(checkpoint.steps(prepared.workdir), default=0)
      print(*loop.introduction(prepared, start), sep='\n')
      print('dry run: all is sound; nothing was compiled or written')
  else:
    try:
      loop.run(prepared)
    except loop.Stopped as error:
      if jax.process_count() > 1:
        raise  # which ends the others, too
      commands.stop('moe-train', error, 1)


def _check_processes(coordinator, processes, process):
  """Raises ValueError unless the three flags go together."""
  numbered = processes is not None or process is not None
  if coordinator in (None, 'auto'):
    if numbered:
      raise ValueError(
        '--processes and --process go with --coordinator=host:port, not with'
        + (' --coordinator=auto' if coordinator else 'out it')
      )
    return
  if not re.fullmatch(r'.+:\d{1,5}', coordinator):
    raise ValueError(
      f'--coordinator={coordinator} is neither host:port of process 0 nor auto'
    )
  if processes is None or process is None:
    raise ValueError(
      f'--coordinator={coordinator} needs --processes=N and --process=0 .. N-1'
    )
  if not 0 <= process < processes:
    raise ValueError(
      f'--process={process} is not one of 0 .. {processes - 1};'
      f' --processes={processes}'
    )


def console() -> None:
  """The entry point `moe-train`."""
  processes = _COORDINATOR, _PROCESSES, _PROCESS
  optional = _WORKDIR, _DRY_RUN, _PRINT_CONFIG, *processes

  def check():
    if _WORKDIR.value is None and not _PRINT_CONFIG.value:
      raise ValueError('--workdir is missing')
    _check_processes(*(flag.value for flag in processes))

  commands.run('moe-train', main, __doc__, (_CONFIG,), optional, check)


if __name__ == '__main__':
  console()
