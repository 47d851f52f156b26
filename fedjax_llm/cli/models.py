"""`fedjax-llm merge` and `fedjax-llm chat`: commands that use an adapter."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_llm.data import templates
from fedjax_llm.experiments import loading, tasks
from fedjax_llm.models import (
  adapters,
  families,
  generation,
  hub_config,
  lora,
  pretrained,
)

if TYPE_CHECKING:
  import transformers


def merge(
  *,
  adapter: str,
  out: pathlib.Path,
  model: str | None = None,
  dtype: tasks.Dtype | None = None,
) -> None:
  """Write a model folder with an adapter merged into the weights.

  The folder has weights, config and tokenizer, as transformers loads them.

  Args:
    adapter: PEFT folder or hub name of a LoRA adapter.
    out: where to write the model.
    model: Hugging Face folder or hub name of the base model; by default the
      one that the adapter names.
    dtype: dtype of the weights; by default that of the base model.
  """
  if out.exists() and any(out.iterdir()):
    raise ValueError(
      f"--out expected a new or empty folder, got {out}, which has files."
    )
  model = model or adapters.base_model(pretrained.resolve(adapter))
  folder = pretrained.resolve(model)
  kept = jnp.dtype(dtype or hub_config.stored_dtype(folder))
  loaded = loading.load(str(folder), adapter, kept)
  assert loaded.adapter is not None
  merged = lora.merge(loaded.params, loaded.trained, loaded.adapter.scale)
  pretrained.save(
    out, loaded.config, merged, head=loaded.head, dtype=kept, like=loaded.folder
  )
  print(f"Model: {out}")


def chat(
  *,
  model: str | None = None,
  adapter: str | None = None,
  prompt: str | None = None,
  system: str | None = None,
  template: Literal["auto", "plain", "alpaca", "question"] = "auto",
  max_new_tokens: int = 64,
  temperature: float = 0.0,
  top_p: float = 1.0,
  seed: int = 0,
  dtype: tasks.Dtype = "float32",
) -> None:
  """Talk to a model, and see what an adapter changes.

  With an adapter, both the base model and the adapted one answer. Without
  --prompt, every line of the standard input is a prompt.

  Args:
    model: Hugging Face folder or hub name of the base model; by default the
      one that the adapter names.
    adapter: PEFT folder or hub name of a LoRA adapter for it.
    prompt: the text to answer or to continue.
    system: the system message, for a tokenizer with a chat template.
    template: the template of the prompt: "auto" for the tokenizer's chat
      template if it has one; "plain" to continue the text as it is; "alpaca" or
      "question" for the templates of the configs on Dolly and GSM8K.
    max_new_tokens: largest number of tokens in an answer.
    temperature: divisor of the logits; 0 always takes the most likely token.
    top_p: total probability of the most likely tokens, from which each token is
      drawn.
    seed: seed of the draws.
    dtype: dtype of the model and its activations.
  """
  loaded = loading.load(model, adapter, jnp.dtype(dtype))
  families.check_predicts(loaded.config)
  if loaded.head is not None:
    raise ValueError(
      f"chat expected a language model, got {adapter}, the adapter of a"
      " classifier. Use `fedjax-llm evaluate --task classification`."
    )
  tokenizer = loading.load_tokenizer(loaded.folder)
  voices: dict[str, tuple[nn.Module, Any]] = {
    "base": (families.model(loaded.config, dtype=jnp.dtype(dtype)), None)
  }
  if adapter is not None:
    voices["adapter"] = loaded.network(jnp.dtype(dtype)), loaded.trained
  ends = {*hub_config.end_tokens(loaded.folder), tokenizer.eos_token_id}
  if system and not (template == "auto" and tokenizer.chat_template):
    raise ValueError(
      "--system expected a tokenizer with a chat template and --template auto,"
      f" got {template=} and"
      f" {'a' if tokenizer.chat_template else 'no'} chat template."
    )
  for number, text in enumerate([prompt] if prompt else _lines()):
    ids = _prompt(tokenizer, text, system, template)
    for name, (network, factors) in voices.items():
      (answer,) = generation.generate(
        network,
        loaded.params,
        factors,
        [ids],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        eos_ids=sorted(ends - {None}),
        key=jax.random.fold_in(jax.random.key(seed), number),
      )
      said = tokenizer.decode(answer, skip_special_tokens=True)
      print(f"{name}: {said}" if adapter else said, flush=True)


def _lines():
  """Yields the prompts that the user types, until the end of the input."""
  while True:
    try:
      line = input("> ")
    except EOFError:
      return
    if line:
      yield line


def _prompt(
  tokenizer: transformers.PreTrainedTokenizerBase,
  text: str,
  system: str | None,
  template: str,
) -> list[int]:
  if template == "alpaca":
    row = {"instruction": text, "input": "", "output": ""}
    text = templates.alpaca()(row).prompt
  elif template == "question":
    row = {"question": text, "answer": ""}
    text = templates.question_answer()(row).prompt
  if template != "auto" or not tokenizer.chat_template:
    ids = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == end else ids
  messages = [{"role": "user", "content": text}]
  if system is not None:
    messages = [{"role": "system", "content": system}, *messages]
  encoded: Any = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True
  )
  return encoded["input_ids"]
