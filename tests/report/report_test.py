"""report.html is one file, complete, escaped, and the same every time."""

import base64
import html.parser
import json
import os
import re
import zlib

import numpy as np
import pytest

from moe_jax.report import figures, metrics, page

VOID = {'meta', 'img', 'br', 'hr', 'link', 'input', 'source'}
SUMMARY = {
  'initial_loss': 5.551,
  'eval_loss': 1.478,
  'eval_bits_per_byte': 1.706,
  'steps': 300,
  'tokens': 1_228_800,
  'tokens_per_second': 8012.3,
  'params_total': 11_212_032,
  'params_active': 2_912_032,
  'expert_params': 9_437_184,
  'flops_per_token': 18_500_000,
  'wall_seconds': 203.4,
  'implementation': {'gmm': 'ragged_dot'},
  'devices': ['cpu', 'cpu'],
  'versions': {'jax': '0.10.2'},
  'corpus_sha256': 'abc',
  'config_description': 'Sixteen experts & one <b>',
}
CONFIG = {
  'steps': 300,
  'model': {'E': 4, 'router': {'name': '<i>topk</i>'}},
  'data': {'path': '"><script>alert(1)</script>', 'glob': ''},
}


class Page(html.parser.HTMLParser):
  """What is in the page; fails on tags that do not nest."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.attributes, self.texts, self.open = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  @property
  def text(self):
    return ' '.join(self.texts)


def train_line(step, L=2, E=4, **more):
  load = np.full((L, E), 1 / E)
  load[:, 0] *= 2
  return {
    'step': step,
    'loss': 5.0 / step**0.2,
    'learning_rate': 1e-3 / step,
    'grad_norm': 0.5,
    'tokens': 4096 * step,
    'tokens_per_second': 9e3,
    'seconds': step / 2.0,
    'load': (load / load.sum(1)[:, None]).tolist(),
    'entropy': [0.9] * L,
    'dropped': [0.1] * L,
    'balance': [1.1] * L,
    'z': [2.0] * L,
  } | more


def dense_line(step):
  return {k: v for k, v in train_line(step).items() if not isinstance(v, list)}


def make(workdir, lines, config=CONFIG, summary=SUMMARY):
  for name, value in (('config', config), ('summary', summary)):
    with open(workdir / f'{name}.json', 'w') as f:
      json.dump(value, f)
  writer = metrics.Writer(workdir, 0)
  for line in lines:
    writer.write(line['step'], line)


def written(workdir):
  with open(page.write(workdir), encoding='utf-8') as f:
    return f.read()


def full_run(steps=300, **options):
  for step in range(1, steps + 1):
    yield train_line(step, **options)
    if step % 100 == 0:
      yield {'step': step, 'eval_loss': 2.0, 'eval_bits_per_byte': 1.7}


def headings(text):
  return re.findall('<h2>(.*?)</h2>', text)


def figure(text, title):
  """The figure with that title; fails when there are none or two."""
  (found,) = [
    x
    for x in re.findall('<figure.*?</figure>', text, re.DOTALL)
    if re.search(f'<figcaption>{title}[ <]', x)
  ]
  return found


def test_nothing_comes_from_outside_and_nothing_runs(tmp_path):
  make(tmp_path, full_run())
  text = written(tmp_path)
  read = Page(text)
  assert not {'script', 'link', 'iframe', 'object', 'base'} & set(read.tags)
  for name, value in read.attributes:
    assert not name.startswith('on')
    assert name not in ('href', 'xlink:href', 'srcset', 'action')
    assert name != 'src' or value.startswith('data:image/png;base64,')
  assert '://' not in text and 'url(' not in text and '@import' not in text


def test_config_and_summary_are_shown_escaped_and_whole(tmp_path):
  make(tmp_path, full_run(3))
  text = written(tmp_path)
  read = Page(text)
  assert '<b>"' not in text and '<i>topk' not in text
  for shown in (
    'Sixteen experts & one <b>',
    '<i>topk</i>',
    'model',
    'E',
    'router.name',
    '"><script>alert(1)</script>',
    'corpus_sha256',
    'abc',
    'versions.jax',
    '2 \u00d7 cpu',
    'gmm ragged_dot',
  ):
    assert shown in read.texts, shown
  # Of the config a table of the run's own values, and one of each group.
  texts = [t for t in read.texts if t.strip()]
  at = texts.index('run')
  assert texts[at : at + 6] == ['run', 'steps', '300', 'model', 'E', '4']


def test_headline_numbers(tmp_path):
  make(tmp_path, full_run(3))
  tiles = dict(
    re.findall('<dt>([^<]*)</dt><dd>([^<]*)</dd>', written(tmp_path))
  )
  assert tiles['held-out bits/byte'] == '1.706'
  assert tiles['steps'] == '300'
  assert tiles['training tokens'] == '1.23M'
  assert tiles['tokens per second'] == '8,012'
  assert tiles['wall time'] == '3m 24s'
  assert tiles['parameters'] == '11.2M'
  assert tiles['active per token'] == '2.91M'


def test_headline_numbers_of_images_and_translations():
  summary = {'eval_accuracy': 0.8333, 'eval_bleu': 9.82, 'eval_chrf': 29.56}
  made = page.page([], {}, summary, 'run')
  tiles = dict(re.findall('<dt>([^<]*)</dt><dd>([^<]*)</dd>', made))
  assert tiles['held-out accuracy'] == '83.3%'
  assert (tiles['held-out BLEU'], tiles['held-out chrF']) == ('9.8', '29.6')


def test_same_inputs_give_the_same_bytes_and_leave_no_other_file(tmp_path):
  make(tmp_path, full_run())
  first = written(tmp_path)
  assert written(tmp_path) == first
  assert sorted(os.listdir(tmp_path)) == [
    'config.json',
    'metrics.jsonl',
    'report.html',
    'summary.json',
  ]


def test_every_figure_can_be_heard(tmp_path):
  make(tmp_path, full_run())
  text = written(tmp_path)
  assert text.count('<figure') == text.count('</figcaption>') == 12
  assert 'held-out 2 at step 100, 2 at step 300' in figure(text, 'Loss')
  assert 'expert 0) an even share' in figure(text, 'MoE layer 0')
  for label in re.findall('role="img" aria-label="([^"]*)"', text):
    assert len(label) > 20


@pytest.mark.parametrize(
  'lines',
  [
    [train_line(1)],
    [train_line(1), {'step': 1, 'eval_loss': 2.0, 'eval_bits_per_byte': 1.0}],
    [train_line(7)],
    [dense_line(1)],
    [{'step': 1, 'eval_loss': 2.0}],
    [{'step': 1}],
    [],
  ],
  ids=['train', 'train+eval', 'step 7', 'dense', 'eval', 'bare', 'none'],
)
def test_the_shortest_runs(tmp_path, lines):
  make(tmp_path, lines)
  text = written(tmp_path)
  Page(text)
  assert 'nan' not in text and 'inf' not in re.sub('base64,[^"]*', '', text)
  assert ('MoE layer 0' in text) == any('load' in x for x in lines)


def test_one_point_is_seen(tmp_path):
  make(tmp_path, [train_line(1)])
  (dots,) = re.findall(
    'class="dots".*? d="([^"]*)"', figure(written(tmp_path), 'Gradient norm')
  )
  assert re.fullmatch(r'M1000\.0 [\d.]+h0', dots)


def test_a_dense_run_has_no_router_section(tmp_path):
  make(tmp_path, [dense_line(step) for step in range(1, 50)])
  assert headings(written(tmp_path)) == ['Training', 'Config', 'All numbers']


def test_missing_values_break_a_curve_and_nothing_else(tmp_path):
  nulls = train_line(
    3,
    loss=None,
    grad_norm=None,
    load=[[None] * 4] * 2,
    entropy=[None, 0.5],
    dropped=None,
  )
  bare = {'step': 6, 'loss': None}
  make(
    tmp_path,
    [train_line(1), train_line(2), nulls, train_line(4), train_line(5), bare],
    summary=SUMMARY | {'eval_loss': None, 'tokens_per_second': None},
  )
  text = written(tmp_path)
  Page(text)
  line = re.search('class="line".*? d="([^"]*)"', figure(text, 'Loss'))[1]
  assert re.sub('[^ML]', '', line) == 'MLML'
  assert '<dt>held-out loss</dt><dd>\u2013</dd>' in text


def test_evaluations_are_one_line_although_training_lines_lie_between(tmp_path):
  make(tmp_path, full_run())
  held_out = figure(written(tmp_path), 'Held-out bits per byte')
  line = re.search('class="line".*? d="([^"]*)"', held_out)[1]
  assert re.sub('[^ML]', '', line) == 'MLL'


def test_no_summary_and_no_config_is_an_unfinished_run(tmp_path):
  metrics.Writer(tmp_path, 0).write(1, train_line(1))
  text = written(tmp_path)
  assert 'has not finished' in text and '<title>' + tmp_path.name in text


def test_a_torn_metrics_line_does_not_cost_the_report(tmp_path):
  make(tmp_path, full_run(5))
  whole = written(tmp_path)
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 6, "lo')
  assert written(tmp_path) == whole


def test_dropless_says_so_instead_of_a_flat_line(tmp_path):
  none = dict(dropped=[0.0, 0.0], overflow=[0, 0])
  make(tmp_path, [train_line(s, **none) for s in (1, 2)])
  text = written(tmp_path)
  assert 'No assignment was dropped' in text and 'No buffer overflowed' in text
  assert 'Dropped' not in text and 'Overflow' not in text


def test_rows_that_overflow_have_their_figure(tmp_path):
  make(tmp_path, [train_line(s, overflow=[0, 7]) for s in (1, 2)])
  assert 'MoE layer 1 7' in figure(written(tmp_path), 'Overflow')


def test_a_loss_nobody_foresaw_gets_its_figure(tmp_path):
  make(tmp_path, [train_line(s, orthogonality=[0.1, 0.2]) for s in (1, 2)])
  assert 'MoE layer 1 0.2' in figure(written(tmp_path), 'orthogonality')


def test_iterations_are_named(tmp_path):
  make(tmp_path, [train_line(1, L=4)], config={'model': {'iterations': 2}})
  assert 'MoE layer 1, iteration 0' in written(tmp_path)


def test_layers_may_differ_in_their_number_of_experts(tmp_path):
  make(tmp_path, [train_line(s, load=[[0.5, 0.5], [0.25] * 4]) for s in (1, 2)])
  text = written(tmp_path)
  assert '2 experts' in figure(text, 'MoE layer 0')
  assert '4 experts' in figure(text, 'MoE layer 1')


def test_a_large_run_stays_small(tmp_path):
  rng = np.random.default_rng(0)
  lines = [
    train_line(step, L=24, load=rng.dirichlet([5.0] * 64, 24))
    for step in range(10, 3000, 10)
  ]
  make(tmp_path, lines)
  assert len(written(tmp_path)) < 1_500_000


def pixels(text, title):
  """The heat map's levels by rows of experts, and its palette."""
  data = re.search('base64,([^"]*)', figure(text, title))[1]
  png = base64.b64decode(data)
  chunks, at = {}, 8
  while at < len(png):
    size = int.from_bytes(png[at : at + 4])
    body = png[at + 8 : at + 8 + size]
    assert zlib.crc32(png[at + 4 : at + 8 + size]) == int.from_bytes(
      png[at + 8 + size : at + 12 + size]
    )
    chunks[png[at + 4 : at + 8].decode()] = body
    at += 12 + size
  width = int.from_bytes(chunks['IHDR'][:4])
  rows = np.frombuffer(zlib.decompress(chunks['IDAT']), np.uint8)
  alpha = np.frombuffer(chunks['tRNS'], np.uint8)
  colour = np.frombuffer(chunks['PLTE'], np.uint8).reshape(-1, 3)
  return rows.reshape(-1, width + 1)[:, 1:], colour, alpha


