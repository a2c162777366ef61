"""What cannot run is said in one line, before anything is compiled."""

import numpy as np
import pytest

from moe_jax import config
from moe_jax.routers import topk
from moe_jax.training import jobs
from tests.helpers.small import small_config

WRONG = {
  'model.router.group': (
    10,
    r'group=10 does not divide the 16 tokens of a row',
  ),
  'batch_size': (0, 'batch_size=0'),
  'steps': (0, 'steps=0'),
  'seq_len': (1, 'seq_len=1'),
  'log_every': (-1, 'log_every=-1'),
  'model.router.k': (5, 'k is 5.*4 experts'),
  'model.router.capacity': (0.0, 'capacity=0.0'),
  'model.router.score': ('tanh', "'tanh'"),
  'model.H': (3, r'H \(3\) does not divide D \(16\)'),
  'model.attention.num_kv_heads': (
    3,
    r'num_kv_heads \(3\) does not divide H \(2\)',
  ),
  'model.attention.name': ('sparse', "'sparse'.*gqa"),
  'model.norm': ('batch', "norm='batch'.*rms"),
  'model.init': ('zero', "init='zero'.*lecun"),
  'model.routing': ('never', "routing='never'.*each"),
  'model.dropout': (1.0, 'dropout=1.0'),
  'model.pattern': ('mx', "pattern='mx'"),
  'model.first_dense': (3, 'first_dense=3.*N=2'),
  'model.layers_per_pool': (3, r'layers_per_pool \(3\).*MoE layers \(2\)'),
  'model.activation': ('tanh', "activation='tanh'.*swiglu"),
  'model.residual.name': ('leaky', "'leaky'.*heavy_ball"),
  'model.inner_residual': ('sum', "'sum'.*replace"),
  'model.name': ('rnn', "'rnn'.*decoder"),
  'model.gmm': ('gpu', "'gpu' on cpu.*xla"),
  'model.dtype': ('float16', "dtype='float16'"),
  'model.eps': (-1.0, r'eps=-1.0 .*\(0, inf\)'),
  'model.attention.theta': (0.0, r'theta=0.0 .*\(1, inf\)'),
  'model.router.bias_rate': (-0.1, r'bias_rate=-0.1 .*\[0, inf\)'),
  'objective.smoothing': (1.5, r'smoothing=1.5 .*\[0, 1\]'),
  'objective.losses.balance': (-1.0, r'losses.balance=-1.0 .*\[0, inf\)'),
  'optimizer.b1': (1.5, r'b1=1.5 .*\[0, 1\)'),
  'optimizer.b2': (1.0, r'b2=1.0 .*\[0, 1\)'),
  'optimizer.eps': (-1.0, r'eps=-1.0 .*\(0, inf\)'),
  'mesh.tensor': (0, 'mesh.tensor=0: a size is at least 1, or -1'),
  'mesh.data': (16, 'data=16.*16 devices.*8'),
  'mesh.fsdp': (3, 'batch_size=8.*3'),
  'mesh.expert': (8, 'mesh.expert=8.*model.E=4'),
  'optimizer.accumulate': (3, 'batch_size=8.*accumulate=3'),
  'optimizer.schedule': ('linear', "'linear'.*cosine"),
  'optimizer.warmup': (1.5, 'warmup=1.5'),
  'objective.name': ('gan', "'gan'.*next_token"),
  'parallel.strategy': ('ring', "'ring'.*local"),
  'parallel.buffer_factor': (0.0, 'factor=0.0'),
  'data.source': ('web', "'web'"),
  'data.path': ('/no/such/file', '/no/such/file'),
}


def test_a_kernel_that_has_not_the_dtype_is_refused_first(
  tmp_path, monkeypatch
):
  """On a GPU, before data are read: a named one is not another."""
  monkeypatch.setattr(jobs.ops, 'choose_gmm', lambda impl, *_: 'gpu')
  c = small_config('/no/such/file')
  with pytest.raises(ValueError, match=r"'gpu' has bfloat16.*not float32"):
    jobs.prepare(c, str(tmp_path / 'run'))


