"""What the bench `fused` reads of a compiled program, without libtpu."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches.fused import layers, tpu
from pallas_kernels import tiling
from pallas_kernels.tools import traffic

# The forms that libtpu prints: tiles of layouts, VMEM, asynchronous gathers.
ROWS, TOKENS = (f'bf16[{n},2048]{{1,0:T(8,128)(2,1)}}' for n in (64, 8192))
IDS, SUMS = 's32[64]{0:T(128)}', 'f32[1,16,128]{2,1,0:T(8,128)}'
THIN = 'f32[12,1]{1,0:T(8,128)}'
PROGRAM = f"""HloModule jit_run, is_scheduled=true

%gathers (p: bf16[8192,2048], i: s32[64]) -> bf16[64,2048] {{
  %p = {TOKENS} parameter(0)
  %i = {IDS} parameter(1)
  ROOT %gather.1 = {ROWS} gather(%p, %i), slices
}}

%other (a: bf16[64,2048]) -> bf16[64,2048] {{
  ROOT %a = {ROWS} parameter(0)
}}

ENTRY %main.3 (x: bf16[8192,2048], g: s32[64]) -> (bf16[64,2048]) {{
  %x = {TOKENS} parameter(0), metadata={{op_name="x"}}
  %g = {IDS} parameter(1), backend_config={{"a":[]}}
  %start = ((), (), (s32[1]{{0:T(128)S(2)}})) call-start(), to_apply=%called
  %update = (({TOKENS}, {IDS}), {ROWS}) call-update(%start, %x, %g), a={{}}
  %done.x = {ROWS} call-done(%update), b={{"c":[]}}
  %here = {ROWS} fusion(%x, %g), kind=kCustom, calls=%gathers
  %twice = {ROWS} fusion(%done.x, %here), kind=kLoop, calls=%other
  %vmem = s32[64]{{0:T(128)S(1)}} fusion(%g), kind=kLoop, calls=%other
  %gmm.4 = ({ROWS}, {SUMS}) custom-call(%vmem, %twice), target="tpu"
  %part = {ROWS} get-tuple-element(%gmm.4), index=0
  %thin = {THIN} copy(%g)
  ROOT %out = ({ROWS}, {THIN}) tuple(%part, %thin)
}}
"""


def test_bytes_are_those_of_what_is_no_kernel():
  entry = tpu.parse(PROGRAM)
  rows = 64 * 2048 * 2
  ids = 128 * 4  # a whole tile of lanes
  assert tpu.others(entry) == {
    'done.x': 2 * rows,  # a gather reads what it writes
    'here': 2 * rows + ids,
    'twice': 3 * rows,
    'vmem': ids,
    'thin': ids + 16 * 128 * 4,
  }
  (kernel,) = [i for i in entry if i.kind == 'custom-call']
  assert kernel.name == 'gmm.4' and kernel.outs == ('64,2048', '1,16,128')


def test_every_kernel_of_a_layer_is_known():
  """Which it is, by what it holds, and the products that it computes."""
  size = layers.Layer(T=64, D=256, E=4, K=2, F=128)
  f = tpu.slopes(layers.layer(size, 'fused', gmm='interpret'))
  *known, expert_TxK = layers.arguments(size, 'bfloat16')
  expert_TxK = np.arange(128, dtype=np.int32).reshape(64, 2) % 4
  walks = traffic.walks(f, *known, expert_TxK)
  found = {}
  for walk in walks:
    kernel, shape = tpu._kernel(walk)
    found.setdefault(walk.name, []).append((kernel, shape))
  up, down = (128, 256, 128, 4), (128, 128, 256, 4)
  assert {k: sorted(v) for k, v in found.items()} == {
    'into': [(tiling.into(2), up)],
    'gmm': [(tiling.FWD, down)],
    'slope': [(tiling.slope(2), down)],
    'drhs': [(tiling.DRHS, down), (tiling.DRHS, up), (tiling.DRHS, up)],
    'dlhs': [(tiling.dlhs(2), up)],
  }


def test_the_gradient_waits_for_the_answer():
  """Or the backward pass's gathers would be done, and kept, before it."""
  f = lambda weights, x, gate, expert: x * weights['w'] * gate[0, 0]
  args = {'w': jnp.float32(3.0)}, jnp.float32(2.0), jnp.full((1, 1), 5.0), None
  weights, x, gate = jax.jit(tpu.slopes(f))(*args)
  np.testing.assert_allclose([weights['w'], x, gate[0, 0]], [300, 450, 180])
