"""What xz -9 needs for the held-out text of a config, as one stream.

  python -m experiments.harness.xz --config=configs/tiny.py

A general compressor that adapts to the text itself is the yardstick for a
model that was trained on other text of the same kind.
"""

import lzma

from absl import app
from ml_collections import config_flags

from moe_jax.data import packing

_CONFIG = config_flags.DEFINE_config_file('config', 'configs/tiny.py')


def bits_per_byte(documents: list[str]) -> float:
  """Of the documents, joined, in the format of `xz -9`."""
  text = ''.join(documents).encode()
  return 8 * len(lzma.compress(text, preset=9)) / len(text)


def main(argv: list[str]) -> None:
  del argv
  corpus = packing.load(packing.DataConfig(**_CONFIG.value.data))
  print(f'{corpus.description}; sha256 {corpus.sha256}')
  print(f'xz -9: {bits_per_byte(corpus.eval):.3f} bits per byte')


if __name__ == '__main__':
  app.run(main)
