"""Settings that every test runs under."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compilations are shared between tests and between runs of the suite.
jax.config.update("jax_threefry_partitionable", True)

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
  """The folder of real weights and data sets, or a skip that says so."""
  folder = pathlib.Path(
    os.environ.get("FEDJAX_LLM_DATA", ROOT.parent / "shared" / "data")
  )
  if not folder.is_dir():
    pytest.skip(f"needs real data in {folder}; set FEDJAX_LLM_DATA.")
  return folder
