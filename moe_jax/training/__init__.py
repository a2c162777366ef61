"""A run: `job` checks it, `loop` trains it, by the programs of `train_step`.

`saved_run` opens the decoder that a run left, without its training data.
`checkpoint`, `lock`, `preemption` and `distributed` keep it alive; `health`,
`nonfinite` and `malloc` watch over its numbers and its memory.
"""
