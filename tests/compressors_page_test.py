"""docs/compressors.md tells the lengths that messages have."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from fedjax_llm import compression
from fedjax_llm.compression import wire

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "compressors.md"
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [
  [cell.strip() for cell in line.strip("|").split("|")]
  for line in TEXT.splitlines()
  if line.startswith("| `")
]
SIZE = 65536


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_messages_are_as_long_as_the_page_says(row):
  call, _, _, bits, _, kept = row
  compressor = eval(call.strip("`"), vars(compression) | {"jnp": jnp})
  vector = jax.ShapeDtypeStruct((SIZE,), jnp.float32)
  state = jax.eval_shape(compressor.init, vector)
  payload, _ = jax.eval_shape(
    compressor.encode, vector, state, jax.random.key(0)
  )
  assert float(bits) == pytest.approx(8 * wire.nbytes(payload) / SIZE, abs=0.01)
  assert (kept == "nothing") == (not jax.tree.leaves(state))


def test_the_page_has_every_compressor():
  combinators = {"chain", "error_feedback", "relative_to", "Compressor"}
  combinators |= {"Dense", "message", "stateless"}
  named = set(re.findall(r"`(\w+)", TEXT))
  every = {x for x in vars(compression) if callable(getattr(compression, x))}
  assert every - combinators - {"transmit"} <= named
