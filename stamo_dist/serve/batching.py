"""Requests that wait while the policy computes are computed together next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import numpy as np
from starlette.concurrency import run_in_threadpool

from stamo_dist.models.policies import AnyPolicy
from stamo_dist.serve.observation import Moment

_Asked = tuple[Sequence[Moment], "asyncio.Future[list[np.ndarray]]"]


class Batcher:
    """One computation at a time, of as many waiting requests as `most` timesteps hold; nobody waits for more to come.

    Robots whose requests come alone are answered as if there were no batching.
    """

    def __init__(self, policy: AnyPolicy, most: int):
        self._policy, self._most = policy, most
        self._waiting: deque[_Asked] = deque()
        self._computing: asyncio.Task[None] | None = None

    async def answer(self, moments: Sequence[Moment]) -> list[np.ndarray]:
        """The chunk (C, A) for each observation.

        Raises:
            DataError: The policy refuses an observation.
        """
        answered: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
        self._waiting.append((moments, answered))
        if self._computing is None or self._computing.done():
            self._computing = asyncio.create_task(self._compute_all())
        return await answered

    def compute(self, moments: Sequence[Moment]) -> list[np.ndarray]:
        """As `answer`, at once and in this thread; equal sources and sizes of images are batched."""
        groups: dict[object, list[int]] = {}
        for i, moment in enumerate(moments):
            groups.setdefault((moment.key, *(view.shape for view in moment.views)), []).append(i)
        found: dict[int, np.ndarray] = {}
        for rows in groups.values():
            for start in range(0, len(rows), self._most):
                some = rows[start : start + self._most]
                found.update(zip(some, self._act([moments[i] for i in some]), strict=True))
        return [found[i] for i in range(len(moments))]

    def _act(self, moments: Sequence[Moment]) -> np.ndarray:
        felt = [moment.proprio for moment in moments if moment.proprio is not None]
        return self._policy.act_batch(
            [moment.views for moment in moments],
            [moment.instruction for moment in moments],
            unnorm_key=moments[0].key,
            proprio=np.stack(felt) if felt else None,
        )

    async def _compute_all(self) -> None:
        while self._waiting:
            asked = [self._waiting.popleft()]
            size = len(asked[0][0])
            while self._waiting and size + len(self._waiting[0][0]) <= self._most:
                asked.append(self._waiting.popleft())
                size += len(asked[-1][0])
            try:
                await self._compute(asked)
            except Exception:  # whose observation it was shows when each is computed alone
                for one in asked:
                    await self._compute_one(one)

    async def _compute(self, asked: Sequence[_Asked]) -> None:
        chunks = await run_in_threadpool(self.compute, [moment for moments, _ in asked for moment in moments])
        rest = iter(chunks)
        for moments, answered in asked:
            mine = [next(rest) for _ in moments]
            if not answered.done():  # a client that has gone
                answered.set_result(mine)

    async def _compute_one(self, one: _Asked) -> None:
        try:
            await self._compute([one])
        except Exception as error:
            if not one[1].done():
                one[1].set_exception(error)
