"""Ctrl-C, and a request to terminate, acted upon where nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = signal.SIGINT, signal.SIGTERM


class StopRequest:
    """While the context lasts, SIGINT and SIGTERM are noted, and `raise_if_made` raises.

    An exception in the middle of another library's write (of Optuna's journal, say) would leave its lock behind or end
    as an error of that library. A second Ctrl-C does not wait: it raises wherever the program is.
    """

    number: int | None = None
    """Of the first signal that came."""

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_made(self) -> None:
        """Ends what is under way if a signal came.

        Raises:
            KeyboardInterrupt: with the number of the signal.
        """
        if self.number is not None:
            raise KeyboardInterrupt(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.number = self.number or number
