"""Equality with the authors' own numbers: a case for every golden file."""

import golden
import golden_coe
import golden_momentum
import golden_rexmoe
import golden_thor
import jax
import pytest

# Which check claims a file: the longest prefix of its name wins.
CHECKS = {
  **golden_coe.CHECKS,
  **golden_momentum.CHECKS,
  **golden_rexmoe.CHECKS,
  **golden_thor.CHECKS,
}
FILES = sorted(golden.DIRECTORY.glob('*.npz'))


def test_there_are_golden_files():
  assert FILES, f'{golden.DIRECTORY} has no .npz; unset MOE_GOLDEN_DIR?'


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_equals(path):
  prefixes = [prefix for prefix in CHECKS if path.stem.startswith(prefix)]
  assert prefixes, f'no check claims {path.name}'
  with jax.enable_x64(True):
    CHECKS[max(prefixes, key=len)](golden.Golden(path))
