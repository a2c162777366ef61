"""What a run says while it runs: metrics.jsonl and the progress line."""

import collections
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

FILE = 'metrics.jsonl'
SCALAR_DIGITS = 9  # all of a float32
ARRAY_DIGITS = 5  # a load per layer and expert is most of the file


def read(workdir: str) -> list[dict[str, Any]]:
  """The lines of metrics.jsonl as dicts; a torn last line is no line."""
  path = os.path.join(workdir, FILE)
  if not os.path.exists(path):
    return []
  with open(path, encoding='utf-8', errors='replace') as f:
    texts = f.read().split('\n')
  while texts and not texts[-1].strip('\0 '):
    texts.pop()
  lines = []
  for number, text in enumerate(texts, start=1):
    try:
      line = json.loads(text)
      line['step'] + 0  # a line without a number for its step is torn, too
    except (ValueError, TypeError, KeyError):
      if number == len(texts):
        break
      raise ValueError(f'{path}:{number} is not a metrics line') from None
    lines.append(line)
  return lines


class Writer:
  """Appends to metrics.jsonl, which holds no step twice after a resume.

  `resume_step` is the last step whose result the run has (0 for a new run).
  What an interrupted run wrote beyond it will be computed again, so it goes;
  with `owed` also the evaluation of that step. None has no file: of several
  processes, one writes.
  """

  def __init__(
    self, workdir: str | None, resume_step: int = 0, owed: bool = False
  ):
    self.path = None
    if workdir is None:
      return
    os.makedirs(workdir, exist_ok=True)
    self.path = os.path.join(workdir, FILE)
    kept = [x for x in read(workdir) if x['step'] <= resume_step]
    if owed:
      again = lambda x: x['step'] == resume_step and 'eval_loss' in x
      kept = [x for x in kept if not again(x)]
    text = ''.join(_dumps(line) for line in kept)
    if os.path.exists(self.path) and not _holds(self.path, text):
      replace(self.path, text)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Adds one line; it is in the file when this returns."""
    if step < 1:
      raise ValueError(f'steps count from 1, got {step}')
    line = {'step': int(step)}
    line.update({k: jsonable(v) for k, v in values.items() if k != 'step'})
    if self.path is None:
      return
    # Opened for each line: nothing to close, nothing left in a buffer.
    with open(self.path, 'a', encoding='utf-8') as f:
      f.write(_dumps(line))

  def sync(self) -> None:
    """All lines are on the disk when this returns."""
    if self.path is not None and os.path.exists(self.path):
      with open(self.path, 'rb') as f:
        os.fsync(f.fileno())


def replace(path: str, text: str) -> None:
  """Writes a whole file such that a reader sees the old one or the new."""
  part = f'{path}.{os.getpid()}.part'
  try:
    with open(part, 'w', encoding='utf-8', newline='\n') as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    os.replace(part, path)
  except BaseException:
    if os.path.exists(part):
      os.remove(part)
    raise


def jsonable(value: Any, digits: int = SCALAR_DIGITS) -> Any:
  """Plain Python for JSON: arrays become lists, NaN and infinity None."""
  if value is None or isinstance(value, (str, bool)):
    return value
  if isinstance(value, dict):
    return {str(k): jsonable(v, digits) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [jsonable(v, ARRAY_DIGITS) for v in value]
  if hasattr(value, 'dtype'):
    return _array(np.asarray(value), digits)
  if isinstance(value, float):
    return float(f'{value:.{digits}g}') if math.isfinite(value) else None
  if isinstance(value, int):
    return value
  raise TypeError(f'no metric: {type(value).__name__} {value!r}')


def _array(array, digits):
  if array.dtype.kind not in 'biu':  # bfloat16 calls itself 'V'
    array = array.astype(np.float64)
  return jsonable(array.tolist(), digits)


def _dumps(line):
  return json.dumps(line, allow_nan=False, ensure_ascii=False) + '\n'


def _holds(path, text):
  with open(path, 'rb') as f:
    return f.read() == text.encode('utf-8')


class Progress:
  """One line that says how far a run is.

  In a terminal it redraws in place. Elsewhere (a log file, a pipe) whole plain
  lines come at most every `period` seconds, the first and the last always.
  `loss` may be an array on a device: it is fetched only for a line drawn.
  """

  WINDOW = 30.0  # seconds over which the speed is measured

  def __init__(
    self,
    total_steps: int,
    tokens_per_step: int,
    start_step: int = 0,
    stream: TextIO | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    period: float | None = None,
  ):
    self.total = total_steps
    self.tokens_per_step = tokens_per_step
    self.step = start_step
    self.loss = None
    self.rate = None  # tokens per second as the caller measured them
    self.stream = sys.stderr if stream is None else stream
    self.clock = clock
    self.live = _is_terminal(self.stream)
    self.period = period or (0.1 if self.live else 10.0)
    self.seen = collections.deque()  # (time, step) within the window
    self.drawn_at = None
    self.drawn = ''  # what stands in the terminal's last line
    self.pending = False  # an update that has not been shown

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def update(
    self, step: int, loss: Any = None, tokens_per_second: float | None = None
  ) -> None:
    """`step` steps are done. Cheap enough to call after every step."""
    now = self.clock()
    self.step = step
    self.loss = self.loss if loss is None else loss
    self.rate = self.rate if tokens_per_second is None else tokens_per_second
    self.pending = True
    # The clock starts after the first step: compiling is not the run's speed.
    # One mark a second or so is enough, so that fast steps cost no memory.
    marks = self.seen
    if not marks or now - marks[-1][0] >= self.WINDOW / 60:
      marks.append((now, step))
    while len(marks) > 2 and now - marks[1][0] >= self.WINDOW:
      marks.popleft()
    due = self.drawn_at is None or now - self.drawn_at >= self.period
    if due or step >= self.total:
      self._draw(now)

  def evaluation(self, step: int, values: dict[str, float]) -> None:
    """Prints an evaluation, {'eval_loss': ...}, as a line of its own."""
    named = {k.removeprefix('eval_'): _number(v) for k, v in values.items()}
    text = ', '.join(f'{k.replace("_", " ")} {v}' for k, v in named.items())
    self.note(f'eval step {step}: {text}')

  def note(self, text: str) -> None:
    """Prints a line above the progress line, which stays."""
    self._erase()
    self._put(_printable(text) + '\n')
    if self.live and self.drawn_at is not None:
      self._draw(self.clock())

  def close(self) -> None:
    """Shows what was not shown yet and leaves the cursor on a new line."""
    if self.pending:
      self._draw(self.clock())
    if self.drawn:
      self._put('\n')
    self.drawn = ''

  def line(self, width: int | None = None) -> str:
    """The line's text, in at most `width` columns."""
    done = 100 * self.step // max(self.total, 1)
    steps_left = max(self.total - self.step, 0)
    pace = self._steps_per_second()
    tokens = self.rate or (pace and pace * self.tokens_per_step)
    digits = len(f'{self.total:,}')
    parts = [
      f'step {self.step:{digits},}/{self.total:,}',
      f'{done:3d}%',
      f'loss {_number(self.loss)}',
      f'{si(tokens) if tokens else "--":>5} tokens/s',
    ]
    if not steps_left:
      parts.append('done')
    else:
      parts.append(f'{duration(steps_left / pace) if pace else "--"} left')
    text = '  '.join(parts)
    for unneeded in (3, 1):  # a narrow terminal loses the speed, then the %
      if width and len(text) > width:
        parts.pop(unneeded)
        text = '  '.join(parts)
    if not width:
      return text
    bar = min(width - len(text) - 4, 30)
    if bar >= 8:
      full = bar * min(self.step, self.total) // max(self.total, 1)
      text += f'  [{"#" * full}{"." * (bar - full)}]'
    return text[:width]

  def _steps_per_second(self):
    if not self.seen:
      return None
    (then, first), now = self.seen[0], self.clock()
    if now <= then or self.step <= first:
      return None
    return (self.step - first) / (now - then)

  def _draw(self, now):
    self.drawn_at = now
    self.pending = False
    if not self.live:
      self._put(self.line() + '\n')
      return
    # One column stays free, where terminals differ in when they wrap.
    text = self.line(_columns(self.stream) - 1)
    self._put('\r' + text.ljust(len(self.drawn)))
    self.drawn = text

  def _erase(self):
    if self.drawn:
      self._put('\r' + ' ' * len(self.drawn) + '\r')
    self.drawn = ''

  def _put(self, text):
    self.stream.write(text)
    self.stream.flush()


