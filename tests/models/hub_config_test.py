import pytest

from fedjax_llm.models import heads, hub_config


def test_every_field_that_is_left_and_switched_on_is_named():
  fields = hub_config.Fields(
    {"a": 1, "b": None, "c": False, "d": 2, "e": 3, "use_cache": True}
  )
  assert fields.pop("a") == 1
  with pytest.raises(ValueError, match=r"\['d', 'e'\]. This llama does not"):
    fields.finish("llama")
  fields.pop("d")
  fields.finish("llama", ignored=["e"])


def test_defaults_fill_what_is_absent_and_not_what_is_null():
  fields = hub_config.Fields({"null": None, "given": 1})
  fields.default({"null": 5, "given": 5, "absent": 5})
  names = {"a": "null", "b": "given", "c": "absent"}
  assert fields.take(names) == {"b": 1, "c": 5}


def test_a_choice_is_one_of_those_there_are():
  fields = hub_config.Fields({"act": "tanh"})
  with pytest.raises(ValueError, match="expected act in 'relu', got 'tanh'"):
    fields.choose("act", ["relu"])


@pytest.mark.parametrize("multi", [True, False])
def test_labels_are_told_to_transformers(multi):
  fields = hub_config.label_fields(heads.Classifier(2, multi_label=multi))
  assert fields["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
  assert fields["label2id"] == {"LABEL_0": 0, "LABEL_1": 1}
  kind = "multi" if multi else "single"
  assert fields["problem_type"] == f"{kind}_label_classification"
  assert hub_config.label_fields(None) == {}
