import json

import pytest
import transformers

from fedjax_llm.models import families, gpt2_config, heads


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"tie_word_embeddings": False, "hidden_act": "gelu"},
    {"intermediate_size": 40, "num_attention_heads": 6},
    {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 0.1},
    {"scale_attn_weights": False, "num_hidden_layers": 2, "vocab_size": 96},
  ],
)
def test_config_json_is_read_as_it_was_written(changes):
  config = gpt2_config.GPT2Config(**changes)
  fields = json.loads(json.dumps(config.to_hugging_face()))
  assert gpt2_config.GPT2Config.from_hugging_face(fields) == config
  assert families.from_hugging_face(fields) == config


def test_transformers_reads_what_is_written():
  config = gpt2_config.GPT2Config(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="relu",
  )
  theirs = transformers.GPT2Config(**config.to_hugging_face())
  assert (theirs.n_embd, theirs.n_layer, theirs.n_head) == (24, 3, 4)
  assert theirs.activation_function == "relu" and theirs.n_inner is None
  assert config.head_dim == 6


def test_a_classifier_is_of_the_last_token():
  config = gpt2_config.GPT2Config()
  names = ("no", "yes")
  head = heads.Classifier(2, "last", names=names)
  fields = config.to_hugging_face(head)
  assert fields["architectures"] == ["GPT2ForSequenceClassification"]
  assert transformers.GPT2Config(**fields).id2label == dict(enumerate(names))
  assert gpt2_config.GPT2Config.from_hugging_face(fields) == config
  with pytest.raises(ValueError, match="mean"):
    config.to_hugging_face(heads.Classifier(2, "mean"))


def test_the_config_json_of_the_hub_is_read():
  fields = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {
      "text-generation": {"do_sample": True, "max_length": 50}
    },
    "vocab_size": 50257,
  }
  assert families.from_hugging_face(fields) == gpt2_config.GPT2Config()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"a_field_of_the_future": 2}, "a_field_of_the_future"),
    ({"activation_function": "tanh"}, "gelu_new.*'tanh'"),
    ({"n_head": 5}, "divide hidden_size, got 5 and 768"),
    ({"model_type": "gpt3"}, "gpt3"),
  ],
)
def test_what_is_not_honoured_is_refused_by_name(changes, message):
  with pytest.raises(ValueError, match=message):
    gpt2_config.GPT2Config.from_hugging_face({"model_type": "gpt2", **changes})
