"""A run: `job` checks it, `loop` trains it, by the programs of `train_step`.

`checkpoint`, `lock`, `preemption` and `distributed` keep it alive; `health`,
`nonfinite` and `malloc` watch over its numbers and its memory.
"""