def test_heat_map_shows_the_load_of_each_expert_at_each_time(tmp_path):
  make(
    tmp_path,
    [
      train_line(1, load=[[0.25] * 4]),
      train_line(2, load=[[0, 1, 0, 0]]),
      train_line(3, load=[[None] * 4]),
      train_line(4, load=[[0.5, 0.5, 0, 0]]),
    ],
  )
  level, colour, alpha = pixels(written(tmp_path), 'MoE layer 0')
  even, idle, full, missing = 16, 0, 32, figures.LEVELS
  np.testing.assert_array_equal(
    level,
    [
      [even, idle, missing, 24],
      [even, full, missing, 24],
      [even, idle, missing, idle],
      [even, idle, missing, idle],
    ],
  )
  assert alpha[even] == 0 and alpha[idle] == alpha[full] == 255
  assert colour[idle][2] > colour[idle][0]  # idle is blue
  assert colour[full][0] > colour[full][2]  # busy is red
  assert len(alpha) == missing + 1


def test_heat_map_keeps_time_to_scale_when_lines_are_uneven(tmp_path):
  busy, even = [[1, 0, 0, 0]], [[0.25] * 4]
  make(
    tmp_path,
    [train_line(1, load=busy)]
    + [train_line(step, load=even) for step in (60, 70, 80, 100)],
  )
  level, _, _ = pixels(written(tmp_path), 'MoE layer 0')
  assert level[0].tolist() == [32, 16, 16, 16, 16]


