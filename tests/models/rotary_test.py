import math

import numpy as np
import pytest

from fedjax_llm.models import rotary

LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
  "rope_theta": 500000.0,
}
YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 64,
  "rope_theta": 1000.0,
}
KINDS = {
  "default": {"rope_theta": 1e4},
  "linear": {"type": "linear", "factor": 4, "rope_theta": 1e4},
  "llama3": LLAMA3,
  "yarn": YARN,
  "yarn_without_truncation": YARN | {"truncate": False},
  "yarn_with_betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
  "yarn_with_a_factor": YARN | {"attention_factor": 0.7},
}


@pytest.fixture(params=KINDS)
def fields(request):
  return KINDS[request.param]


def loops(fields, head_dim):
  """Frequencies and magnitude, by the published formulas, one at a time."""
  theta, kind = fields["rope_theta"], fields.get("rope_type", "default")
  kind = fields.get("type", kind)
  factor = fields.get("factor", 1.0)
  length = fields.get("original_max_position_embeddings")
  frequencies, magnitude = [], 1.0
  for i in range(0, head_dim, 2):
    frequency = theta ** (-i / head_dim)
    wavelength = 2 * math.pi / frequency
    if kind == "linear":
      frequency /= factor
    if kind == "llama3":
      low, high = fields["low_freq_factor"], fields["high_freq_factor"]
      if wavelength > length / low:
        frequency /= factor
      elif wavelength >= length / high:
        smooth = (length / wavelength - low) / (high - low)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    if kind == "yarn":
      # The pair of channels that turns `beta` times in the original context.
      pair = lambda beta: (
        head_dim * math.log(length / (beta * 2 * math.pi)) / math.log(theta) / 2
      )
      first = pair(fields.get("beta_fast", 32))
      last = pair(fields.get("beta_slow", 1))
      if fields.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
      first, last = max(first, 0), min(last, head_dim - 1)
      ramp = min(max((i / 2 - first) / (last - first), 0), 1)
      frequency = frequency * (1 - ramp) + frequency / factor * ramp
      magnitude = fields.get("attention_factor", 0.1 * math.log(factor) + 1)
    frequencies.append(frequency)
  return np.array(frequencies), magnitude


def test_frequencies_follow_the_published_formulas(fields):
  rope = rotary.Rope.from_hugging_face(fields)
  frequencies, magnitude = loops(fields, 32)
  np.testing.assert_allclose(rope.frequencies(32), frequencies, rtol=1e-12)
  assert rope.magnitude == pytest.approx(magnitude)


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name in KINDS if name != "default"])
def test_scaled_frequencies_equal_transformers(name):
  pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  from transformers import modeling_rope_utils

  fields = KINDS[name]
  given = {"rope_type": fields.get("type"), **fields}
  config = transformers.LlamaConfig(
    head_dim=32, max_position_embeddings=256, rope_parameters=given
  )
  compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[given["rope_type"]]
  expected, magnitude = compute(config, None)
  rope = rotary.Rope.from_hugging_face(fields)
  np.testing.assert_allclose(rope.frequencies(32), expected.numpy(), rtol=1e-5)
  assert rope.magnitude == pytest.approx(magnitude)


def test_what_is_written_is_read_back(fields):
  rope = rotary.Rope.from_hugging_face(fields)
  assert rotary.Rope.from_hugging_face(rope.to_hugging_face()) == rope


def test_llama_3_keeps_short_and_divides_long_wavelengths():
  scaled = rotary.Rope.from_hugging_face(LLAMA3).frequencies(128)
  ratio = scaled / rotary.Rope(500000.0).frequencies(128)
  assert ratio[0] == 1 and ratio[-1] == 1 / 8
  assert (np.diff(ratio) <= 0).all()
  assert ((1 / 8 < ratio) & (ratio < 1)).any()


def test_products_of_rotated_vectors_depend_on_their_distance_alone():
  rope = rotary.Rope(100.0)
  query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8))

  def product(i, j):
    turned = [
      rotary.rotate(x.astype(np.float32), *rope.angles(np.array([[at]]), 8))
      for x, at in ((query, i), (key, j))
    ]
    return float((turned[0] * turned[1]).sum())

  assert product(7, 3) == pytest.approx(product(4, 0), abs=1e-5)
  assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)
