"""Private local training: DP-SGD at the client.

Abadi et al., "Deep Learning with Differential Privacy", 2016. The gradient of
each example is clipped, and their sum gets Gaussian noise. So the update says
little about any one example, even to the server. `guarantees.ExampleLevel`
computes the epsilon.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from fedjax_llm.federated import clients, local_training, mapping
from fedjax_llm.federated.privacy import mechanisms


def local_update(
  loss_fn: clients.LossFn,
  optimizer: optax.GradientTransformation,
  *,
  clip_norm: float,
  noise_multiplier: float,
  microbatch: int | None = None,
) -> local_training.LocalUpdate:
  """Makes the private training that one client does in one round.

  A step's gradient is the noisy sum of the clipped gradients of its examples,
  divided by the size of the batch. An example's gradient is that of its own
  total / count. The size includes padding, because the number of real examples
  would depend on every single one.

  An example whose gradient is not finite adds zeros. Metrics, such as the loss,
  are not private.

  Args:
    loss_fn: see `clients.local_update`; it is called on single examples.
    optimizer: steps on the noisy gradient.
    clip_norm: bound S of the L2 norm of an example's gradient, > 0; infinite
      for none. Only trained entries count.
    noise_multiplier: z >= 0; the noise in a sum has a standard deviation of
      z S in every entry that is trained.
    microbatch: the largest number of examples that are differentiated at once,
      which bounds the memory; None for the whole batch.

  Returns:
    The training, as `clients.local_update` returns it, with an
    `example_noise_multiplier`. A step without examples changes nothing.

  Raises:
    ValueError: if a number is out of range, or there is noise without a bound.
  """
  mechanisms.check(clip_norm=clip_norm, noise_multiplier=noise_multiplier)
  if microbatch is not None and microbatch < 1:
    raise ValueError(f"expected {microbatch=} to be None or >= 1.")
  of_batch = local_training.batch_gradient(loss_fn)

  def gradient_fn(trainable, frozen, examples, mask, key, trains):
    flat, unravel = ravel_pytree(trainable)
    precise = jnp.promote_types(flat.dtype, jnp.float32)

    def of_example(shared, row):
      del shared
      example, is_real, key = row
      batch = jax.tree.map(lambda x: x[None], (example, is_real))
      gradient, sums = of_batch(trainable, frozen, *batch, key, trains=trains)
      gradient, _ = ravel_pytree(gradient)
      gradient = mechanisms.clip(gradient.astype(precise), clip_norm)
      return (jnp.where(is_real, gradient, 0), sums), ()

    noise_key, loss_key = jax.random.split(key)
    rows = (examples, mask, jax.random.split(loss_key, mask.size))
    # The map over clients, which adds up results, also works for examples.
    over_rows = mapping.in_steps(of_example, microbatch)
    (total, sums), _ = over_rows((), rows)
    total = mechanisms.add_noise(total, clip_norm, noise_multiplier, noise_key)
    gradient = unravel((total / mask.size).astype(flat.dtype))
    return local_training.only(trains, gradient), sums

  plain = local_training.local_steps(gradient_fn, optimizer)
  return dataclasses.replace(plain, example_noise_multiplier=noise_multiplier)
