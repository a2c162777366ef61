"""Everything that a run has to survive, done to runs of the tiny config.

  python -m experiments.checks.faults            all of it, an hour on two cores
  python -m experiments.checks.faults --short    some of it, three minutes

Adds a line a trial to trials.jsonl, a group of trials at a time, and writes the
table into README.md, here and above. A group that stands in trials.jsonl is not
run again: move the file away to measure another version. The short version runs
all groups and writes nothing. Ends with 1 if anything was lost.
"""

import functools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
from absl import app, flags, logging

from experiments.checks.faults import cost, fuzz, injected, runs
from experiments.harness import pages

_SHORT = flags.DEFINE_bool('short', False, 'A few trials, no files.')

FUZZ, COST = 'random inputs', 'cost'  # titles of two groups
HERE = pathlib.Path(__file__).parent
TRIALS = HERE / 'trials.jsonl'
TABLES = HERE / 'README.md', runs.ROOT / 'README.md'


def groups(short: bool) -> dict[str, Callable[..., Iterator[dict]]]:
  """{title: (place, reference) -> trials}."""
  made = {}
  for title, inject, often, seldom in injected.GROUPS:
    count = seldom if short else often
    if count:
      made[title] = functools.partial(_inject, inject, count)
  made[FUZZ] = functools.partial(_fuzz, 100 if short else 1)
  if not short:
    made[COST] = _cost
  return made


def _inject(inject, count, place, reference):
  yield from inject(place, reference, count)


def _fuzz(part, place, reference):
  del reference
  for name, case, count in fuzz.SUITES:
    told = fuzz.run(case, count // part, place.folder)
    yield injected.Trial(f'{count // part} of {name}', not told, told)


def _cost(place, reference):
  del place, reference
  percent = cost.percent(rounds=5)
  yield injected.Trial('checkpoints', True, f'{percent:.1f} %')


def measure(short: bool) -> Iterator[list[dict]]:
  """The lines of one group after the other, without those that are done."""
  done = set() if short else {line['group'] for line in read()}
  with tempfile.TemporaryDirectory() as folder:
    place = runs.Place(pathlib.Path(folder))
    first = place.new()
    code, told = place.run(first)
    if code:
      sys.exit(told)
    reference = runs.result(first)
    for title, trials in groups(short).items():
      if title in done:
        continue
      lines = []
      for trial in trials(place, reference):
        verdict = 'survived' if trial.survived else 'LOST'
        print(f'{title}: {trial.what}: {verdict} {trial.told}', flush=True)
        told = trial.told.replace(f'{place.folder}/', '')
        trial = trial._replace(told=told)
        made = {'group': title, **trial._asdict(), 'jax': jax.__version__}
        lines.append(made)
      yield lines


def read() -> list[dict]:
  """The lines of trials.jsonl."""
  if not TRIALS.exists():
    return []
  return [json.loads(line) for line in TRIALS.read_text().splitlines()]


def table(lines: list[dict]) -> str:
  """What was injected, and what survived, in Markdown."""
  titles = list(groups(False))
  have = {line['group'] for line in lines}
  text = f'{len(have)} of {len(titles)} groups of trials.\n\n'
  text += '| injected | times | survived | lost |\n|---|---|---|---|\n'
  for title in titles:
    those = [line for line in lines if line['group'] == title]
    if not those or title == COST:
      continue
    many = lambda x, title=title: (
      int(x['what'].split()[0]) if title == FUZZ else 1
    )
    times = sum(map(many, those))
    good = sum(many(x) for x in those if x['survived'])
    text += f'| {title} | {times:,} | {good:,} | {times - good:,} |\n'
  for line in lines:
    if line['group'] == COST:
      text += (
        '\nCheckpoints at the default period of `configs/tiny.py` cost'
        f' {line["told"]} of the time of a step.\n'
      )
  return text


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.FATAL)  # orbax tells of every file
  lost = 0
  for lines in measure(_SHORT.value):
    lost += sum(not line['survived'] for line in lines)
    if not _SHORT.value:
      with TRIALS.open('a') as file:
        file.writelines(json.dumps(line) + '\n' for line in lines)
      for path in TABLES:
        pages.put(path, 'python -m experiments.checks.faults', table(read()))
  print(f'{lost} trials lost')
  sys.exit(lost > 0)


if __name__ == '__main__':
  app.run(main)
