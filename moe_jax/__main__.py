"""`python -m moe_jax` is moe-train."""

from moe_jax import main

main.console()
