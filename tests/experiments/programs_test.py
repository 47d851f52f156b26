"""Programs have the same fingerprint in every process, and others another."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_llm.experiments import programs

X = np.arange(3.0, dtype=np.float32)


def of(fn):
  return programs.of_function(jax.jit(fn), X)


def test_the_name_of_a_function_is_not_what_it_computes():
  def other(x):
    return x + 1

  assert of(lambda x: x + 1) == of(other) != of(lambda x: x + 2)


def test_constants_count_to_the_last_entry():
  # Larger than what is printed of an array.
  constant = jnp.arange(5000.0) * 0.1
  changed = constant.at[2500].add(1)
  fn = lambda values: lambda x: x.sum() + values
  assert of(fn(constant)) == of(fn(constant + 0)) != of(fn(changed))


PROGRAM = """
import jax, numpy as np
from fedjax_llm.experiments import programs
names = {"weight", "bias", "scale", "factor"}
def fn(x):
  parts = {name: x * len(name) for name in sorted(names)}
  step = lambda parts, _: (jax.tree.map(jax.nn.relu, parts), None)
  return jax.lax.scan(step, parts, None, length=3)
x = np.arange(3.0, dtype=np.float32)
print(programs.of_function(jax.jit(fn), x))
"""


def test_a_program_is_the_same_in_every_process():
  shown = {
    subprocess.run(
      [sys.executable, "-c", PROGRAM],
      env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert len(shown) == 1 and len(shown.pop().strip()) == 16


def test_arrays_count_by_name_type_and_value():
  tree = {"a": X, "key": jax.random.key(0)}
  same = {"a": jnp.asarray(X), "key": jax.random.key(0)}
  others = (
    {"b": X, "key": jax.random.key(0)},
    {"a": X.astype(np.int32), "key": jax.random.key(0)},
    {"a": X + 1, "key": jax.random.key(0)},
    {"a": X, "key": jax.random.key(1)},
  )
  assert programs.of_arrays(tree) == programs.of_arrays(same)
  prints = {programs.of_arrays(x) for x in (tree, *others)}
  assert len(prints) == 5
