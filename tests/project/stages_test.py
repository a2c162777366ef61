"""Which slow parts of CI a change needs, by .ci/stages.py."""

import importlib.util
import json
import pathlib
import re
import subprocess

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('stages', ROOT / '.ci/stages.py')
stages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stages)

FILES = {
  'setup.cfg': 'install_requires =\n    jax>=0.10\n',
  'README.md': 'A library.\n',
  'configs/tiny.py': 'from moe_jax import config\n',
  'moe_jax/__init__.py': '',
  'moe_jax/main.py': 'from moe_jax import config\n',
  'moe_jax/config.py': "from moe_jax import routers\nDEFAULT = 'topk'\n",
  'moe_jax/report.py': '',
  'moe_jax/routers/__init__.py': '',
  'moe_jax/routers/topk.py': '',
  'moe_jax/routers/hash.py': 'from moe_jax import report\n',
  'pallas_kernels/cpu.py': '',
  'pallas_kernels/tpu.py': '',
  'experiments/checks/faults/__main__.py': "RUN = '-m moe_jax.main'\n",
  'tests/conftest.py': '',
  'tests/helpers/small.py': 'from moe_jax import config\n',
  'tests/golden/a.npz': 'numbers',
  'tests/golden/golden_test.py': 'from tests.helpers import small\n',
  'tests/commands/main_test.py': (
    'import pytest\nfrom tests.helpers.small import command\npytest.mark.slow\n'
  ),
  'tests/layers/routers_test.py': (
    'from moe_jax import routers\nrouters.names()\n'
  ),
  'tests/models/systems_test.py': (
    "from tests.helpers import small\npytest.mark.slow\nX = 'hash'\n"
  ),
  'tests/training/processes_test.py': (
    "pytest.mark.slow\nRUN = '''\nfrom moe_jax import report\n'''\n"
  ),
  'tests/project/colab_test.py': 'import pytest\npytest.mark.slow\n',
  'tests/kernels/aot_test.py': "KERNEL = 'interpret'\n",
  'colab/hashes.ipynb': json.dumps(
    {
      'cells': [
        {'cell_type': 'markdown', 'source': ['not Python']},
        {'cell_type': 'code', 'source': ['%pip install x\n', "R = 'hash'"]},
        {'cell_type': 'code', 'source': ['%%bash\n', 'ls *']},
      ]
    }
  ),
}
NOW = {name: {'jax': '0.12', 'flax': '1.0'} for name in ('env', 'newer')}
HASHES = 'slow tests/project/colab_test.py::test_it_runs_top_to_bottom[hashes]'


class Checkout:
  """A small repository, all of whose parts passed at its first commit."""

  def __init__(self, root):
    self.root = root
    for name, text in FILES.items():
      self.write(name, text)
    self.git('init', '--quiet')
    self.commit()
    commit = self.git('rev-parse', 'HEAD')
    passed = json.dumps({'commit': commit, 'packages': NOW})
    self.write('.ci/passed', passed)
    self.commit()

  def write(self, name, text):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)

  def git(self, *arguments):
    who = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
    command = ['git', '-C', str(self.root), *who, *arguments]
    return subprocess.run(
      command, capture_output=True, text=True, check=True
    ).stdout.strip()

  def commit(self):
    self.git('add', '--all')
    self.git('commit', '--quiet', '--allow-empty', '--message=x')

  def found(self, versions=NOW, every=False):
    """{part: why} of those that run, and of those that do not."""
    runs, left = {}, {}
    for part, why, wanted in stages.select(self.root, versions, every):
      (runs if wanted else left)[str(part)] = why
    return runs, left


@pytest.fixture
def checkout(tmp_path):
  return Checkout(tmp_path)


def test_without_a_change_nothing_runs_and_all_say_why(checkout):
  runs, left = checkout.found()
  assert not runs
  assert {'job', 'faults', HASHES, 'newer tests/layers/routers_test.py'} <= set(
    left
  )
  assert all('none of its' in why for why in left.values())


def test_a_document_changes_nothing(checkout):
  checkout.write('README.md', 'Another.\n')
  checkout.write('docs/new.md', 'A page.\n')
  checkout.commit()
  assert not checkout.found()[0]


