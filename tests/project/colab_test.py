"""The notebooks: stripped, linked to themselves, and run top to bottom."""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest
from jupyter_client import kernelspec, manager

ROOT = pathlib.Path(__file__).parents[2]
# What each must have printed when it has run.
SAID = {
  'route_one_batch': 'the whole model, replayed, has the same logits',
  'write_a_router': 'finished already: runs/my_router',
  'compare_two_variants': '3 seeds: the claim is ',
  'tour_of_the_kernels': 'tpu, interpreted: both gradients agree',
}
COLAB = 'https://colab.research.google.com/github/moe-jax/moe_jax/blob/main/'


def read(name):
  path = ROOT / 'colab' / f'{name}.ipynb'
  return nbformat.read(path, nbformat.NO_CONVERT)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_all_notebooks_are_known_and_listed():
  names = {path.stem for path in (ROOT / 'colab').rglob('*.ipynb')}
  assert names == set(SAID)
  listed = (ROOT / 'colab' / 'README.md').read_text()
  assert set(re.findall(r'\((\w+)\.ipynb\)', listed)) == names
  assert set(re.findall(rf'\({COLAB}colab/(\w+)\.ipynb\)', listed)) == names


@pytest.mark.parametrize('name', SAID)
def test_it_is_stripped_and_sound(name):
  notebook = read(name)
  nbformat.validate(notebook)
  assert notebook.nbformat == 4 and notebook.nbformat_minor >= 5  # has ids
  assert set(notebook.metadata) == {'kernelspec', 'language_info'}
  assert notebook.metadata.kernelspec.name == 'python3'
  assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
  assert not any(cell.metadata for cell in notebook.cells)
  for cell in code(notebook):
    assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize('name', SAID)
def test_its_links_lead_to_files(name):
  notebook = read(name)
  first = notebook.cells[0]
  assert first.cell_type == 'markdown' and first.source.startswith('# ')
  assert f']({COLAB}colab/{name}.ipynb)' in first.source
  text = '\n'.join(cell.source for cell in notebook.cells)
  home = COLAB.replace('colab.research.google.com/github', 'github.com')
  for link in re.findall(r'\]\(([^)]+)\)', text):
    if link.startswith((COLAB, home)):
      assert (ROOT / link.removeprefix(COLAB).removeprefix(home)).exists(), link
    elif not link.startswith('https://'):
      assert (ROOT / 'colab' / link).exists(), link


def test_all_install_alike_and_say_what_runs():
  notebooks = [read(name) for name in SAID]
  (install,) = {code(notebook)[0].source for notebook in notebooks}
  assert "find_spec('moe_jax') is None:\n  %pip install -q git+" in install
  # A pin could take the runtime's own jax or numpy down.
  assert not re.search(r'[=<]=|<\d|--force|--upgrade|-U', install)
  for notebook in notebooks:
    assert 'ops.choose_gmm(None)' in code(notebook)[1].source
    assert code(notebook)[1].source.count('%pip') == 0
    text = ' '.join(' '.join(c.source.split()) for c in notebook.cells)
    assert 'run on a TPU or a GPU yet' in text
    for kernel in ('`cpu`', '`tpu`', '`xla`'):
      assert kernel in text


@pytest.mark.slow
@pytest.mark.parametrize('name', SAID)
def test_it_runs_top_to_bottom(name, tmp_path):
  notebook = read(name)
  # ipykernel's own spec, whatever others a user has: this very Python.
  specs = kernelspec.KernelSpecManager(kernel_dirs=[])
  kernel = manager.AsyncKernelManager(
    kernel_name='python3', kernel_spec_manager=specs
  )
  client = nbclient.NotebookClient(
    notebook,
    km=kernel,
    timeout=600,
    resources={'metadata': {'path': str(tmp_path)}},
  )
  paths = lambda first, old: os.pathsep.join(filter(None, [first, old]))
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',  # not the devices that tests pretend to have
    'MOE_JAX_CACHE': str(tmp_path / 'cache'),
    'PIP_NO_INDEX': '1',
    'PATH': paths(os.path.dirname(sys.executable), os.environ.get('PATH')),
    'PYTHONPATH': paths(str(ROOT), os.environ.get('PYTHONPATH')),
  }
  client.execute(env=environment, cleanup_kc=True)
  printed, pictures = '', 0
  for cell in code(notebook):
    assert cell.execution_count
    kinds = [kind for out in cell.outputs for kind in out.get('data', ())]
    assert ('image/png' in kinds) == ('plt.show()' in cell.source)
    pictures += 'image/png' in kinds
    printed += ''.join(out.get('text', '') for out in cell.outputs)
  assert SAID[name] in printed and 'Warning' not in printed
  assert pictures
