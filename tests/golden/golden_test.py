"""Equality with the authors' own numbers: a case for every golden file."""

import os

import jax
import pytest

from tests.helpers import (
  golden,
  golden_coe,
  golden_momentum,
  golden_rexmoe,
  golden_thor,
)

# Which check claims a file: the longest prefix of its name wins.
CHECKS = {
  **golden_coe.CHECKS,
  **golden_momentum.CHECKS,
  **golden_rexmoe.CHECKS,
  **golden_thor.CHECKS,
}
FILES = sorted(golden.DIRECTORY.glob('*.npz'))
OURS = not os.environ.get('MOE_GOLDEN_DIR')

# Files that run with -m slow. Each of their settings is also in a file that
# always runs: a flag, a block, a residual rule, a pool's shape, a task; of a
# number one value that is not the library's default is enough. A file with a
# setting of its own is not slow, nor are the whole models that .ci/run has on
# the newest jax. Of another directory, by MOE_GOLDEN_DIR, no file is slow.
SLOW = (
  # Always: both residuals, one, none; 1 to 3 iterations; 0 to 2 shared experts;
  # one router or several; gates renormalised or scaled; both balance losses.
  'coe_it1_in_sh0_s0',
  'coe_it1_in_sh1_s0',
  'coe_it2_both_sh1_s0',
  'coe_it2_in_noig_sh1_s0',
  'coe_it2_in_sh0_s0',
  'coe_it2_in_sh1_s0',
  'coe_it2_out_sh1_s0',
  'coe_it3_in_sh1_s0',
  # Always: every rule, both blocks, the balance loss.
  'momentum_adam_preln_s0',
  'momentum_adam_s0',
  'momentum_mom_mu09_s0',
  'momentum_mom_s0',
  'momentum_robust_s0',
  'momentum_smoe_preln_s0',
  'momentum_smoe_s0',
  # Always: a model with dense layers and one without.
  'momentum_lm_adam_s0',
  'momentum_lm_glam_smoe_s0',
  'momentum_lm_smoe_s0',
  # Always: with and without momentum, with and without room for all tokens.
  'momentum_vmoe_base_s0',
  'momentum_vmoe_mom_mu09_s0',
  'momentum_vmoe_robust_cap_s0',
  'momentum_vmoe_robust_s0',
  # Always: a pool of 2 layers in all stages; stacks of pools of 1 to 4.
  'rexmoe_layer_r1_full_s0',
  'rexmoe_layer_r4_full_s0',
  'rexmoe_layer_r4_mid_s0',
  'rexmoe_layer_r4_start_s0',
  'rexmoe_stack_L4_r2_full_s0',
  'rexmoe_stack_L4_r2_mid_s0',
  'rexmoe_stack_L4_r2_start_s0',
  # Always: this block in training, and the other one in inference.
  'thor_enclayer_infer_pre_s0',
)


def case(path):
  marks = [pytest.mark.slow] if OURS and path.stem in SLOW else []
  return pytest.param(path, marks=marks, id=path.stem)


def test_there_are_golden_files():
  assert FILES, f'{golden.DIRECTORY} has no .npz; unset MOE_GOLDEN_DIR?'
  if OURS:
    assert set(SLOW) < {path.stem for path in FILES}


@pytest.mark.parametrize('path', [case(path) for path in FILES])
def test_equals(path):
  prefixes = [prefix for prefix in CHECKS if path.stem.startswith(prefix)]
  assert prefixes, f'no check claims {path.name}'
  with jax.enable_x64(True):
    CHECKS[max(prefixes, key=len)](golden.Golden(path))
