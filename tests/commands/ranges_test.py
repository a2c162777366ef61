"""Every option says what it may be; what it may not is one line."""

import functools
import math
import re

import pytest

from moe_jax import config, ranges, routers
from moe_jax.commands import options as listing

EVERY = config.every()
every_part = pytest.mark.parametrize('title', EVERY)  # there is, unasked


def test_an_interval_has_its_square_ends_and_no_round_one():
  assert [x in ranges.Within('[0, 1)') for x in (0, 0.5, 1)] == [1, 1, 0]
  assert [x in ranges.Within('(0, 1]') for x in (0, 0.5, 1)] == [0, 1, 1]
  assert 2**31 - 1 in ranges.Within('[1, 2^31)')
  assert 2**31 not in ranges.Within('[1, 2^31)')
  for bad in (math.nan, math.inf, -math.inf):
    assert bad not in ranges.Within('(-inf, inf)')


def test_what_only_type_checkers_import_says_nothing():
  def part(k: int = 2, temp: 'jaxtyping.Float' = 0.5): ...  # noqa: F821

  said = ranges.options(part)
  assert str(said['k']) == 'int' and str(said['temp']) == 'float'

  def plain(scale: float = None): ...  # noqa: RUF013

  ranges.options(plain)['scale'].check('scale', None)
  with pytest.raises(ValueError, match='scale=nan is not a float'):
    ranges.options(plain)['scale'].check('scale', math.nan)


def test_an_annotation_says_it_all():
  def part(
    D,
    k: ranges.Count = 2,
    size: ranges.Count | None = None,
    free: float = 1.0,
    switch=False,
    *,
    losses: dict[str, ranges.NonNegative],
    other: list[int],
  ): ...

  said = {name: str(option) for name, option in ranges.options(part).items()}
  assert said == {
    'k': 'int in [1, 2^31)',
    'size': 'int in [1, 2^31) or None',
    'free': 'float',
    'switch': 'bool',
    'losses.*': 'float in [0, inf)',
  }


@every_part
def test_every_option_says_what_it_may_be(title):
  for name, (default, option) in EVERY[title].items():
    assert option is not None, f'{name}: annotate it, see moe_jax/ranges.py'
    if option.kind in (int, float):
      assert option.bounds is not None, f'{name}: give it a range'
    option.check(name, default)


def test_every_key_of_a_config_is_among_them():
  told = [_key(title, name) for title, said in EVERY.items() for name in said]
  for key in config.flat(config.default().to_dict()):
    assert key in told or key.endswith(('.name', 'data.source')), key


def _key(title, name):
  return name if title == 'run' else f'{title.split()[0]}.{name}'


@functools.cache
def _config(title):
  """One that has this part."""
  path, _, name = title.partition(' ')
  c = config.default()
  if path == 'model':
    c.model = config.model(name)
  elif path == 'data':
    c.data = config.source(name)
  elif path == 'objective':
    c.objective = config.choice(path, name, losses={**config.LOSSES})
  elif name:
    kind = path.removeprefix('model.')
    c.model[kind] = config.choice(kind, name)
  return c


def resolved(title, name, value):
  """The value in the resolved config, or what is raised for it."""
  c, key = _config(title).copy_and_resolve_references(), _key(title, name)
  *outer, last = key.split('.')
  section = functools.reduce(lambda a, b: a[b], outer, c)
  with section.ignore_type():
    section[last] = value
  return config.flat(config.resolve(c))[key]


def outside(option):
  """Values just outside of what an option may be, and of another kind."""
  found = [] if option.none else [None]
  if option.kind is bool:
    return [*found, 1, 'yes']
  if isinstance(option.bounds, ranges.OneOf):
    return [*found, 3, '', 'none of these']
  if option.kind is str:
    return [*found, 3]
  low, high = option.bounds.ends
  has_low, has_high = (
    option.bounds.text[0] == '[',
    option.bounds.text[-1] == ']',
  )
  found += [math.nan, math.inf, -math.inf, 'words']
  if option.kind is int:
    found += [True, 1.5, int(low) - has_low]
    return found if math.isinf(high) else [*found, int(high) + has_high]
  if math.isfinite(low):
    found.append(math.nextafter(low, -math.inf) if has_low else low)
  if math.isfinite(high):
    found.append(math.nextafter(high, math.inf) if has_high else high)
  return found


