"""Real pretrained models give the states and logits of transformers."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.models import families, language, pretrained

TEXT = "tinyshakespeare/input.txt"


def loaded(folder: pathlib.Path):
  config, params = pretrained.load(folder)
  apply = jax.jit(families.model(config).apply)
  return lambda tokens: np.asarray(apply({"params": params}, tokens))


def tokens_of(folder, data, characters):
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  text = (data / TEXT).read_text(encoding="utf-8")[:characters]
  ids = tokenizer(text, add_special_tokens=False)["input_ids"]
  return np.array(ids, np.int32)


@pytest.fixture(scope="module")
def smollm2(models):
  folder = models / "smollm2-135m"
  return folder, loaded(folder)


def test_smollm2_has_the_known_loss_on_shakespeare(smollm2, data):
  folder, logits = smollm2
  ids = tokens_of(folder, data, characters=6000)[None]
  losses = language.token_losses(
    jnp.asarray(logits(ids)[:, :-1]), jnp.asarray(ids[:, 1:])
  )
  assert losses.mean() == pytest.approx(3.6277, abs=2e-4)


@pytest.mark.oracle
def test_smollm2_logits_equal_transformers(smollm2, data):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  folder, logits = smollm2
  ids = tokens_of(folder, data, characters=4000)[: 4 * 128].reshape(4, 128)
  oracle = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    expected = oracle(torch.tensor(ids, dtype=torch.long)).logits.numpy()
  got = logits(ids)
  assert np.abs(got - expected).max() <= 1e-3
  assert (got.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.oracle
def test_minilm_states_equal_transformers(models, data):
  torch = pytest.importorskip("torch", reason="oracle needs torch")
  transformers = pytest.importorskip("transformers")
  folder = models / "minilm-l6"
  ids = tokens_of(folder, data, characters=4000)[: 8 * 48].reshape(8, 48)
  oracle = transformers.AutoModel.from_pretrained(
    folder, dtype=torch.float32
  ).eval()
  with torch.no_grad():
    states = oracle(torch.tensor(ids, dtype=torch.long)).last_hidden_state
  assert np.abs(loaded(folder)(ids) - states.numpy()).max() <= 1e-5
