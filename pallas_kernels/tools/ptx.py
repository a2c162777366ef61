"""Reads what Mosaic GPU prints of each kernel that it compiles.

With MOSAIC_GPU_DUMP_PTX a kernel's PTX goes to standard output, with
MOSAIC_GPU_DUMP_HOST_LLVM the code that launches it. NVIDIA's assembler, which
is `ptxas` of the wheel nvidia-cuda-nvcc or of a CUDA toolkit, tells of
registers.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

VARIABLES = {'MOSAIC_GPU_DUMP_PTX': '1', 'MOSAIC_GPU_DUMP_HOST_LLVM': '1'}


class Kernel(NamedTuple):
  name: str
  registers: int  # of a thread, when the kernel is launched
  spills: int  # bytes that are stored
  fills: int  # bytes that are loaded
  threads: int  # of a block
  blocks: int  # of the grid
  shared: int  # bytes of shared memory
  wgmmas: int  # instructions
  loads: int  # instructions of the copy engine, to shared memory
  stores: int  # and from it


def read(text):
  """[`Kernel`] of what a process printed, in the order of their compilation.

  Raises FileNotFoundError where there is no assembler.
  """
  sources = re.findall(r'^\.version.*?(?=^; ModuleID|\Z)', text, re.M | re.S)
  # The pointer, the grid, the cluster, the block and the bytes.
  launches = re.findall(
    r'call void @mosaic_gpu_build_kernel_spec\(ptr %\d+((?:, i32 \d+){10})',
    text,
  )
  launches = [
    [int(n) for n in re.findall(r'i32 (\d+)', one)] for one in launches
  ]
  return [
    parse(source.rpartition('}\n')[0] + '}\n', launch)
    for source, launch in zip(sources, launches, strict=True)
  ]


def parse(source, launch):
  """The `Kernel` of one PTX module and the numbers that it is launched with."""
  said = _assemble(source)
  spills = re.search(r'(\d+) bytes spill stores, (\d+) bytes spill loads', said)
  count = lambda pattern: len(re.findall(pattern, source))
  return Kernel(
    name=re.search(r'\.entry (\w+?)(?:_mosaic_gpu_kernel)?\(', source)[1],
    registers=int(re.search(r'Used (\d+) registers', said)[1]),
    spills=int(spills[1]),
    fills=int(spills[2]),
    blocks=launch[0] * launch[1] * launch[2],
    threads=launch[6] * launch[7] * launch[8],
    shared=launch[9],
    wgmmas=count(r'\bwgmma\.mma_async\b'),
    loads=count(r'\bcp\.async\.bulk\.tensor\.\dd\.shared'),
    stores=count(r'\bcp\.async\.bulk\.tensor\.\dd\.global'),
  )


def assembler():
  """The path of ptxas; FileNotFoundError where there is none."""
  package = importlib.util.find_spec('nvidia')
  for folder in package.submodule_search_locations if package else ():
    for path in sorted(pathlib.Path(folder).glob('*/bin/ptxas'), reverse=True):
      return str(path)
  path = shutil.which('ptxas')
  if path is None:
    raise FileNotFoundError("ptxas is missing: pip install -e '.[aot]'")
  return path


def _assemble(source):
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'kernel.ptx')
    pathlib.Path(path).write_text(source)
    done = subprocess.run(
      [assembler(), '-v', '-arch=sm_90a', path, '-o', os.devnull],
      capture_output=True,
      text=True,
      check=True,
    )
  return done.stdout + done.stderr
