"""metrics.jsonl survives crashes; the progress line stays readable."""

import io
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.report import metrics


def lines_of(workdir):
  with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as f:
    return [json.loads(text, parse_constant=pytest.fail) for text in f]


def put(workdir, text):
  with open(os.path.join(workdir, 'metrics.jsonl'), 'w') as f:
    f.write(text)


def test_one_object_a_line_with_step_first(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  writer.write(1, {'loss': 5.5})
  # Already in the file while the writer lives on.
  assert lines_of(tmp_path) == [{'step': 1, 'loss': 5.5}]
  writer.write(2, {'eval_loss': 5.0})
  assert [next(iter(x)) for x in lines_of(tmp_path)] == ['step', 'step']


def test_steps_count_from_one(tmp_path):
  with pytest.raises(ValueError, match='from 1'):
    metrics.Writer(tmp_path, 0).write(0, {})


def test_resume_drops_what_will_be_computed_again(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  for step in (10, 20, 30):
    writer.write(step, {'loss': float(step)})
    writer.write(step, {'eval_loss': float(step)})
  metrics.Writer(tmp_path, 20).write(25, {'loss': 1.0})
  assert [x['step'] for x in lines_of(tmp_path)] == [10, 10, 20, 20, 25]
  assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_resume_that_drops_nothing_leaves_the_file_alone(tmp_path):
  metrics.Writer(tmp_path, 0).write(3, {'loss': 0.1, 'note': 'é'})
  before = os.stat(tmp_path / 'metrics.jsonl')
  metrics.Writer(tmp_path, 3)
  after = os.stat(tmp_path / 'metrics.jsonl')
  assert (before.st_ino, before.st_mtime_ns) == (
    after.st_ino,
    after.st_mtime_ns,
  )


def test_new_run_starts_an_empty_file(tmp_path):
  put(tmp_path, '{"step": 1}\n')
  metrics.Writer(tmp_path, 0)
  assert not lines_of(tmp_path)


@pytest.mark.parametrize(
  'tail',
  [
    '{"step": 2, "lo',
    '{"step": 2, "lo\n',
    '{',
    '2',
    '"x',
    '\0\0\0',
    '{"loss": 1}',
    'null\n\n',
  ],
)
def test_a_torn_last_line_is_dropped(tmp_path, tail):
  put(tmp_path, '{"step": 1, "loss": 3.0}\n' + tail)
  assert metrics.read(tmp_path) == [{'step': 1, 'loss': 3.0}]
  metrics.Writer(tmp_path, 5).write(6, {'loss': 2.0})
  assert [x['step'] for x in lines_of(tmp_path)] == [1, 6]


def test_a_lost_newline_does_not_join_two_lines(tmp_path):
  put(tmp_path, '{"step": 1, "loss": 3.0}')
  metrics.Writer(tmp_path, 1).write(2, {'loss': 2.0})
  assert [x['step'] for x in lines_of(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  put(tmp_path, '{"step": 1}\nrubbish\n{"step": 3}\n')
  with pytest.raises(ValueError, match='jsonl:2 is not'):
    metrics.Writer(tmp_path, 3)


def test_values_become_json(tmp_path):
  metrics.Writer(tmp_path, 0).write(
    1,
    {
      'nan': float('nan'),
      'inf': jnp.float32(jnp.inf),
      'half': jnp.asarray(0.5, jnp.bfloat16),
      'f32': np.float32(0.1),
      'count': np.int64(7),
      'flag': np.bool_(True),
      'none': None,
      'load': jnp.asarray([[1 / 3, 2 / 3], [jnp.nan, 0.0]]),
      'list': [np.float64(1 / 3), float('-inf')],
      'nested': {'a': (1, 2)},
    },
  )
  assert lines_of(tmp_path) == [
    {
      'step': 1,
      'nan': None,
      'inf': None,
      'half': 0.5,
      'f32': 0.100000001,
      'count': 7,
      'flag': True,
      'none': None,
      'load': [[0.33333, 0.66667], [None, 0.0]],
      'list': [0.33333, None],
      'nested': {'a': [1, 2]},
    }
  ]


def test_a_float32_comes_back_exactly(tmp_path):
  values = np.random.default_rng(0).normal(size=200).astype(np.float32)
  writer = metrics.Writer(tmp_path, 0)
  for step, value in enumerate(values, start=1):
    writer.write(step, {'loss': float(value)})
  assert all(
    np.float32(x['loss']) == v
    for x, v in zip(lines_of(tmp_path), values, strict=True)
  )


def test_an_object_that_is_no_metric_is_refused(tmp_path):
  with pytest.raises(TypeError, match='no metric: set'):
    metrics.Writer(tmp_path, 0).write(1, {'x': {1}})
  assert not os.path.exists(tmp_path / 'metrics.jsonl')


def test_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
  put(tmp_path, '{"step": 1}\n{"step": 2}\n')
  monkeypatch.setattr(os, 'replace', lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    metrics.Writer(tmp_path, 1)
  assert [x['step'] for x in lines_of(tmp_path)] == [1, 2]
  assert os.listdir(tmp_path) == ['metrics.jsonl']


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  """Keeps what a terminal would show, line by line."""

  def isatty(self):
    return True

  def shown(self):
    rows = ['']
    column = 0
    for c in self.getvalue():
      if c == '\n':
        rows.append('')
        column = 0
      elif c == '\r':
        column = 0
      else:
        rows[-1] = rows[-1][:column] + c + rows[-1][column + 1 :]
        column += 1
    return [row.rstrip() for row in rows]


def drive(stream, steps=100, seconds=1.0, start=0, note_at=None):
  clock = Clock()
  progress = metrics.Progress(steps, 1000, start, stream, clock=clock)
  for step in range(start + 1, steps + 1):
    clock.now += seconds
    progress.update(step, 4.0 - step / 100)
    if step == note_at:
      progress.evaluation(step, {'eval_loss': 2.31, 'eval_bits_per_byte': 1.95})
  progress.close()


def test_a_log_gets_whole_plain_lines_and_not_many():
  log = io.StringIO()
  drive(log, note_at=50)
  text = log.getvalue()
  assert all(c == '\n' or c.isprintable() for c in text) and text[-1] == '\n'
  lines = text.splitlines()
  assert 'eval step 50: loss 2.310, bits per byte 1.950' in lines
  lines = [x for x in lines if x.startswith('step')]
  assert lines[0].startswith('step   1/100') and '-- left' in lines[0]
  assert lines[1] == (
    'step  11/100   11%  loss 3.890     1k tokens/s  1m 29s left'
  )
  assert lines[-1].startswith('step 100/100  100%') and 'done' in lines[-1]
  assert len(lines) == len(set(lines)) == 11


def test_an_interrupted_log_ends_with_the_last_step():
  log = io.StringIO()
  clock = Clock()
  progress = metrics.Progress(100, 1, 0, log, clock=clock)
  with pytest.raises(KeyboardInterrupt), progress:
    for step in (1, 2, 3):
      clock.now += 1
      progress.update(step, 1.0)
    raise KeyboardInterrupt
  assert [x.split('/')[0] for x in log.getvalue().splitlines()] == [
    'step   1',
    'step   3',
  ]


def test_a_note_cannot_smuggle_control_characters_into_a_log():
  log = io.StringIO()
  metrics.Progress(1, 1, 0, log).note('a\rb\x1b[2Jc\td')
  assert log.getvalue() == 'a b [2Jc d\n'


def test_a_terminal_shows_one_progress_line_and_every_note(monkeypatch):
  monkeypatch.setenv('COLUMNS', '100')
  monkeypatch.setenv('TERM', 'xterm')
  terminal = Terminal()
  drive(terminal, note_at=50)
  rows = terminal.shown()
  assert rows[0] == 'eval step 50: loss 2.310, bits per byte 1.950'
  assert rows[1].startswith('step 100/100') and '#' in rows[1]
  assert rows[2:] == ['']
  assert terminal.getvalue().count('\r') > 100


@pytest.mark.parametrize('columns', [10, 30, 50, 64, 80, 200])
def test_a_terminal_line_never_wraps(monkeypatch, columns):
  monkeypatch.setenv('COLUMNS', str(columns))
  monkeypatch.setenv('TERM', 'xterm')
  terminal = Terminal()
  drive(terminal, steps=123456, seconds=50.0, start=123400)
  assert max(map(len, terminal.shown())) < columns
  assert 'step' in terminal.shown()[0]


def test_a_dumb_terminal_is_a_log(monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  terminal = Terminal()
  drive(terminal)
  assert '\r' not in terminal.getvalue()


def test_speed_leaves_out_compiling_and_the_steps_before_a_resume():
  log = io.StringIO()
  clock = Clock()
  progress = metrics.Progress(1000, 10, 500, log, clock=clock)
  clock.now += 300  # compiling
  progress.update(501, 1.0)
  clock.now += 20
  progress.update(521, 1.0)
  assert '10 tokens/s  7m 59s left' in log.getvalue()


def test_a_loss_on_a_device_is_fetched_only_for_a_drawn_line():
  class Loss:
    fetched = 0

    def __float__(self):
      Loss.fetched += 1
      return 1.0

  clock = Clock()
  progress = metrics.Progress(10**6, 1, 0, io.StringIO(), clock=clock)
  for step in range(1, 1001):
    clock.now += 0.01
    progress.update(step, Loss())
  assert Loss.fetched == 1


@pytest.mark.parametrize(
  'x, text',
  [
    (0, '0'),
    (7, '7'),
    (0.1234, '0.123'),
    (999.4, '999'),
    (999.9, '1k'),
    (12345, '12.3k'),
    (999_999, '1M'),
    (4.56e6, '4.56M'),
    (1.5e12, '1.5T'),
  ],
)
def test_three_digits_and_a_letter(x, text):
  assert metrics.si(x) == text


@pytest.mark.parametrize(
  'seconds, text',
  [
    (0.2, '1s'),
    (59.5, '1m 00s'),
    (185, '3m 05s'),
    (3600, '1h 00m'),
    (90000, '1d 01h'),
    (float('inf'), '11574d 01h'),
  ],
)
def test_durations(seconds, text):
  assert metrics.duration(seconds) == text
