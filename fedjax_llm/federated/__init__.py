"""Clients, rounds, aggregators and the algorithms composed from them."""
