"""Fingerprints of what a run computes, the same in every process.

JAX lowers a round to a text with every operation and every constant. So another
learning rate, another compressor or an edited loss changes the fingerprint.
"""

import hashlib
import re
from typing import Any

import jax
import numpy as np

# Only so many entries of an array are hashed. Larger arrays are the states of a
# population, which start at zero, and models, which have other fingerprints.
_ENTRIES = 2**24


def of_function(jitted: Any, *arguments: Any) -> str:
  """Returns a fingerprint of what a jitted function computes.

  The fingerprint covers the StableHLO text with its constants. JAX caches the
  trace, so the first call does not trace again.

  Args:
    jitted: the result of `jax.jit`.
    *arguments: arguments of its first call. Only the shapes, types and
      placement of arrays matter.
  """
  text = jitted.lower(*arguments).as_text()
  # The name of the function does not change what it computes.
  text = re.sub(r"^module @\w+", "module", text, count=1)
  return _short(hashlib.sha256(text.encode()))


def of_arrays(tree: Any) -> str:
  """Returns a fingerprint of a tree of arrays, on any devices.

  Args:
    tree: tree of arrays. Names, shapes, types and values count, but only the
      first 2**24 values of an array.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree.leaves_with_path(tree):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    name = jax.tree_util.keystr(path)
    digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
    digest.update(np.asarray(leaf.reshape(-1)[:_ENTRIES]).tobytes())
  return _short(digest)


def _short(digest: Any) -> str:
  return digest.hexdigest()[:16]
