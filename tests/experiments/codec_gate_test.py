import pytest

from fedjax_llm.experiments import codec_gate


@pytest.mark.parametrize(
  ("cosines", "spoken"),
  [
    ([0.0, 0.01, -0.02], 1),
    ([0.0] * 9, 1),
    ([0.0, 0.01], 0),
    ([0.0, None, 0.01], 0),
    ([0.0, 0.0, 0.3], 0),
    ([0.3, 0.2, 0.3, 0.0, 0.0], 0),
    # A codec that was fitted anew may be worse than the one before.
    ([0.6] * 9 + [0.0, 0.01, 0.0], 1),
  ],
)
def test_the_gate_speaks_once_if_nothing_arrives(cosines, spoken):
  said = []
  gate = codec_gate.Gate(said.append)
  for cosine in cosines:
    gate.see(cosine)
  assert len(said) == spoken
  for text in said:
    assert "delta" in text and "scale" in text and "transform" in text
