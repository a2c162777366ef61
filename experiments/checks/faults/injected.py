"""What is done to a run, and whether it survived: place, reference -> trials.

The reference is the result of a run that nothing happened to. A trial survives
if the run does what the README says and, where it goes on, ends with the same
bits.
"""

import itertools
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from experiments.checks.faults import runs


class Trial(NamedTuple):
  what: str
  survived: bool
  told: str = ''  # what was said, or what went wrong


Group = Callable[[runs.Place, dict[str, Any], int], Iterator[Trial]]


def kills(place, reference, count) -> Iterator[Trial]:
  """SIGKILL: at random moments, and in each phase of a run."""
  phases = (
    runs.start_up,
    runs.step,
    runs.evaluation,
    runs.writing,
    runs.shutdown,
  )
  seconds = _duration(place)
  draw = random.Random(0)
  named = itertools.cycle(phases)
  for i in range(count):
    if i % 2:
      moment = next(named)
      what = f'SIGKILL, {moment.__name__.replace("_", "-")}'
    else:
      at = draw.uniform(0, seconds)
      moment, what = runs.after(at), f'SIGKILL after {at / seconds:.0%}'
    workdir = place.new()
    code, _ = place.until(workdir, moment)
    yield _continues(place, workdir, reference, what, code in (-9, 0))


def terms(place, reference, count) -> Iterator[Trial]:
  """SIGTERM at random moments: the state is saved, the exit status is 143."""
  seconds = _duration(place)
  draw = random.Random(1)
  for _ in range(count):
    at = draw.uniform(0.0, seconds)
    workdir = place.new()
    code, told = place.until(workdir, runs.after(at), signal.SIGTERM)
    lines = (
      runs.metrics(workdir) if (workdir / 'metrics.jsonl').exists() else []
    )
    done = max((line['step'] for line in lines), default=0)
    trial = _continues(
      place, workdir, reference, f'SIGTERM after {at / seconds:.0%}', True
    )
    # Before Python has a handler the system ends it, with the same status in
    # a shell; after the last step a run just ends.
    left = code in (143, -signal.SIGTERM) or (code == 0 and done == runs.STEPS)
    kept = code != 143 or not done or f'after step {done}, all is saved' in told
    yield trial._replace(survived=trial.survived and left and kept)


PAIRS = (
  ((1, 1, 1), 'auto', (8, 1, 1), 'auto'),
  ((8, 1, 1), 'auto', (1, 1, 8), 'ragged'),
  ((1, 1, 8), 'ragged', (2, 2, 2), 'all_to_all'),
  ((2, 2, 2), 'all_gather', (1, 8, 1), 'auto'),
  ((1, 8, 1), 'auto', (4, 1, 2), 'all_gather'),
  ((4, 1, 2), 'all_to_all', (1, 1, 1), 'auto'),
  ((1, 1, 8), 'all_gather', (1, 1, 4), 'ragged'),
  ((1, 1, 2), 'ragged', (1, 1, 8), 'all_to_all'),
)


def meshes(place, reference, count) -> Iterator[Trial]:
  """Killed on one mesh, continued on another: losses to 1e-5.

  In float64: in float32 meshes differ in the last bit, which now and then turns
  a token's choice between two experts, and with it all that follows.
  """
  del reference
  wide = '--config.model.dtype=float64'
  whole = place.new()
  place.run(whole, wide)
  losses = lambda workdir: [
    line['loss'] for line in runs.metrics(workdir) if 'loss' in line
  ]
  for old, old_strategy, new, strategy in PAIRS[:count]:
    workdir = place.new()
    before, after = _mesh(old, old_strategy), _mesh(new, strategy)
    strike = runs.saved(12), signal.SIGKILL
    place.until(workdir, *strike, wide, *before, devices=8)
    code, told = place.run(workdir, wide, *after, devices=8)
    what = f'{_named(old)} {old_strategy} to {_named(new)} {strategy}'
    if code:
      yield Trial(what, False, told[-300:])
      continue
    both = zip(losses(workdir), losses(whole), strict=True)
    worst = max(abs(a - b) / b for a, b in both)
    went_on = 'continuing after step 1' in told  # 12, or the next one
    yield Trial(what, went_on and worst <= 1e-5, f'loss within {worst:.0e}')