def si(x: float) -> str:
  """12.3k, 4.56M: three digits and a letter."""
  for size, letter in (
    (1e15, 'P'),
    (1e12, 'T'),
    (1e9, 'G'),
    (1e6, 'M'),
    (1e3, 'k'),
  ):
    if abs(x) >= size * 0.9995:
      return _three(x / size) + letter
  return _three(x)


def duration(seconds: float) -> str:
  """The two largest units: 1h 02m, 3m 05s, 42s."""
  s = math.ceil(seconds) if seconds < 1e9 else int(1e9)
  if s < 60:
    return f'{s}s'
  if s < 3600:
    return f'{s // 60}m {s % 60:02d}s'
  if s < 86400:
    return f'{s // 3600}h {s // 60 % 60:02d}m'
  return f'{s // 86400}d {s // 3600 % 24:02d}h'


def _three(x):
  if abs(x) >= 99.95 or x == int(x):
    return f'{x:.0f}'
  return f'{x:.1f}' if abs(x) >= 9.995 else f'{x:.3g}'


def _number(x):
  return '--' if x is None else f'{float(x):.3f}'


def _printable(text):
  return ''.join(c if c.isprintable() or c == '\n' else ' ' for c in text)


def _is_terminal(stream):
  try:
    return stream.isatty() and os.environ.get('TERM') != 'dumb'
  except (AttributeError, ValueError):
    return False


def _columns(stream):
  try:
    columns = os.get_terminal_size(stream.fileno()).columns
  except (AttributeError, OSError, ValueError):
    columns = shutil.get_terminal_size().columns
  return columns or 80