@every_part
def test_outside_of_its_range_an_option_is_refused_in_one_line(title):
  for name, (_, option) in EVERY[title].items():
    key = _key(title, name)
    for value in outside(option):
      with pytest.raises(ValueError, match=re.escape(key)) as error:
        resolved(title, name, value)
      told = str(error.value)
      assert '\n' not in told
      assert f'{key}={value!r} ' in told.replace(';', ' ')
      assert str(option).removesuffix(' or None') in told


@every_part
def test_the_end_that_a_range_has_is_accepted(title):
  for name, (_, option) in EVERY[title].items():
    if isinstance(option.bounds, ranges.Within):
      (low, high), text = option.bounds.ends, option.bounds.text
      ends = [low] * (text[0] == '[') + [high] * (text[-1] == ']')
      for end in map(option.kind, ends):
        assert resolved(title, name, end) == end


def test_a_bool_is_no_number():
  for kind in (int, float):
    with pytest.raises(ValueError, match=r'k=True is not an? '):
      ranges.Option(kind).check('k', True)


# Losses.


def weighted(router, **losses):
  c = config.default()
  c.model.router = router
  c.objective.losses.update(losses)
  c = config.resolve(c)
  options = dict(c['model']['router'])
  kind = routers.get(options.pop('name'))
  config.check_losses(c, routers.losses(kind, 8, 8, options, steps=1000))
  return c


def test_a_loss_that_no_router_reports_names_the_nearest():
  told = "no router reports a loss 'balence'; the nearest is 'balance'"
  for weight in (5.0, 0.0):
    with pytest.raises(ValueError, match=told) as error:
      weighted(config.router('topk'), balence=weight)
    assert '\n' not in str(error.value)


def test_a_loss_of_another_router_is_refused_unless_it_weighs_nothing():
  vmoe = config.router('vmoe')
  assert weighted(vmoe, importance=0.1)['objective']['losses']['importance']
  assert weighted(config.router('topk'), importance=0.0)
  told = r"importance=0.1: the router 'topk' .* reported are balance, seq"
  with pytest.raises(ValueError, match=told):
    weighted(config.router('topk'), importance=0.1)
  with pytest.raises(ValueError, match=r'smooth_load=0.1: .*its options'):
    weighted(config.router('vmoe', noise=0.0), smooth_load=0.1)


def test_a_loss_that_nothing_weighs_is_reported():
  c = config.default()
  reported = ('balance', 'z', 'importance', 'smooth_load')
  for weights, found in (
    ({}, ['importance', 'smooth_load']),
    ({'importance': 0.1}, ['smooth_load']),
    ({'importance': 0.1, 'smooth_load': 0.0}, []),
  ):
    c.objective.losses.update(weights)
    assert config.check_losses(config.resolve(c), reported) == found


def test_a_loss_of_a_schedule_that_takes_many_steps():
  growing = config.router('rexmoe', first=4, start=100.0, end=0.63)
  assert weighted(growing, balance_kept=0.01)


def test_the_losses_of_every_config_suit_every_router():
  for name in config.CHOICES['router'].names():
    c = weighted(config.router(name), balance=0.5)
    assert c['objective']['losses'] == {**config.LOSSES, 'balance': 0.5}


def test_weights_that_are_no_dict_of_numbers():
  for losses in (0.1, {'balance': {'first': 1.0}}):
    c = config.default()
    with c.objective.ignore_type():
      c.objective.losses = losses
    with pytest.raises(ValueError, match=r'objective\.losses'):
      config.resolve(c)


# What is told.


@every_part
def test_the_listing_has_every_option_and_its_range(title):
  head, *lines = listing.text(title).split('\n\n')[0].split('\n')
  assert head == title
  said = EVERY[title].items()
  for line, (name, (default, option)) in zip(lines, said, strict=True):
    begin = f'  {name} = {default!r}  '
    assert line.startswith(begin) and line.endswith(f'  {option}')


def test_a_part_that_is_not_there():
  with pytest.raises(ValueError, match="no part 'trunk'; there are run, opt"):
    listing.text('trunk')
