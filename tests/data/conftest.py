"""Tokenizers, and caches that the tests of data sets have for themselves."""

import pathlib

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors, trainers


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory) -> pathlib.Path:
  """Folders for what is cached; and no network, whatever a test loads."""
  folder = tmp_path_factory.mktemp("caches")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("FEDJAX_LLM_CACHE", str(folder))
    patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield folder


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "bos_eos"])
def tokenizer(request) -> transformers.PreTrainedTokenizerFast:
  """A byte-level BPE with tokens for the ends of a text, or without."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.train_from_iterator(
    ["the client sends what the server asks", "the cat sat on the mat"],
    trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=["<s>", "</s>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  if request.param:
    bpe.post_processor = processors.TemplateProcessing(
      single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
  ends = {"bos_token": "<s>", "eos_token": "</s>"} if request.param else {}
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe, model_max_length=4, **ends
  )


@pytest.fixture(scope="session")
def gpt2(data) -> transformers.PreTrainedTokenizerFast:
  """GPT-2's tokenizer: no special tokens but an end token to put by hand."""
  folder = data / "gpt2_tokenizer"
  return transformers.GPT2TokenizerFast(
    vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt")
  )


@pytest.fixture(scope="session")
def llama(data) -> transformers.PreTrainedTokenizerFast:
  """A SentencePiece tokenizer: texts start with a token and with a space."""
  return transformers.AutoTokenizer.from_pretrained(data / "stories260k")
