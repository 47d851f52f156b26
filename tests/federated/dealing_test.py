"""Tiers are dealt out in turn unless the user deals them."""

import numpy as np

from fedjax_llm.federated import dealing


def test_tiers_are_dealt_in_turn():
  of_client = dealing.in_turn(3)
  assert of_client(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_the_user_may_deal_them():
  of_client = dealing.in_turn(2, lambda client: client // 4)
  assert of_client(np.arange(8)).tolist() == [0] * 4 + [1] * 4
