"""Writes into README.md what studies found of each variant.

  python -m experiments.variants

A row a claim that has `headline`, of every study that has been run, from the
lines of its results.jsonl.
"""

from absl import app

from experiments import pages, results, tables


def table() -> str:
  heads = ['variant', 'difference', 'of', 'is', 'seeds', 'verdict', 'study']
  body = []
  for name in results.names():
    study = results.study(name)
    rows = results.read(study)
    shown = [claim for claim in study.CLAIMS if claim.headline]
    link = f'[{name}](experiments/{name}/README.md)'
    for claim in shown if rows else ():
      body.append([*tables.finding(study, claim, rows), link])
  return pages.table(heads, body) if body else 'No study has been run yet.\n'


def main(argv: list[str]) -> None:
  del argv
  page = results.ROOT / 'README.md'
  pages.put(page, 'python -m experiments.variants', table())


if __name__ == '__main__':
  app.run(main)