@pytest.mark.parametrize(
  'path, expected',
  [
    # The default router is that of every run; another, of who names it.
    (
      'moe_jax/routers/topk.py',
      'job, faults, newer routers, newer golden, slow main, slow systems',
    ),
    ('moe_jax/routers/hash.py', 'newer routers, slow systems, hashes'),
    # Also what a router imports, and what a string runs in another process.
    (
      'moe_jax/report.py',
      'newer routers, slow systems, hashes, newer processes, slow processes',
    ),
    ('pallas_kernels/cpu.py', 'job, faults'),
    ('pallas_kernels/tpu.py', 'chips aot'),
    ('tests/golden/a.npz', 'newer golden'),
    ('tests/helpers/small.py', 'newer golden, slow main, slow systems'),
    ('colab/hashes.ipynb', 'hashes'),
    ('experiments/checks/faults/__main__.py', 'faults'),
  ],
)
def test_a_part_runs_when_a_file_that_it_reads_changed(
  checkout, path, expected
):
  short = lambda part: re.sub(
    r'tests/\w+/(\w+)_test\.py', r'\1', part.replace(HASHES, 'hashes')
  )
  checkout.write(path, checkout.root.joinpath(path).read_text() + ' \n')
  for committed in False, True:
    runs, _ = checkout.found()
    assert {short(part) for part in runs} == set(expected.split(', '))
    assert all(path in why for why in runs.values())
    if not committed:
      checkout.commit()


@pytest.mark.parametrize(
  'path', ['setup.cfg', '.ci/run', 'tests/conftest.py', 'data/words.bin']
)
def test_all_run_when_what_all_share_or_what_is_not_understood_changed(
  checkout, path
):
  checkout.write(path, 'x')
  checkout.commit()
  runs, left = checkout.found()
  assert not left and all(path in why for why in runs.values())


def test_all_run_when_a_file_is_gone(checkout):
  (checkout.root / 'moe_jax/routers/hash.py').unlink()
  checkout.commit()
  assert not checkout.found()[1]


def test_other_versions_run_the_parts_of_their_environment(checkout):
  moved = {**NOW, 'newer': {'jax': '0.13', 'flax': '1.0'}}
  runs, left = checkout.found(moved)
  assert runs and all(part.startswith('newer') for part in runs)
  assert set(runs.values()) == {'jax: other versions'}
  assert not any(part.startswith('newer') for part in left)


def test_all_run_on_demand_when_too_far_and_when_unknown(checkout):
  assert not checkout.found(every=True)[1]
  for _ in range(stages.FARTHEST - 1):
    checkout.commit()
  assert not checkout.found()[0]
  checkout.commit()
  runs, left = checkout.found()
  assert not left and '41 commits back' in runs['job']
  checkout.write('.ci/passed', '{"commit": "' + '0' * 40 + '"}')
  assert 'no commit 000000000' in checkout.found()[0]['job']
  (checkout.root / '.ci/passed').unlink()
  assert 'there is no .ci/passed' in checkout.found()[0]['job']


def test_versions_are_those_of_what_setup_cfg_asks_for(checkout, tmp_path):
  package = lambda name, version: {
    'metadata': {'name': name, 'version': version}
  }
  report = {'install': [package('JAX', '1'), package('jaxlib', '2')]}
  report['install'].append(package('certifi', '3'))
  (tmp_path / 'env.json').write_text(json.dumps(report))
  found = stages.versions(checkout.root, tmp_path, ['env'])
  assert found == {'env': {'jax': '1', 'jaxlib': '2'}}


def test_the_parts_of_this_checkout():
  """A leaf runs little; what all runs share runs all that trains."""
  tree = stages.Tree(ROOT)
  parts = stages.parts(ROOT)
  read = {str(part): tree.closure(part.roots) for part in parts}
  stages_of = lambda path: {p.split()[0] for p in read if path in read[p]}
  every = {'slow', 'job', 'faults', 'parity', 'chips', 'newer'}
  assert stages_of('moe_jax/plans.py') == every
  assert stages_of('moe_jax/routers/topk.py') == every
  assert stages_of('moe_jax/routers/switch.py') <= {'newer', 'slow'}
  assert 'newer tests/layers/routers_test.py' in read
  assert 'configs/tiny.py' in tree.reads('configs/coe.py')
  half = 'configs/paper/rexmoe_half.py'
  assert half in tree.reads('configs/paper/rexmoe_2b.py')
  assert stages_of('pallas_kernels/gpu.py') >= {'chips', 'newer'}
  # This file's own marks are strings.
  assert 'slow tests/layers/mesh_test.py' in read
  assert 'slow tests/project/stages_test.py' not in read


def test_each_test_is_in_a_tenth_and_those_of_a_case_in_one(request):
  items = request.session.items
  tenths = {item.nodeid: conftest._tenth(item) for item in items}
  assert set(tenths.values()) <= set(range(10))
  chosen = list(items)
  conftest.pytest_collection_modifyitems(Options(tenth=13), chosen)
  assert {item.nodeid for item in chosen} == {
    name for name, tenth in tenths.items() if tenth == 3
  }
  cases = {}
  for item in items:
    if hasattr(item, 'callspec'):
      cases.setdefault(item.callspec.id, set()).add(tenths[item.nodeid])
  assert cases and all(len(found) == 1 for found in cases.values())


class Options:
  """In place of pytest's."""

  def __init__(self, **values):
    self.values = values

  def getoption(self, name):
    return self.values[name.strip('-')]