def test_several_processes_leave_no_device_idle(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(jobs.jax, 'process_count', lambda: 2)
  told = r'mesh of 2 devices.*2 processes have 8'
  with pytest.raises(ValueError, match=told):
    jobs.prepare(small_config(corpus, mesh__data=2), str(tmp_path))
  assert jobs.prepare(small_config(corpus, mesh__data=8), str(tmp_path))


def test_data_and_model_must_fit(corpus, tmp_path):
  c = small_config(corpus)
  c.model = config.model('translator')
  told = r"'text' is for the model 'decoder', model.name is 'translator'"
  with pytest.raises(ValueError, match=told):
    jobs.prepare(c, str(tmp_path))


def test_translations_need_a_router_that_writes(tmp_path):
  path = tmp_path / 'pairs.tsv'
  path.write_text(''.join(f'word {i}\tother {i}\n' for i in range(60)))
  c = config.default()
  c.batch_size, c.seq_len = 2, 16
  c.data = config.source('pairs', path=str(path), vocab_size=280)
  c.data.bleu_lines = 4
  c.model = config.model('translator', N=1, encoder_N=1, D=16, H=2, E=2)
  c.model.router = config.router('expert_choice')
  told = "data.bleu_lines=4: the router 'expert_choice' looks at later tokens"
  with pytest.raises(ValueError, match=told):
    jobs.prepare(c, str(tmp_path / 'run'))
  c.data.bleu_lines = 0
  assert jobs.prepare(c, str(tmp_path / 'run'))


def test_a_dense_model_needs_no_router_that_could_be(corpus, tmp_path):
  c = small_config(corpus, model__pattern='d', model__E=1)
  assert jobs.prepare(c, str(tmp_path / 'run'))


def test_a_router_of_the_users_that_looks_ahead_does_not_write():
  class Ahead(topk.Router):
    causal = False

  class Sure(topk.Router):
    causal, writes = False, True

  assert not Ahead.writes and Sure.writes and topk.Router.writes


def test_a_router_is_tried_on_the_rows_that_it_will_see(corpus, tmp_path):
  """With options that are lists, and tokens in pieces of 64."""
  c = small_config(corpus)
  c.model.router = config.router(f'{__name__}.Pieces', k=1, sizes=[4, 2])
  assert jobs.prepare(c, str(tmp_path / 'run'))


class Pieces(topk.Router):
  """Looks at pieces of 64 tokens."""

  def __init__(self, D, E, *, k=1, sizes=(), rngs):
    super().__init__(D, E, k=k, rngs=rngs)

  def __call__(self, x_TxD, ctx, memory):
    x_TxD.reshape(-1, 64, x_TxD.shape[1])
    return super().__call__(x_TxD, ctx, memory)


def test_a_patch_is_tried_on_the_images_that_are_read(tmp_path):
  """Not on those that stood for them before: 7 divides 28 and not 8."""
  draw = np.random.default_rng(0)
  images = draw.integers(0, 256, (20, 28, 28), np.uint8)
  path = tmp_path / 'images.npz'
  np.savez(path, images=images, labels=np.arange(20) % 2)
  c = config.default()
  c.batch_size = 2
  c.data = config.source('images', path=str(path), eval_fraction=0.3)
  c.model = config.model('classifier', D=16, H=2, E=2, patch=7)
  assert jobs.prepare(c, str(tmp_path / 'run')).model.c.tokens == 17
  c.model.patch = 8
  with pytest.raises(ValueError, match=r'patch \(8\).*rows.*\(28\)'):
    jobs.prepare(c, str(tmp_path / 'run'))


def test_what_a_router_refuses_at_a_step_is_told_before_the_first(
  corpus, tmp_path
):
  """Which of the two comes first depends on the steps of the run."""
  c = small_config(corpus, steps=100)
  c.model.router = config.router('rexmoe', first=2, start=0.5, end=7)
  with pytest.raises(ValueError, match='from step 50 to 7, before it'):
    jobs.prepare(c, str(tmp_path / 'run'))
  c.steps = 8
  assert jobs.prepare(c, str(tmp_path / 'run'))


@pytest.mark.parametrize('key', WRONG)
def test_one_line_with_the_values(key, corpus, tmp_path):
  value, message = WRONG[key]
  c = small_config(corpus)
  c.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message) as error:
    jobs.prepare(c, str(tmp_path / 'run'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_an_unknown_key_names_the_nearest(corpus, tmp_path):
  c = small_config(corpus)
  c.model.experts_F = 8
  with pytest.raises(ValueError, match=r"'model.experts_F'.*'model.expert_F'"):
    jobs.prepare(c, str(tmp_path))


def test_a_router_option_that_does_not_exist():
  with pytest.raises(ValueError, match=r"switch.*'capcity'.*'capacity'"):
    config.router('switch', capcity=2.0)


def test_a_corpus_too_small_for_one_batch(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text('a line\n' * 20)
  with pytest.raises(ValueError, match='too small for one batch'):
    jobs.prepare(small_config(path), str(tmp_path / 'run'))


def test_a_file_where_the_work_directory_should_be(corpus):
  with pytest.raises(ValueError, match='is a file'):
    jobs.prepare(small_config(corpus), str(corpus))


def test_files_of_an_unknown_run_are_not_touched(corpus, tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl but no config\.json'):
    jobs.prepare(small_config(corpus), str(tmp_path))
