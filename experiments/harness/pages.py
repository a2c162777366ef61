"""What commands write into Markdown files, between two marks."""

import pathlib

END = '<!-- end -->\n'


def put(path: pathlib.Path, command: str, text: str) -> None:
  """Replaces what stands between the command's mark and the next end."""
  begin = f'<!-- by {command} -->\n'
  before, rest = path.read_text().split(begin)
  after = rest.split(END, 1)[1]
  path.write_text(f'{before}{begin}\n{text}\n{END}{after}')


def table(heads: list[str], rows: list[list[str]]) -> str:
  """In Markdown; columns after the first are numbers, to the right."""
  lines = [heads, ['---', *['---:'] * (len(heads) - 1)], *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)
