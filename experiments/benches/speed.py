"""Tokens a second beside PyTorch on CPU: a MoE layer, a whole training step.

  python -m experiments.benches.speed --what=layer,step --json=speed.jsonl

`layer` is router, softmax top-k, dispatch, SwiGLU experts and combine, forward
and backward to x and to all weights: moe_jax's parts against the sparse block
of Qwen3-MoE in transformers, with grouped_mm (torch's own grouped product) and
eager (a Python loop over experts). All get the same numbers, and the run stops
unless their answers and gradients agree. moe_jax with gmm 'xla' is E-fold work
and memory on CPU; --xla times it, in one turn, for the layer of 8 experts.

`step` is forward, backward, clipping and AdamW of a decoder with tied
embeddings and a balancing loss, dropless: programs.make_step against
Qwen3MoeForCausalLM with sdpa and fused AdamW, on the same batches of text. What
differs: Qwen3 normalises queries and keys, which cannot be turned off; ours
adds a z-loss and keeps documents apart. PyTorch runs eagerly, as transformers
comes. The row `bfloat16` computes in it, from float32 parameters.

Both keep the memory that they free, as moe-train does
(malloc.retain_freed_memory): without it, each step takes it from the operating
system again, page by page.

Each framework has a process of its own, which sleeps on a pipe until it is told
to do a turn, so that one of them works at a time, with a thread for each core.
(Both in one process gave ratios no different beyond the noise; but there they
share an allocator, and the idle one's threads may spin.) A turn is one call
that does not count, which brings threads and caches back, and one that does. In
a round every row has a turn, in rotating order; ratios are to torch grouped_mm
in the same round. The machine must be idle, or they mean nothing: on one that
was busy PyTorch lost several times more than XLA. `load`, the mean number of
running processes in the minute before, stands in each line of results.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import tempfile
import time
import traceback
from importlib import metadata
from typing import NamedTuple

import numpy as np
from absl import flags

from pallas_kernels.tools import command

_WHAT = flags.DEFINE_list('what', 'layer,step', 'What is timed.')
_ROUNDS = flags.DEFINE_integer('rounds', 10, 'Turns of each.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'A file that gets a line a result.')
_XLA = flags.DEFINE_bool('xla', False, 'Also ragged_dot, once, for 8 experts.')

EXTRA = 'torch'  # of this package: torch and transformers


class Layer(NamedTuple):
  """T tokens of width D; K of E experts of hidden width F for each."""

  T: int
  D: int
  E: int
  K: int
  F: int

  @property
  def tokens(self):
    return self.T


class Step(NamedTuple):
  """B rows of L tokens, of V, through N such layers with H heads."""

  B: int
  L: int
  D: int
  E: int
  K: int
  F: int
  N: int
  H: int
  V: int

  @property
  def tokens(self):
    return self.B * self.L


LAYERS = (Layer(4096, 512, 8, 2, 1024), Layer(4096, 512, 64, 8, 256))
STEP = Step(B=16, L=256, D=256, E=16, K=2, F=512, N=4, H=4, V=8192)
BATCHES = 8  # of text, again and again
RATE, DECAY, CLIP, BETAS = 1e-3, 0.1, 1.0, (0.9, 0.95)  # of both AdamWs
BALANCE = 0.01  # weight of both balancing losses
RIVAL = 'torch grouped_mm'

# What a worker makes: (a call that does the work once, facts about it). Imports
# are inside, so that no process loads the other's framework.


def layer_draws(size):
  """The arrays of a layer; weights as moe_jax holds them."""
  T, D, E, _, F = size
  rng = np.random.default_rng(0)
  draw = lambda *s: rng.standard_normal(s, np.float32)
  return {
    'x_TxD': draw(T, D),
    'dy_TxD': draw(T, D),
    'w_DxE': draw(D, E) * 0.02,
    'gate_ExDxF': draw(E, D, F) * D**-0.5,
    'up_ExDxF': draw(E, D, F) * D**-0.5,
    'down_ExFxD': draw(E, F, D) * F**-0.5,
  }


def jax_layer(size, gmm):
  """The facts are the answer and all gradients."""
  import jax
  from flax import nnx

  from moe_jax import experts, ops, parallel, routers

  T, D, E, K, F = size
  draws = layer_draws(size)
  x_TxD, dy_TxD = jax.device_put((draws['x_TxD'], draws['dy_TxD']))
  gmm = functools.partial(ops.gmm, impl=gmm)
  rngs = nnx.Rngs(0)
  modules = nnx.Dict(
    router=routers.get('topk')(D, E, k=K, rngs=rngs),
    experts=experts.get('mlp')(
      E, D, F, activation='swiglu', gmm=gmm, rngs=rngs
    ),
  )
  graph, params = nnx.split(modules)
  params = nnx.to_pure_dict(params)
  for part in params.values():
    part.update({name: jax.device_put(draws[name]) for name in part})
  ids_BxL = np.zeros((1, T), np.int32)
  batch = {'ids_BxL': ids_BxL, 'pos_BxL': ids_BxL, 'row_B': ids_BxL[:, 0]}
  ctx = routers.context(batch, jax.random.key(0), 0, train=True)

  def answer(params, x_TxD):
    layer = nnx.merge(graph, params)
    plan, _, _ = layer['router'](x_TxD, ctx, ())
    return parallel.Layout()(x_TxD, plan, layer['experts'])[0]

  @jax.jit
  def run(params, x_TxD, dy_TxD):
    y_TxD, pull = jax.vjp(answer, params, x_TxD)
    return y_TxD, *pull(dy_TxD)

  def call():
    jax.block_until_ready(run(params, x_TxD, dy_TxD))

  y_TxD, d_params, dx_TxD = jax.device_get(run(params, x_TxD, dy_TxD))
  facts = {'y_TxD': y_TxD, 'x_TxD': dx_TxD}
  return call, facts | d_params['router'] | d_params['experts']


def torch_layer(size, experts):
  """The facts are the answer and all gradients."""
  import torch
  from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen

  torch.set_num_threads(os.cpu_count())
  F = size.F
  draws = {k: torch.from_numpy(v) for k, v in layer_draws(size).items()}
  block = qwen.Qwen3MoeSparseMoeBlock(qwen_config(size, experts))
  gate_up_ExDx2F = torch.cat([draws['gate_ExDxF'], draws['up_ExDxF']], dim=2)
  with torch.no_grad():
    block.gate.weight.copy_(draws['w_DxE'].T)
    block.experts.gate_up_proj.copy_(gate_up_ExDx2F.mT)
    block.experts.down_proj.copy_(draws['down_ExFxD'].mT)
  x_1xTxD = draws['x_TxD'][None].requires_grad_()
  dy_1xTxD = draws['dy_TxD'][None]

  def answer():
    block.zero_grad()
    x_1xTxD.grad = None
    y_1xTxD = block(x_1xTxD)
    y_1xTxD.backward(dy_1xTxD)
    return y_1xTxD

  def call():
    answer()

  y_1xTxD = answer()
  gate_up_ExDx2F = block.experts.gate_up_proj.grad.mT
  facts = {
    'y_TxD': y_1xTxD.detach()[0],
    'x_TxD': x_1xTxD.grad[0],
    'w_DxE': block.gate.weight.grad.T,
    'gate_ExDxF': gate_up_ExDx2F[..., :F],
    'up_ExDxF': gate_up_ExDx2F[..., F:],
    'down_ExFxD': block.experts.down_proj.grad.mT,
  }
  return call, {name: a.numpy().copy() for name, a in facts.items()}


def qwen_config(size, experts, **more):
  from transformers import Qwen3MoeConfig

  return Qwen3MoeConfig(
    hidden_size=size.D,
    num_experts=size.E,
    num_experts_per_tok=size.K,
    moe_intermediate_size=size.F,
    norm_topk_prob=True,
    experts_implementation=experts,
    **more,
  )


def jax_job(size, dtype):
  from moe_jax import config
  from moe_jax.training import jobs

  c = config.default()
  c.batch_size, c.seq_len = size.B, size.L
  c.data.vocab_size = size.V
  c.model.update(N=size.N, D=size.D, H=size.H, dtype=dtype)
  c.model.update(E=size.E, expert_F=size.F)
  c.model.router = config.router('topk', k=size.K)
  c.objective.losses.balance = BALANCE
  c.optimizer.update(schedule='constant', warmup=0.0, learning_rate=RATE)
  c.optimizer.update(weight_decay=DECAY, clip=CLIP, b1=BETAS[0], b2=BETAS[1])
  with tempfile.TemporaryDirectory() as workdir:
    return jobs.prepare(c, workdir)


def jax_batches(size):
  """Nothing to time; the facts are the batches."""
  batches = jax_job(size, 'float32').train_batches()
  return None, list(itertools.islice(batches, BATCHES))


def jax_step(size, batches, dtype):
  """Each call is the next step and returns its loss, in nats per token."""
  import jax

  from moe_jax.models import decoder
  from moe_jax.training import train_step

  jobs = jax_job(size, dtype)
  step = train_step.make_step(jobs)

  def steps():
    state = train_step.initial_state(jobs)
    for batch in itertools.cycle(batches):
      state, found = step(state, jobs.put(batch))
      jax.block_until_ready(state)
      yield float(found['nll_sum'] / found['tokens'])

  parameters = decoder.cost(jobs.model, size.L)['params_total']
  return functools.partial(next, steps()), {'parameters': parameters}


def torch_step(size, batches, experts):
  """Each call is the next step and returns its loss, in nats per token."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  config = qwen_config(
    size,
    experts,
    vocab_size=size.V,
    num_hidden_layers=size.N,
    num_attention_heads=size.H,
    num_key_value_heads=size.H,
    head_dim=size.D // size.H,
    tie_word_embeddings=True,
    output_router_logits=True,
    router_aux_loss_coef=BALANCE,
    decoder_sparse_step=1,
    mlp_only_layers=[],
  )
  model = AutoModelForCausalLM.from_config(config, attn_implementation='sdpa')
  model.train()
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True
  )

  def steps():
    for batch in itertools.cycle(batches):
      ids_BxL = torch.from_numpy(batch['ids_BxL']).long()
      target_BxL = torch.from_numpy(batch['target_BxL']).long()
      optimizer.zero_grad()
      out = model(
        input_ids=ids_BxL,
        labels=target_BxL,
        shift_labels=target_BxL,  # they are shifted already
        use_cache=False,
      )
      out.loss.backward()
      torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
      optimizer.step()
      yield (out.loss - BALANCE * out.aux_loss).item()

  parameters = sum(p.numel() for p in model.parameters())
  return functools.partial(next, steps()), {'parameters': parameters}


