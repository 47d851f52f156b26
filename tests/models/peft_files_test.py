import pytest

from fedjax_llm.models import decoder, peft_files

MODULE = "model.layers.1.self_attn.q_proj"
PATTERNS = {
  "q_proj": True,
  "self_attn.q_proj": True,
  r".*\.1\..*proj": True,
  MODULE: True,
  "proj": False,
  "k_proj": False,
  "q_proj.weight": False,
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_the_ends_of_names(pattern):
  found = peft_files.pattern({pattern: 5}, [MODULE], 7)
  assert found == (5 if PATTERNS[pattern] else 7)


@pytest.mark.oracle
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_where_those_of_peft_do(pattern):
  other = pytest.importorskip("peft.utils.other", reason="oracle needs peft")
  key = other.get_pattern_key([pattern], MODULE)
  expected = {pattern: 5}.get(key, 7)
  assert peft_files.pattern({pattern: 5}, [MODULE], 7) == expected


def test_the_first_pattern_that_fits_counts():
  both = {"k_proj": 1, "q_proj": 2, "self_attn.q_proj": 3}
  assert peft_files.pattern(both, [MODULE], 7) == 2
  assert peft_files.pattern(None, [MODULE], 7) == 7


def test_the_scale_is_over_the_rank_or_its_root():
  assert peft_files.scale(8, 4, {}) == 2
  assert peft_files.scale(8, 4, {"use_rslora": True}) == 4


def test_parameters_have_their_names_in_peft():
  name = peft_files.tensor_name(
    decoder.LAYOUT, ("layers", "self_attn", "q_proj", "a"), 1
  )
  assert name == f"base_model.model.{MODULE}.lora_A.weight"
  head = peft_files.tensor_name(decoder.LAYOUT, ("score", "kernel"), None)
  assert head == "base_model.model.score.weight"
