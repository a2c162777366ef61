"""Reads the static schedule that libtpu writes of each kernel it compiles.

libtpu lists a kernel's instruction bundles, with the regions of its control
flow, and beside them how many slots of each unit every bundle fills. A bundle
takes a cycle or more, so the bundles of a region bound its cycles from below.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

_UNITS = 10  # columns of the utilization table
_MXU, _FILL, _SPILL = 0, 6, 8
# Every product that the listing names takes 16 rows of bfloat16.
_ROWS = 16


class Region(NamedTuple):
  """A straight run of code with products."""

  bundles: int
  macs: int  # multiply-adds of its products
  mxu: float  # slots of the matrix units that are taken, 0 to 1
  spills: int
  fills: int


class Schedule(NamedTuple):
  hot: tuple[Region, ...]  # the innermost regions with products, as listed
  overhead: int  # bundles of the loop around them that are in none of them


def flags(folder):
  """What LIBTPU_INIT_ARGS must hold, before libtpu loads, to list into folder.

  One process per folder; other settings of the variable are kept.
  """
  return ' '.join(
    [
      os.environ.get('LIBTPU_INIT_ARGS', ''),
      f'--xla_jf_dump_to={folder}',
      '--xla_jf_dump_llo_text=true',
      '--xla_jf_dump_llo_pass_label_regex=final_.*',
    ]
  )


def kernels(folder):
  """Names of the kernels listed in a folder, those of most bundles first."""
  files = Path(folder).glob('*-02-final_bundles.txt')
  files = sorted(files, key=lambda f: -f.stat().st_size)
  return [re.sub(r'^\d+-|-02-final_bundles.txt$', '', f.name) for f in files]


def read(folder, kernel, unit):
  """The `Schedule` of one kernel; unit is the side of the chip's matrix unit.

  Raises ValueError where the listing has no products.
  """
  (listing,) = Path(folder).glob(f'*-{kernel}-02-final_bundles.txt')
  table = listing.with_name(
    listing.name.replace(
      '02-final_bundles', '00-final_hlo-static-per-bundle-utilization'
    )
  )
  return parse(listing.read_text(), table.read_text(), unit)


def parse(listing, table, unit):
  """As `read`, from the two texts."""
  slots, used = _table(table)
  products, spans, loops = _listing(listing, len(used))
  macs = _ROWS * unit * unit
  with_products = [s for s in spans if sum(products[slice(*s)])]
  hot = [
    s for s in with_products if not any(_inside(o, s) for o in with_products)
  ]
  if not hot:
    raise ValueError('the listing has no matrix products')
  around = [
    s
    for s in loops
    if all(_inside(h, s) or h == s for h in hot)
  ]  # fmt: skip
  whole = min(around, key=lambda s: s[1] - s[0], default=(0, len(used)))
  regions = []
  for first, last in sorted(hot):
    bundles = used[first:last]
    regions.append(
      Region(
        bundles=last - first,
        macs=macs * sum(products[first:last]),
        mxu=sum(b[_MXU] for b in bundles) / (last - first) / slots[_MXU],
        spills=sum(b[_SPILL] for b in bundles),
        fills=sum(b[_FILL] for b in bundles),
      )
    )
  inside = sum(r.bundles for r in regions)
  return Schedule(tuple(regions), whole[1] - whole[0] - inside)


def _table(text):
  """Slots of each unit, and those taken by each bundle."""
  rows = [
    [int(n) for n in line.split()]
    for line in text.splitlines()
    if re.fullmatch(r'\s*\d+(\s+\d+)*\s*', line)
  ]
  rows = [row for row in rows if len(row) == _UNITS]
  return rows[0], rows[1:]


def _listing(text, bundles):
  """Products of each bundle, spans [first, last) of regions, and of loops."""
  products, open_, spans, heads = [0] * bundles, {}, set(), set()
  for line in text.splitlines():
    match = re.match(r'\s*(0x[0-9a-f]+|0)\s+(LB)?.*?:', line)
    if not match:
      continue
    at = int(match[1], 16)
    if match[2]:
      heads.add(at)
    if at < bundles:
      products[at] += len(re.findall(r'\bvmatmul\.', line))
    for mark, name in re.findall(r'\b(Start|End) region (\d+)', line):
      if mark == 'Start':
        open_[name] = at
      elif name in open_:
        spans.add((open_.pop(name), at + 1))
  return products, spans, [s for s in spans if s[0] in heads]


def _inside(inner, outer):
  return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
