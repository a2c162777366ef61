"""Published families beside transformers, by three small models each.

  python -m experiments.checks.parity

needs torch and transformers (the extra `torch`). Adds a line a model to
cells.jsonl, and the table to the README at the end.
"""

import json
import os
import pathlib
import platform
import tempfile
from importlib import metadata

from absl import app

os.environ['JAX_PLATFORMS'] = 'cpu'

from experiments.checks.parity import cases
from experiments.harness import pages

HERE = pathlib.Path(__file__).parent
DONE = HERE / 'cells.jsonl'
README = HERE.parents[2] / 'README.md'
HEADS = [
  'family, three models each',
  'logits, largest relative difference',
  'same experts, of tokens in layers',
  'same greedy tokens',
  'tensors of the export with the same bits',
  'logits of the export in transformers, largest difference',
]


def table(lines: list[dict]) -> str:
  """A row a family, in Markdown."""
  rows = []
  for family in dict.fromkeys(line['family'] for line in lines):
    own = [line for line in lines if line['family'] == family]
    total = lambda key, own=own: sum(line[key] for line in own)
    rows.append(
      [
        family,
        f'{max(line["logits"] for line in own):.0e}',
        f'{total("choices")} of {total("chosen")}',
        f'{total("same")} of {total("tokens")}',
        f'{total("bits")} of {total("tensors")}',
        f'{max(line["opened"] for line in own):g}',
      ]
    )
  return pages.table(HEADS, rows)


def main(argv: list[str]) -> None:
  del argv
  versions = {
    name: metadata.version(name) for name in ('jax', 'torch', 'transformers')
  }
  lines = []
  for name in cases.CASES:
    with tempfile.TemporaryDirectory() as folder:
      folder = pathlib.Path(folder)
      model = cases.make(name, folder)
      found = cases.compare(model, folder)
    line = {
      'case': name,
      'family': model.config.model_type,
      **found._asdict(),
      **versions,
      'machine': platform.machine(),
    }
    lines.append(line)
    print(json.dumps(line), flush=True)
  DONE.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  pages.put(README, 'python -m experiments.checks.parity', table(lines))


if __name__ == '__main__':
  app.run(main)