class Worker:
  """A process with one framework, which obeys one order at a time."""

  def __init__(self):
    spawn = multiprocessing.get_context('spawn')
    self._pipe, theirs = spawn.Pipe()
    self._process = spawn.Process(target=_obey, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()

  def make(self, row, function, *args):
    """Makes a row that `turn` can time; returns the facts about it."""
    return self._ask(row, function, args)

  def turn(self, row):
    """(seconds of the call that counts, what both calls returned)"""
    return self._ask(row, None, ())

  def close(self):
    self._pipe.close()
    self._process.join()

  def _ask(self, *order):
    self._pipe.send(order)
    try:
      trouble, answer = self._pipe.recv()
    except EOFError:
      self._process.join()
      code = self._process.exitcode
      raise RuntimeError(f'{order[0]}: its process ended, {code}') from None
    if trouble:
      raise RuntimeError(f'{order[0]}:\n{trouble}')
    return answer


def _obey(pipe):
  from moe_jax.training import malloc

  malloc.retain_freed_memory()
  calls = {}
  while True:
    try:
      row, function, args = pipe.recv()
    except EOFError:
      return
    try:
      if function is None:
        answer = _turn(calls[row])
      else:
        calls[row], answer = function(*args)
      pipe.send((None, answer))
    except Exception:
      pipe.send((traceback.format_exc(), None))


def _turn(call):
  first = call()
  began = time.perf_counter()
  second = call()
  return time.perf_counter() - began, [first, second]


def layer_rows(workers, size, xla):
  """{row: (worker, facts)}, all made and found to agree."""
  ours, theirs = workers
  rows = {
    'moe_jax': (ours, jax_layer, 'cpu'),
    RIVAL: (theirs, torch_layer, 'grouped_mm'),
    'torch eager': (theirs, torch_layer, 'eager'),
  }
  if xla and size.E <= 8:  # with 64 experts it takes 20 GB
    rows['moe_jax xla'] = (ours, jax_layer, 'xla')
  made, expected = {}, None
  for row, (worker, function, implementation) in rows.items():
    found = worker.make(row, function, size, implementation)
    expected = expected or found
    error = max(_distance(found[k], expected[k]) for k in expected)
    if error > 0.03:  # a tie that is routed otherwise is less
      raise RuntimeError(f'{row} differs from moe_jax: {error:.2g}')
    made[row] = (worker, {'relative_error': error})
  return made


def _distance(found, expected):
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def step_rows(workers, size):
  """{row: (worker, facts)}"""
  ours, theirs = workers
  batches = ours.make('batches', jax_batches, size)
  rows = {
    'moe_jax': (ours, jax_step, 'float32'),
    'moe_jax bfloat16': (ours, jax_step, 'bfloat16'),
    RIVAL: (theirs, torch_step, 'grouped_mm'),
  }
  return {
    row: (worker, worker.make(row, function, size, batches, variant))
    for row, (worker, function, variant) in rows.items()
  }


def measure(rows, rounds):
  """{row: (seconds of each round, what its calls returned)}"""
  found = {row: ([], []) for row in rows}
  for i in range(rounds):
    start = i % len(rows)
    for row in [*list(rows)[start:], *list(rows)[:start]]:
      if i and row.endswith('xla'):  # once
        continue
      worker, _ = rows[row]
      seconds, returned = worker.turn(row)
      found[row][0].append(seconds)
      found[row][1].extend(returned)
  return found


def quartiles(name, values):
  q1, median, q3 = np.percentile(values, [25, 50, 75])
  return {name: median, f'{name}_q1': q1, f'{name}_q3': q3}


def report(what, size, rows, found):
  """Prints a table; returns a dict for each of its rows."""
  sizes = ' '.join(f'{k}={v}' for k, v in size._asdict().items())
  print(f'\n{what} {sizes}')
  print(f'{"":20}{"tokens/s (quartiles)":27}ratio (quartiles)')
  lines = []
  for row, (_, facts) in rows.items():
    seconds, returned = found[row]
    rate = size.tokens / np.array(seconds)
    rival = size.tokens / np.array(found[RIVAL][0])[: len(seconds)]
    line = quartiles('tokens_per_second', rate)
    line |= quartiles('ratio', rate / rival)
    loss = ''
    if returned[0] is not None:
      line |= {'first_loss': returned[0], 'last_loss': returned[-1]}
      loss = f'   loss {returned[0]:.2f} to {returned[-1]:.2f}'
    speed = (
      '{tokens_per_second:.0f} ({tokens_per_second_q1:.0f}'
      '-{tokens_per_second_q3:.0f})'
    ).format(**line)
    ratio = '{ratio:.2f} ({ratio_q1:.2f}-{ratio_q3:.2f})'.format(**line)
    print(f'{row:20}{speed:27}{ratio:20}{loss}'.rstrip(), flush=True)
    rounds = {'row': row, 'rounds': len(seconds)}
    lines.append({'what': what, **size._asdict(), **rounds, **line, **facts})
  return lines


def here():
  """The machine and the versions, for each line of results."""
  names = 'moe_jax jax jaxlib flax optax numpy torch transformers'.split()
  return {
    'processor': _processor(),
    'cores': os.cpu_count(),
    'load': round(os.getloadavg()[0], 2),
    'python': platform.python_version(),
    **{name: metadata.version(name) for name in names},
  }


def _processor():
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  named = [line for line in lines if line.startswith('model name')]
  return named[0].split(':')[1].strip() if named else platform.processor()


def run(what, rounds, xla, file):
  os.environ['JAX_PLATFORMS'] = 'cpu'  # for the workers
  about = here()
  print(', '.join(f'{k} {v}' for k, v in about.items()))
  problems = []
  if 'layer' in what:
    problems += [('layer', s, layer_rows, (s, xla)) for s in LAYERS]
  if 'step' in what:
    problems += [('step', STEP, step_rows, (STEP,))]
  for name, size, make_rows, args in problems:
    # New ones for each problem: nothing is left of the one before.
    with contextlib.ExitStack() as stack:
      workers = [
        stack.enter_context(contextlib.closing(Worker())) for _ in range(2)
      ]
      rows = make_rows(workers, *args)
      found = measure(rows, rounds)
    for line in report(name, size, rows, found):
      file.write(json.dumps({**line, **about}) + '\n')
      file.flush()


def main(argv: list[str]) -> None:
  del argv
  for package in ('torch', 'transformers'):
    if importlib.util.find_spec(package) is None:
      command.stop(
        f'{package} is missing; it is in the extra {EXTRA!r}:'
        f" pip install -e '.[{EXTRA}]'"
      )
  for value in _WHAT.value or ['']:
    if value not in ('layer', 'step'):
      command.stop(f'--what={value}; there are layer, step')
  try:
    file = open(_JSON.value or os.devnull, 'a')
  except OSError as error:
    command.stop(error)
  with file:
    run(_WHAT.value, _ROUNDS.value, _XLA.value, file)


if __name__ == '__main__':
  command.run(main)
