"""Routing trouble, told once each: dead experts, uneven load, rising drops."""

from typing import Any

import numpy as np

WINDOW = 10  # logged steps
COLLAPSED = 0.25  # of the experts that share the load as evenly
DROPS = 0.01  # of the choices


class Routing:
  """Looks at the lines of metrics.jsonl, and remembers what it has told.

  With p the mean load of a layer over the last WINDOW lines: an expert is dead
  if it is 0, the load has collapsed if exp(entropy of p) is below COLLAPSED of
  the experts, and drops rise if they are above DROPS and twice those of the
  WINDOW lines before.
  """

  def __init__(self, iterations: int = 1):
    self._iterations = iterations
    self._lines = []  # (load of each router, drops of each)
    self._told = set()  # (router, kind)

  def see(self, line: dict[str, Any]) -> list[str]:
    """What is new to tell after this line."""
    if 'load' not in line or line.get('bad'):  # of a skipped step
      return []
    loads = [np.asarray(load, float) for load in line['load']]
    drops = np.asarray(line['dropped'], float)
    self._lines = [*self._lines, (loads, drops)][-2 * WINDOW :]
    if len(self._lines) < WINDOW:
      return []
    told = []
    for router in range(len(loads)):
      for kind, text in self._trouble(router):
        if (router, kind) not in self._told:
          self._told.add((router, kind))
          told.append(f'step {line["step"]}: {self._name(router)}: {text}')
    return told

  def _trouble(self, router):
    """(kind, text) of each trouble that it has now."""
    last = self._lines[-WINDOW:]
    p_E = np.mean([loads[router] for loads, _ in last], axis=0)
    dead = np.flatnonzero(p_E == 0)
    if dead.size:
      names = ', '.join(map(str, dead[:8])) + (', ...' if dead.size > 8 else '')
      yield (
        'dead',
        (
          f'{dead.size} of {p_E.size} experts had no token in {WINDOW} logged'
          f' steps: {names}'
        ),
      )
    alive_E = p_E[p_E > 0]
    even = float(np.exp(-np.sum(alive_E * np.log(alive_E))))
    if even < COLLAPSED * p_E.size:
      yield (
        'collapsed',
        (
          f'the load has collapsed: as uneven as over {even:.1f} of'
          f' {p_E.size} experts'
        ),
      )
    before = self._lines[:-WINDOW]
    if len(before) == WINDOW:
      old, new = (np.mean([d[router] for _, d in x]) for x in (before, last))
      if new > DROPS and new > 2 * old:
        yield (
          'drops',
          (
            f'{new:.1%} of the choices are dropped, {old:.1%} were in the'
            f' {WINDOW} logged steps before'
          ),
        )

  def _name(self, router):
    layer, iteration = divmod(router, self._iterations)
    own = f', iteration {iteration}' if self._iterations > 1 else ''
    return f'MoE layer {layer}{own}'