def test_heat_map_goes_on_to_an_evaluation_after_its_last_line(tmp_path):
  make(
    tmp_path,
    [
      train_line(1, load=[[1, 0, 0, 0]]),
      train_line(2, load=[[0.25] * 4]),
      {'step': 10, 'eval_loss': 2.0},
    ],
  )
  level, _, _ = pixels(written(tmp_path), 'MoE layer 0')
  assert level.shape == (4, 2) and level[0, 1] == 16


def test_thinning_keeps_the_spikes_and_the_order():
  points = [(x, x * 7919 % 101 / 101) for x in range(1, 20_001)]
  points[12_345] = (12_346, 99.0)
  thin = figures._thin(points)
  assert (12_346, 99.0) in thin and len(thin) <= 1100
  assert thin == sorted(thin)


def test_smoothing_keeps_a_straight_line_straight():
  points = [(x, 3.0 - 0.01 * x) for x in range(1, 201)]
  smooth = page._smooth(points)
  assert [x for x, _ in smooth] == [x for x, _ in points]
  np.testing.assert_allclose(
    [y for _, y in smooth][:190], [y for _, y in points][:190]
  )


@pytest.mark.parametrize(
  'lo, hi',
  [
    (0, 1),
    (0, 3),
    (0, 2000),
    (0, 1e12),
    (1.4, 5.6),
    (-3e-4, 1e-3),
    (0.9999, 1.0001),
    (0, 9.99e-5),
  ],
)
def test_marks_are_few_round_and_inside(lo, hi):
  marks = figures._round_values(lo, hi, 5)
  assert 2 <= len(marks) <= 6
  assert all(lo - 1e-12 <= x <= hi * (1 + 1e-9) for x in marks)


@pytest.mark.parametrize(
  'x, text',
  [
    (0, '0'),
    (1e-3, '1e-3'),
    (2.5e-4, '2.5e-4'),
    (0.05, '0.05'),
    (1500, '1,500'),
    (20000, '20k'),
    (2e6, '2M'),
    (-3e-12, '-3e-12'),
  ],
)
def test_labels(x, text):
  assert figures.tick(x) == text
