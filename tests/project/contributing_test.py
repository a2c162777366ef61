"""What CONTRIBUTING.md shows is run as it stands."""

import pathlib
import re

import jax
import numpy as np
from flax import nnx

from moe_jax import config, routers
from moe_jax.training import jobs, loop
from tests.helpers.small import small_config

TEXT = (pathlib.Path(__file__).parents[2] / 'CONTRIBUTING.md').read_text()
ROUTER, CONFIG = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def test_its_router_is_found_trains_and_is_noisy(corpus, tmp_path, monkeypatch):
  (tmp_path / 'noisy.py').write_text(ROUTER)
  monkeypatch.setattr(routers, '__path__', [*routers.__path__, str(tmp_path)])
  assert 'noisy' in routers.names()
  c = small_config(corpus)
  c.model.router = config.router('noisy', k=2)
  summary = loop.run(jobs.prepare(c, str(tmp_path / 'run')))
  assert summary['eval_loss'] < summary['initial_loss'] - 0.2

  x_TxD = np.float32(np.random.default_rng(1).normal(size=(32, 8)))
  batch = {
    'ids_BxL': np.zeros((2, 16), np.int32),
    'pos_BxL': np.zeros((2, 16), np.int32),
    'row_B': np.arange(2, dtype=np.int32),
  }

  @jax.jit
  def route(seed, x_TxD):
    router = routers.get('noisy')(8, 4, rngs=nnx.Rngs(0))
    ctx = routers.context(batch, jax.random.key(seed), 0, train=True)
    return router(x_TxD, ctx, ())[1]['route']

  segment_BxL = np.where(np.arange(16) < 11, 0, -1)[None].repeat(2, 0)
  ctx = routers.context(
    {**batch, 'segment_BxL': segment_BxL}, jax.random.key(0), 0, train=True
  )
  plan, aux, _ = routers.get('noisy')(8, 4, rngs=nnx.Rngs(0))(x_TxD, ctx, ())
  assert int(plan.num_routed()) == int(aux['load_E'].sum()) == 2 * 11 * 2
  assert not np.array_equal(route(0, x_TxD), route(1, x_TxD))
  assert np.array_equal(route(0, x_TxD), route(0, x_TxD))


def test_its_config_is_one(monkeypatch, tmp_path):
  (tmp_path / 'noisy.py').write_text(ROUTER)
  monkeypatch.setattr(routers, '__path__', [*routers.__path__, str(tmp_path)])
  names = {}
  exec(CONFIG, names)
  c = config.resolve(names['get_config']())
  assert c['model']['router'] == {'name': 'noisy', 'k': 2}
