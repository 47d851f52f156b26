"""Where clients train in tests, unless the placement is what is tested."""

import jax

from fedjax_llm.federated import clients


def on(devices: int, clients_per_step: int) -> clients.Placement:
  mesh = clients.device_mesh(jax.devices()[:devices])
  return clients.Placement(mesh, clients_per_step)


# One client after the other on one device: the reference of all others.
ALONE = on(1, 1)
EVERYBODY = 1000  # Clients at once: all there are.
