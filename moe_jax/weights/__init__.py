"""Published weights in, out and changed: safetensors, no pickle.

`families` says what others call our parameters and options, `tensors` what one
of theirs is to us, `safetensors` reads and writes their files. `convert` goes
both ways; `upcycle` makes an MoE of a dense model.
"""
