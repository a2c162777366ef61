"""moe-plan: whether a training step fits the devices of a topology.

  moe-plan --config=configs/scale/qwen3_30b.py --topology=v5p:8x8x8

prints the memory of one device and what it tells the others in a step, from the
config alone; --compile prints beside it what the compiler says, without any of
those devices (pip install -e '.[aot]'; it takes minutes).
"""

from absl import flags
from ml_collections import config_flags

from moe_jax import commands

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'A file with get_config(), see configs/.', lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'v5p:8x8x8; two slices are 2xv5p:4x4x4; h100:8 eight GPUs.'
)
_COMPILE = flags.DEFINE_bool('compile', False, 'Also ask the compiler.')
_HLO = flags.DEFINE_string('hlo', '', 'A file for the compiled program.')
_GPU = flags.DEFINE_string(
  'gpu', '', "A file with XLA's target config, to compile for a GPU."
)


def main(argv: list[str]) -> None:
  # Imported here, so that a mistyped flag is reported at once.
  from moe_jax import config
  from moe_jax.sizing import estimate  # pylint: disable=g-import-not-at-top

  del argv
  try:
    c = config.resolve(_CONFIG.value)
    plan = estimate.plan(c, _TOPOLOGY.value)
    print(estimate.text(plan))
    if _COMPILE.value:
      from moe_jax.sizing import aot  # pylint: disable=g-import-not-at-top

      found = aot.in_process(c, _TOPOLOGY.value, hlo=_HLO.value, gpu=_GPU.value)
      print(aot.text(found, plan))
  except (ValueError, TypeError, OSError, RuntimeError) as error:
    commands.stop('moe-plan', error)


def console() -> None:
  """The entry point `moe-plan`."""
  required, optional = (_CONFIG, _TOPOLOGY), (_COMPILE, _HLO, _GPU)
  commands.run('moe-plan', main, __doc__, required, optional)


if __name__ == '__main__':
  console()
