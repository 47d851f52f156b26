"""The evaluator is a plain loop over tokens, whatever its batches."""

import contextlib
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.cli import evaluate as commands
from fedjax_llm.data import batches
from fedjax_llm.evaluation import likelihood
from fedjax_llm.models import adapters, decoder, language, lora, pretrained

ROWS, LENGTH, VOCABULARY = 5, 7, 11


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(0)
  tokens = rng.integers(VOCABULARY, size=(ROWS, LENGTH + 1), dtype=np.int32)
  return batches.Examples(tokens, rng.random((ROWS, LENGTH)) < 0.7)


class Table:
  """A bigram model: the logits of the next token are a row of a table."""

  def apply(self, variables, tokens, segments=None):
    return variables["params"][tokens] + variables.get("lora", 0)


@pytest.fixture(scope="module")
def table():
  return np.random.default_rng(1).normal(size=(VOCABULARY, VOCABULARY))


def evaluate(rows, table, factors=None, **options):
  score = language.score_fn(Table())
  evaluator = likelihood.evaluator(score, rows, **options)
  return evaluator(factors, jnp.asarray(table, jnp.float32))


def test_it_is_a_loop_over_the_tokens_that_count(rows, table):
  losses, right = [], []
  for tokens, mask in zip(rows.tokens, rows.mask, strict=True):
    for position in np.flatnonzero(mask):
      logits = table[tokens[position]]
      target = tokens[position + 1]
      losses.append(math.log(np.exp(logits).sum()) - logits[target])
      right.append(logits.argmax() == target)
  result = evaluate(rows, table)
  assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
  assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
  assert result["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_batch_size_changes_nothing(rows, table, batch_size):
  # Rows are scored alike and summed in float64: equal but for the last bits.
  expected = evaluate(rows, table, batch_size=3)
  result = evaluate(rows, table, batch_size=batch_size)
  assert result == pytest.approx(expected, rel=1e-7)


def test_factors_are_given_to_the_model(rows, table):
  factors = jnp.zeros(VOCABULARY).at[3].set(100.0)[None, None]
  counted = rows.mask & (rows.tokens[:, 1:] == 3)
  result = evaluate(rows, table, factors)
  assert result["accuracy"] == pytest.approx(counted.sum() / rows.mask.sum())


def test_rows_without_a_token_that_counts_are_refused(rows, table):
  nothing = rows._replace(mask=np.zeros_like(rows.mask))
  with pytest.raises(ValueError, match="a token to predict, got none"):
    evaluate(nothing, table)


def test_a_hopeless_loss_has_an_infinite_perplexity():
  result = likelihood.summary(loss=1e6, right=0.0, tokens=1.0)
  assert result == {"loss": 1e6, "perplexity": math.inf, "accuracy": 0.0}


# The command, against transformers and PEFT.


def command(**arguments):
  text = io.StringIO()
  with contextlib.redirect_stdout(text):
    commands.evaluate(as_json=True, **arguments)
  return json.loads(text.getvalue())


@pytest.fixture(scope="module")
def reference(data):
  """(text, adapter or None) -> the loss as transformers and PEFT have it."""
  torch = pytest.importorskip("torch", reason="the oracle needs torch")
  peft = pytest.importorskip("peft", reason="the oracle needs peft")
  import transformers

  folder = data / "stories260k"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

  def loss(text, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32
    )
    if adapter is not None:
      model = peft.PeftModel.from_pretrained(model, adapter)
    ids = tokenizer(text, verbose=False)["input_ids"]
    context = model.config.max_position_embeddings
    total = 0.0
    for start in range(0, len(ids) - 1, context):
      window = torch.tensor([ids[start : start + context + 1]])
      with torch.no_grad():
        logits = model(window[:, :-1]).logits[0]
      total += torch.nn.functional.cross_entropy(
        logits, window[0, 1:], reduction="sum"
      ).item()
    return total / (len(ids) - 1), len(ids) - 1

  return loss


@pytest.fixture(scope="module")
def adapter(data, tmp_path_factory):
  """An adapter whose factors are both far from zero."""
  config, _ = pretrained.load(data / "stories260k")
  settings = lora.LoRA(rank=4, alpha=8.0, targets=decoder.LINEAR)
  factors = lora.init(decoder.Decoder(config, settings), jax.random.key(0))
  leaves, structure = jax.tree.flatten(factors)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  draw = lambda key, x: 0.1 * jax.random.normal(key, x.shape)
  factors = jax.tree.unflatten(structure, map(draw, keys, leaves))
  folder = tmp_path_factory.mktemp("adapter")
  adapters.save(
    folder, factors, settings, config=config, base_model="stories260k"
  )
  return folder


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of transformers.
@pytest.mark.parametrize("characters", [300, 5000], ids=["short", "long"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_the_command_agrees_with_transformers(
  data, reference, adapter, tmp_path, characters, adapted
):
  sample = data / "tinystories_sample" / "tinystories_train_head.txt"
  path = tmp_path / "text.txt"
  path.write_text(sample.read_text(encoding="utf-8")[:characters])
  folder = adapter if adapted else None
  expected, tokens = reference(path.read_text(), folder)
  result = command(model=str(data / "stories260k"), text=path, adapter=folder)
  assert result["tokens"] == tokens
  assert (tokens > 512) == (characters == 5000)  # One window, or several.
  assert result["loss"] == pytest.approx(expected, abs=1e-4)
