"""What a run of this study measures: other text, spoilt text, spoilt images."""

import pathlib
import tempfile

import numpy as np
import scipy.ndimage

from experiments.harness import measures, sources


def measure(job, state):
  """The loss of spoilt and of other text; errors on spoilt images."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    if job.config['data']['source'] == 'text':
      return _of_texts(job, state, folder)
    return _of_images(job, state, folder)


def _of_texts(job, state, folder):
  held_out = pathlib.Path(job.config['data']['eval_path'])
  data = pathlib.Path(job.config['data']['path']).parents[1]
  swapped = folder / 'swapped.txt'
  swapped.write_text(swap(held_out.read_text()))
  wikitext = sources.head(data / 'wikitext2-eval/valid.txt', 1500)
  loss = lambda path: measures.evaluated(
    measures.changed(job, data__eval_path=str(path)), state
  )['eval_loss']
  return {'swapped_loss': loss(swapped), 'wikitext_loss': loss(wikitext)}


def swap(text: str, part: float = 0.025) -> str:
  """'AAA' for so many words of every line, one at least (their attack).

  Short words are left, as the attack leaves stop words.
  """
  draw = np.random.default_rng(0)
  lines = []
  for line in text.splitlines():
    words = line.split(' ')
    long = [i for i, word in enumerate(words) if len(word) > 3]
    count = min(len(long), max(1, int(part * len(words))))
    for i in draw.choice(long, count, replace=False) if count else ():
      words[i] = 'AAA'
    lines.append(' '.join(words))
  return '\n'.join(lines) + '\n'


def _of_images(job, state, folder):
  error = lambda found: 100 * (1 - found['eval_accuracy'])
  clean = error(measures.evaluated(job, state))
  with np.load(job.config['data']['path']) as arrays:
    pixels = arrays['x_test'].astype(np.float32)
    labels = arrays['y_test']
  found = {}
  for name, spoil in SPOILT.items():
    path = folder / f'{name}.npz'
    spoilt = np.clip(spoil(pixels), 0, 255).astype(np.uint8)
    np.savez(path, x_test=spoilt, y_test=labels)
    other = measures.changed(
      job,
      data__eval_path=str(path),
      data__eval_images_key='x_test',
      data__eval_labels_key='y_test',
    )
    found[f'{name}_error'] = error(measures.evaluated(other, state))
  found['spoilt_error'] = float(np.mean([*found.values()]))
  return {'error': clean, **found}


def _noise(pixels):
  return pixels + np.random.default_rng(0).normal(0, 100, pixels.shape)


SPOILT = {
  'noise': _noise,
  'blur': lambda pixels: scipy.ndimage.gaussian_filter(pixels, (0, 2, 2)),
  'contrast': lambda pixels: 0.3 * pixels,
  'shift': lambda pixels: np.pad(pixels, ((0, 0), (3, 0), (3, 0)))[:, :-3, :-3],
}
