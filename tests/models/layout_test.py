import pytest

from fedjax_llm.models import layout

LAYOUT = layout.Layout(
  base="model",
  layers="encoder.layer",
  heads=("score",),
  optional=("pooler",),
  renamed=((r"\.gamma$", ".weight"),),
  ignored=(r"inv_freq$",),
)
PLACES = {
  "model.encoder.layer.12.mlp.up": (("layers", "mlp", "up"), 12),
  "model.embeddings.word": (("embeddings", "word"), None),
  "score": (("score",), None),
}


@pytest.mark.parametrize("name", PLACES)
def test_modules_are_found_by_their_names_and_back(name):
  assert LAYOUT.place(name) == PLACES[name]
  assert LAYOUT.module_name(*PLACES[name]) == name


def test_tensors_have_the_names_of_the_hub():
  name = LAYOUT.tensor_name
  assert name(("layers", "up", "kernel"), 3) == (
    "model.encoder.layer.3.up.weight"
  )
  assert name(("norm", "scale"), None) == "model.norm.weight"
  assert name(("norm", "bias"), None) == "model.norm.bias"
  assert name(("score", "kernel"), None) == "score.weight"
  assert name(("cls_token",), None) == "model.cls_token"


def test_older_names_become_current():
  assert LAYOUT.current("norm.gamma") == "model.norm.weight"
  assert LAYOUT.current("model.norm.weight") == "model.norm.weight"
  assert LAYOUT.current("score.weight") == "score.weight"


def test_kernels_are_transposed_where_torch_has_them_so():
  own = LAYOUT._replace(transposed=False)
  assert LAYOUT.is_transposed(("layers", "up", "kernel"))
  assert not own.is_transposed(("layers", "up", "kernel"))
  assert own.is_transposed(("score", "kernel"))
  assert not LAYOUT.is_transposed(("norm", "scale"))


@pytest.mark.parametrize(
  "name, optional",
  [
    ("score.weight", True),
    ("model.pooler.dense.weight", True),
    ("model.encoder.layer.0.rotary.inv_freq", True),
    ("model.encoder.layer.0.pooler.weight", False),
    ("model.norm.weight", False),
  ],
)
def test_only_heads_and_buffers_may_be_there_for_nothing(name, optional):
  assert LAYOUT.is_optional(name) == optional
