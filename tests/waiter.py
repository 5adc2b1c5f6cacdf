"""A waiter of the batcher that tests can await."""

import asyncio
from typing import Any


class FutureWaiter(asyncio.Future[Any]):
    """A future that ignores what it is given once it is done, as `service.model.batching.Waiter` asks."""

    @property
    def answered(self) -> bool:
        """Tell whether it is done."""
        return self.done()

    def set_result(self, result: Any, /) -> None:
        """Take a result, unless it is done."""
        if not self.done():
            super().set_result(result)

    def set_exception(self, exception: type | BaseException, /) -> None:
        """Take a failure, unless it is done."""
        if not self.done():
            super().set_exception(exception)