def damage(place, reference, count) -> Iterator[Trial]:
  """What storage does to a work directory, then the same command."""
  begun = place.new()
  place.until(begun, runs.saved(18))
  for name, (harm, expected) in itertools.islice(DAMAGE.items(), count):
    workdir = place.copy(begun)
    harm(workdir)
    before = runs.contents(workdir)
    code, told = place.run(workdir)
    if expected is None:  # refused, nothing changed
      lines = [x for x in told.splitlines() if x.startswith('moe-train: ')]
      same = runs.contents(workdir) == before
      yield Trial(name, code != 0 and same and len(lines) == 1, ' '.join(lines))
      continue
    said = [line for line in told.splitlines() if expected in line]
    went_on = code == 0 and runs.result(workdir) == reference
    yield Trial(name, went_on and bool(said), ' '.join(said) or told[-300:])


def _files(workdir, step):
  """Those of a checkpoint, the largest first."""
  folder = workdir / f'checkpoints/{step}'
  found = [p for p in sorted(folder.rglob('*')) if p.is_file()]
  return sorted(found, key=lambda p: -p.stat().st_size)


def _cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 16
  path.write_bytes(content)


def _all(workdir):
  for path in workdir.glob('checkpoints/[0-9]*'):
    _cut(_files(workdir, path.name)[0])


def _two(workdir):
  for step in (12, 18):
    _flip(_files(workdir, step)[0])


DAMAGED = 'the checkpoint of step 18 is damaged'
# What is done, and a part of what is said; None: the run is refused.
DAMAGE = {
  'largest file truncated': (lambda w: _cut(_files(w, 18)[0]), DAMAGED),
  'largest file missing': (lambda w: _files(w, 18)[0].unlink(), DAMAGED),
  'a bit flipped in it': (lambda w: _flip(_files(w, 18)[0]), DAMAGED),
  'a bit flipped in what describes arrays': (
    lambda w: _flip(w / 'checkpoints/18/state/_METADATA'),
    DAMAGED,
  ),
  'a bit flipped in the place in the data': (
    lambda w: _flip(w / 'checkpoints/18/data/metadata'),
    DAMAGED,
  ),
  'arrays missing': (
    lambda w: shutil.rmtree(w / 'checkpoints/18/state'),
    DAMAGED,
  ),
  'newest checkpoint missing': (
    lambda w: shutil.rmtree(w / 'checkpoints/18'),
    'steps 13 to ',  # 18, or what it came to before it was struck
  ),
  'the two newest damaged': (_two, 'continuing after step 6'),
  'a torn line in metrics.jsonl': (
    lambda w: (w / 'metrics.jsonl').open('a').write('{"step": 23, "lo'),
    'continuing after step 18',
  ),
  'tokenizer.json missing': (
    lambda w: (w / 'tokenizer.json').unlink(),
    'continuing after step 18',
  ),
  'all checkpoints damaged': (_all, None),
  'config.json truncated': (lambda w: _cut(w / 'config.json'), None),
}


def disk(place, reference, count) -> Iterator[Trial]:
  """A full disk: a limit on the size of files, reached by a checkpoint."""
  for _ in range(count):
    workdir = place.new()
    place.until(workdir, runs.saved(12))
    code, told = place.run(workdir, largest_file=200_000)
    lines = [x for x in told.splitlines() if x.startswith('moe-train: ')]
    ended = code == 1 and len(lines) == 1 and 'cannot save' in lines[0]
    told = lines[-1] if lines else told[-300:]
    found = _continues(place, workdir, reference, 'disk full', ended)
    yield found._replace(told=told)


