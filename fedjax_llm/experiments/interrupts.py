"""Ctrl-C that lets the work at hand be finished."""

import os
import signal
import threading


class Interrupt:
  """Notes the first SIGINT; a second one stops at once.

  A context; `asked` tells whether there was one. Only the main thread gets
  signals: work in another one is not interrupted.
  """

  asked = False

  def __enter__(self):
    self._main = threading.current_thread() is threading.main_thread()
    if self._main:
      self._previous = signal.signal(signal.SIGINT, self._note)
    return self

  def __exit__(self, *error):
    if self._main:
      signal.signal(signal.SIGINT, self._previous)

  def _note(self, *_):
    self.asked = True
    # A process that a script left in the background starts with it ignored.
    ignored = self._previous == signal.SIG_IGN
    handler = signal.default_int_handler if ignored else self._previous
    signal.signal(signal.SIGINT, handler)
    # Not `print`: the signal may have come in the middle of another one.
    os.write(2, b"\nFinishing the round; Ctrl-C again stops at once.\n")
