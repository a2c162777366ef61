"""Everything that a run has to survive, done to runs of the tiny config.

  python -m experiments.faults            all of it, an hour on two cores
  python -m experiments.faults --short    some of it, two minutes

Adds a line a trial to trials.jsonl, and writes the table into README.md, here
and above. The short version writes nothing. Ends with 1 if anything was lost.
"""

import json
import pathlib
import platform
import sys
import tempfile

import jax
from absl import app, flags, logging

from experiments.faults import cost, fuzz, injected, runs

_SHORT = flags.DEFINE_bool('short', False, 'A few trials, no files.')

HERE = pathlib.Path(__file__).parent
TRIALS = HERE / 'trials.jsonl'
TABLES = HERE / 'README.md', runs.ROOT / 'README.md'
BEGIN, END = '<!-- by python -m experiments.faults -->\n', '<!-- end -->\n'


def measure(short: bool) -> list[dict]:
  """A line a trial."""
  lines = []

  def add(group, trial):
    line = {'group': group, **trial._asdict(), 'jax': jax.__version__}
    lines.append(line)
    verdict = 'survived' if trial.survived else 'LOST'
    print(f'{group}: {trial.what}: {verdict} {trial.told}', flush=True)

  with tempfile.TemporaryDirectory() as folder:
    place = runs.Place(pathlib.Path(folder))
    first = place.new()
    code, told = place.run(first)
    if code:
      sys.exit(told)
    reference = runs.result(first)
    for group, inject, often, seldom in injected.GROUPS:
      count = seldom if short else often
      if count:
        for trial in inject(place, reference, count):
          add(group, trial)
    for name, cases, count in fuzz.SUITES:
      count = count // 100 if short else count
      told = fuzz.run(cases, count, pathlib.Path(folder))
      trial = injected.Trial(f'{count} of {name}', not told, told)
      add('fuzz', trial)
  return lines


def table(lines: list[dict], percent: float) -> str:
  """What was injected, and what survived, in Markdown."""
  text = '| injected | times | survived | lost |\n|---|---|---|---|\n'
  for group in dict.fromkeys(line['group'] for line in lines):
    those = [line for line in lines if line['group'] == group]
    well = [line for line in those if line['survived']]
    times = len(those)
    if group == 'fuzz':
      count = lambda some: sum(int(x['what'].split()[0]) for x in some)
      times, good = count(those), count(well)
    else:
      good = len(well)
    text += f'| {group} | {times:,} | {good:,} | {times - good:,} |\n'
  return text + (
    f'\nCheckpoints at the default period of `configs/tiny.py` cost'
    f' {percent:.1f} % of the time of a step'
    f' ({platform.machine()}, {jax.__version__}).\n'
  )


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.FATAL)  # orbax tells of every file
  lines = measure(_SHORT.value)
  if not _SHORT.value:
    percent = cost.percent()
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    TRIALS.write_text(text)
    for path in TABLES:
      before, rest = path.read_text().split(BEGIN)
      after = rest.split(END, 1)[1]
      path.write_text(before + BEGIN + table(lines, percent) + END + after)
  lost = sum(not line['survived'] for line in lines)
  print(f'{len(lines)} trials, {lost} lost')
  sys.exit(lost > 0)


if __name__ == '__main__':
  app.run(main)
