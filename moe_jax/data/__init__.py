"""What a run reads: text, pairs of sentences or images, as batches of rows.

`dataset` names the sources. `corpus` and `huggingface` read documents, which
`tokenizer` and `packing` make rows of; `pairs` and `images` do so themselves.
"""
