"""Writes into README.md what studies found of each variant.

  python -m experiments.harness.variants

A row a claim that has `headline`, from the lines of results.jsonl of its study,
if there are enough seeds.
"""

from absl import app

from experiments.harness import claims, pages, results, tables


def table() -> str:
  heads = ['variant', 'difference', 'of', 'is', 'seeds', 'verdict', 'study']
  body = []
  for name in results.names():
    study = results.study(name)
    rows = results.read(study)
    link = f'[{name}](experiments/studies/{name}/README.md)'
    for claim in study.CLAIMS:
      found = claims.find(claim, rows)
      if claim.headline and found and found.n >= claims.SEEDS:
        body.append([*tables.finding(study, claim, rows), link])
  return pages.table(heads, body) if body else 'No study has three seeds.\n'


def main(argv: list[str]) -> None:
  del argv
  page = results.ROOT / 'README.md'
  pages.put(page, 'python -m experiments.harness.variants', table())


if __name__ == '__main__':
  app.run(main)
