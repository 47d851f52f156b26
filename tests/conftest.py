"""Settings that every test runs under."""

import os
import pathlib

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
if not hasattr(jax, "enable_x64"):  # JAX 0.7
  jax.enable_x64 = jax.experimental.enable_x64

ROOT = pathlib.Path(__file__).parent.parent

# Compilations are most of the suite's time: they are shared between tests,
# workers, the processes that tests start, and runs of the suite.
CACHE = {
  "jax_compilation_cache_dir": str(ROOT / ".pytest_cache" / "jax"),
  "jax_persistent_cache_min_compile_time_secs": 0.2,
}
# So are tokenised data sets. No test asks the hub for anything.
os.environ["FEDJAX_LLM_CACHE"] = str(ROOT / ".pytest_cache" / "tokens")
os.environ["HF_HUB_OFFLINE"] = "1"
# XLA's optimisations of code that runs a few times take longer than they save.
# XLA_FLAGS=--xla_backend_optimization_level=3 tests with them.
os.environ["XLA_FLAGS"] = " ".join(
  ("--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", ""))
)
for name, value in CACHE.items():
  jax.config.update(name, value)
  os.environ[name.upper()] = str(value)


# Each compiled program takes a dozen memory maps, and XLA:CPU crashes when the
# process has as many as Linux allows, 65,530 by default.
MOST_MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
  """Forgets what was compiled before the process has too many maps."""
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
    jax.clear_caches()


@pytest.fixture(scope="session")
def equations():
  """All equations of a function's jaxpr, those of inner jaxprs included."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      yield equation
      for inner in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(inner, "jaxpr", inner)  # Of a closed jaxpr.
        if hasattr(inner, "eqns"):
          yield from walk(inner)

  return lambda fn, *args: list(walk(jax.make_jaxpr(fn)(*args).jaxpr))


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
  """The folder of real weights and data sets, or a skip that says so."""
  folder = pathlib.Path(
    os.environ.get("FEDJAX_LLM_DATA", ROOT.parent / "shared" / "data")
  )
  if not folder.is_dir():
    pytest.skip(f"needs real data in {folder}; set FEDJAX_LLM_DATA.")
  return folder


@pytest.fixture(scope="session")
def models() -> pathlib.Path:
  """The folder of real pretrained models, or a skip that says so."""
  folder = os.environ.get("FEDJAX_LLM_MODELS")
  if not folder or not pathlib.Path(folder).is_dir():
    pytest.skip("needs real models; set FEDJAX_LLM_MODELS to their folder.")
  return pathlib.Path(folder)


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> pathlib.Path:
  """A model folder of the same make as real ones: a tiny random Llama."""
  from fedjax_llm.experiments import pretraining
  from fedjax_llm.models import decoder, pretrained

  folder = tmp_path_factory.mktemp("models") / "toy"
  config = decoder.DecoderConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=True,
  )
  params = jax.jit(decoder.Decoder(config).init)(
    jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
  )["params"]
  pretrained.save(folder, config, params, dtype=jnp.float32)
  texts = [" ".join(map(str, range(1000)))]
  tokenizer = pretraining.train_tokenizer(texts, 300, context=32)
  tokenizer.save_pretrained(folder)
  return folder


@pytest.fixture(scope="session")
def toy_adapter(toy_model, tmp_path_factory) -> str:
  """An adapter that moves the toy model: its folder."""
  from fedjax_llm.models import adapters, decoder, families, lora

  config = families.read_config(toy_model)
  settings = lora.LoRA(rank=2, targets=decoder.LINEAR)
  factors = lora.init(decoder.Decoder(config, settings), jax.random.key(0))
  factors = jax.tree.map(lambda x: x + 0.1, factors)
  folder = tmp_path_factory.mktemp("adapter")
  adapters.save(
    folder, factors, settings, config=config, base_model=str(toy_model)
  )
  return str(folder)
