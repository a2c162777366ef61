"""Paths as users write them."""

import os
import pathlib


def text(given: str | os.PathLike) -> str:
  """The same, or a glob, with the home folder for a ~ or ~NAME at its front.

  Raises:
    ValueError: nobody knows that folder; one line.
  """
  given = os.fspath(given)
  found = os.path.expanduser(given)
  # What is not known stays, and would be a folder that is named ~.
  if found.startswith('~'):
    raise ValueError(
      f'{given}: there is no home folder for its ~; to mean a file of that'
      f' name, write ./{given}'
    )
  return found


def absolute(given: str | os.PathLike) -> pathlib.Path:
  """The absolute path of what a user gives; ValueError as of `text`."""
  return pathlib.Path(text(given)).absolute()
