"""Learned codecs: how they are fitted, saved, and measured."""