def numbers(place, reference, count) -> Iterator[Trial]:
  """NaN in the loss of some batches, of a window of them, of all."""
  del reference
  kinds = (
    ('one bad batch', '9', 'step 9: bad numbers, skipped; 1 in a row', 0),
    (
      'five bad batches in a row',
      '14,15,16,17,18',
      'back to step 12, and on with the data that follow',
      0,
    ),
    ('nothing but bad numbers', 'always', 'is made by', 1),
  )
  for what, poison, expected, status in kinds[:count]:
    workdir = place.new()
    code, told = place.run(workdir, poison=poison)
    said = [line for line in told.splitlines() if expected in line]
    steps = [x['step'] for x in runs.metrics(workdir) if 'loss' in x]
    whole = steps == list(range(1, runs.STEPS + 1)) or status
    text = ' '.join(said[:1]) or told[-300:]
    yield Trial(what, code == status and bool(said and whole), text)
    if not status:  # killed on the way, it ends the same
      killed = place.new()
      place.until(killed, runs.reached(19), signal.SIGKILL, poison=poison)
      place.run(killed, poison=poison)
      same = runs.result(killed) == runs.result(workdir)
      yield Trial(f'{what}, and SIGKILL', same)


def processes(place, reference, count) -> Iterator[Trial]:
  """One of two processes is killed: the other ends, and both go on exactly."""
  del reference
  flags = ('--config.mesh.data=2',)
  whole = place.new()
  for process in place.two(whole, *flags):
    process.communicate(timeout=900)
  expected = runs.result(whole)
  for victim in range(count):
    workdir = place.new()
    both = place.two(workdir, *flags)
    while not runs.saved(12)(workdir):
      if any(process.poll() is not None for process in both):
        break
    both[victim].kill()
    _, told = both[1 - victim].communicate(timeout=120)
    both[victim].communicate()
    ended = both[1 - victim].returncode != 0
    for process in place.two(workdir, *flags):
      process.communicate(timeout=900)
    same = runs.result(workdir) == expected
    # jax has words of its own where process 0 is gone and it notices first.
    words = r'^moe-train: process .*|.*another task died.*'
    said = re.findall(words, told, re.MULTILINE)
    what = f'process {victim} of 2 killed'
    survived = ended and same and bool(said)
    yield Trial(what, survived, said[-1] if said else told[-300:])


def repeats(place, reference, count) -> Iterator[Trial]:
  """Nothing: the same command makes the same bits."""
  for _ in range(count):
    workdir = place.new()
    place.run(workdir)
    yield Trial('the same command', runs.result(workdir) == reference)


def _continues(place, workdir, reference, what, as_expected):
  """The same command once more, to the end."""
  code, told = place.run(workdir)
  if code or not as_expected:
    return Trial(what, False, told[-300:])
  found = runs.result(workdir)
  apart = [key for key in reference if found[key] != reference[key]]
  return Trial(what, not apart, f'other {", ".join(apart)}' if apart else '')


def _duration(place):
  """Of a run that nothing happens to, with what it needs compiled."""
  began = time.monotonic()
  place.run(place.new())
  return time.monotonic() - began


def _mesh(sizes, strategy):
  flags = zip(('data', 'fsdp', 'expert'), sizes, strict=True)
  return (
    *(f'--config.mesh.{axis}={size}' for axis, size in flags),
    f'--config.parallel.strategy={strategy}',
  )


def _named(sizes):
  return 'x'.join(map(str, sizes))


# Title, what is injected, how often, how often in the short version.
GROUPS: tuple[tuple[str, Group, int, int], ...] = (
  ('damaged files', damage, len(DAMAGE), 1),
  ('full disk', disk, 1, 1),
  ('bad numbers', numbers, 3, 1),
  ('another mesh', meshes, len(PAIRS), 1),
  ('one of two processes killed', processes, 2, 0),
  ('SIGTERM', terms, 10, 1),
  ('SIGKILL', kills, 30, 2),
  ('nothing', repeats, 2, 0),
)
